"""Settings for all tests: the examples can be imported, and what `datasets` keeps is removed in the end."""

import os
import tempfile

import paths  # noqa: F401 - it makes the examples importable


_datasets_cache = tempfile.TemporaryDirectory(prefix="proscale-datasets-")
os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name  # read when `datasets` is imported
