"""Where things lie. Whoever imports this can import the examples."""

import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FIXTURES = TESTS / "fixtures"
EXAMPLES = ROOT / "examples"
sys.path.append(str(EXAMPLES))  # last: `examples/evaluate.py` must not hide the library of that name
