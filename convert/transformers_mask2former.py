"""`python -m convert.transformers_mask2former`: `proscale convert transformers-mask2former`, in a clone."""

import sys

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()
    from proscale_hf.cli.convert import main

    sys.exit(main("transformers-mask2former"))
