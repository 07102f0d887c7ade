"""Writes the generated parts of docs/paper.md, which are between comments: `python tests/paper_page.py`."""

import contextlib
import io
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from proscale_hf.cli import main
from proscale_hf.paper.tables import paper_rows, to_markdown


PAGE = ROOT / "docs" / "paper.md"
COMMAND = ["cost", "--preset", "proscale-swin-t-coco", "--size", "800x1333", "640x640"]


def parts() -> dict[str, str]:
    """The generated texts by the names in their comments."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main(COMMAND)
    return {"cost": output.getvalue().strip(), "tables": to_markdown(list(paper_rows()))}


def written(page: str, texts: dict[str, str]) -> str:
    """The page with the texts in their places."""
    for name, text in texts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        assert rest and after, name
        page = "\n".join((before + begin, text, end + after))
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), parts()))
