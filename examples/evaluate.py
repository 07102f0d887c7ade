r"""Measures a model on a data set: `proscale evaluate`, as a script, so that several processes can share the work.

accelerate launch --num_processes 8 examples/evaluate.py --model DIR \
    --dataset coco_panoptic --set root=coco --set split=val2017
"""

import sys

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()
    from proscale_hf.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
