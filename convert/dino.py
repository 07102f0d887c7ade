"""`python -m convert.dino`: `proscale convert dino`, in a clone."""

import sys

from proscale_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("dino"))
