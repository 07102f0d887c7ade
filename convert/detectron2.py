"""`python -m convert.detectron2`: the converter in `proscale_hf/convert`, from a clone."""

import sys

from proscale_hf.convert.detectron2 import main


if __name__ == "__main__":
    sys.exit(main())
