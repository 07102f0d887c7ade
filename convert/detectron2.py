"""`python -m convert.detectron2`: `proscale convert detectron2`, in a clone."""

import sys

from proscale_hf.cli.convert import main


if __name__ == "__main__":
    sys.exit(main("detectron2"))
