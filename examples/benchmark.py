"""Compare this package's models with others on this machine: `proscale benchmark` as a script."""

import sys

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()
    from proscale_hf.cli import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))
