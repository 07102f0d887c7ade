"""Settings for all tests: what the library `datasets` keeps goes into a folder that is removed in the end."""

import os
import tempfile


_datasets_cache = tempfile.TemporaryDirectory(prefix="proscale-datasets-")
os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name  # read when `datasets` is imported
