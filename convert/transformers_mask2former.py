"""`python -m convert.transformers_mask2former`: the converter in `proscale_hf/convert`, from a clone."""

import sys

from proscale_hf.convert.transformers_mask2former import main


if __name__ == "__main__":
    sys.exit(main())
