"""`python -m proscale_hf.evaluation.panoptic_quality`: the panoptic quality of files, as JSON.

`proscale evaluate --predictions` measures the same and prints a table.
"""

import argparse
import json
import sys
from pathlib import Path

from proscale_hf.endings import end_well
from proscale_hf.evaluation.panoptic_files import panoptic_quality_of_files


def main() -> None:
    """Runs the command line of this process."""
    parser = argparse.ArgumentParser(
        prog="python -m proscale_hf.evaluation.panoptic_quality",
        description="Print the panoptic quality of a prediction in COCO-panoptic format, as JSON.",
    )
    parser.add_argument("--gt-json", type=Path, required=True, help="ground truth: JSON")
    parser.add_argument("--gt-folder", type=Path, required=True, help="ground truth: folder of PNG files")
    parser.add_argument("--pred-json", type=Path, required=True, help="prediction: JSON")
    parser.add_argument("--pred-folder", type=Path, required=True, help="prediction: folder of PNG files")
    parser.add_argument("--processes", type=int, help="how many share the work (default: one per core)")
    options = parser.parse_args()
    if options.processes is not None and options.processes < 1:
        sys.exit(f"error: --processes must be at least 1, got {options.processes}.")
    try:
        quality = panoptic_quality_of_files(
            options.gt_json, options.gt_folder, options.pred_json, options.pred_folder, options.processes
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(quality, indent=1))


if __name__ == "__main__":
    end_well()
    main()
