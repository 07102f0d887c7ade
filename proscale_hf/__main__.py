"""`python -m proscale_hf` is the `proscale` command."""

import sys

from proscale_hf.cli import main


sys.exit(main())
