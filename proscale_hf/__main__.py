"""`python -m proscale_hf` is the `proscale` command."""

import sys

from proscale_hf.endings import end_well


def main() -> int:
    """Runs the command line of this process."""
    end_well()
    from proscale_hf.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
