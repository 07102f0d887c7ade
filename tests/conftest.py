"""Settings for all tests: the examples can be imported, and what `datasets` keeps is removed in the end."""

import os
import sys
import tempfile

from paths import EXAMPLES


sys.path.append(str(EXAMPLES))  # last: `examples/evaluate.py` must not hide the library of that name
_datasets_cache = tempfile.TemporaryDirectory(prefix="proscale-datasets-")
os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name  # read when `datasets` is imported
