"""`python -m convert.detectron2`: `proscale convert detectron2`, in a clone."""

import sys

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()
    from proscale_hf.cli.convert import main

    sys.exit(main("detectron2"))
