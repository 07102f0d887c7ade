"""Compare this package's models with others on this machine: `proscale benchmark` as a script."""

import sys

from proscale_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
