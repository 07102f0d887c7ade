"""What only the installed package does when a model is loaded or saved; the code that leaves with a model does without.

A short name stands for a published model, and a model card tells about a saved one. Nobody needs either to load, run,
train or save a model, so the files behind them do not leave with it, see `hub/code.py`.
"""

from contextlib import nullcontext
from typing import Any


try:
    from proscale_hf.hub.card_file import renew_card, write_card
    from proscale_hf.hub.names import resolved
except ImportError:
    resolved = nullcontext

    def write_card(*arguments: Any, **options: Any) -> None:
        """No model card."""

    renew_card = write_card
