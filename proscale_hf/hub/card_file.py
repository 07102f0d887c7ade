"""The model card in a folder: written beside what was saved, renewed as long as nobody edits it, kept from then on."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, logging

from proscale_hf.files.whole import write_whole
from proscale_hf.hub.card_mark import CARD_NAME, is_own_card, sign
from proscale_hf.hub.model_card import COST_HEADING, cost_section, input_size, model_card


logger = logging.get_logger(__name__)


def write_card(
    folder: str | os.PathLike,
    config: PreTrainedConfig,
    *,
    measure_cost: Callable[[int, int], Any] | None = None,
    tags: Iterable[str] = (),
    repo_id: str | None = None,
) -> None:
    """
    Write the card of a model that was saved in a folder, unless somebody wrote or edited the card there.

    What was saved matters more than its card: an error is logged, and not raised.

    Args:
        folder: where the model was saved, and perhaps its image processor, whose settings are read.
        config: the model's configuration.
        measure_cost: gives the cost of an image of some height and width. Without it the card keeps the costs it has.
        tags: further tags for the Hub; the card also keeps those it has.
        repo_id: name on the Hub for the examples.
    """
    card = Path(folder, CARD_NAME)
    try:
        previous = card.read_text(encoding="utf-8") if os.path.lexists(card) else None
        costs = ""
        if previous is not None:
            if not is_own_card(previous):
                return
            previous_tags = metadata_load(card)["tags"]
            tags = [*tags, *(tag for tag in previous_tags if not tag.endswith("-segmentation"))]  # the model says those
            costs = section(previous, COST_HEADING)
        settings = read_settings(card.with_name(IMAGE_PROCESSOR_NAME))
        if measure_cost is not None:
            costs = measured(measure_cost, *input_size(settings))
        text = model_card(config, settings, costs=costs, tags=tags, repo_id=repo_id)
        write_whole(card, lambda file: file.write(sign(text).encode()))
    except Exception as error:
        logger.warning(f"No model card was written to {card}: {error}")


def renew_card(folder: str | os.PathLike, config_class: type[PreTrainedConfig]) -> None:
    """
    Write the card again after the image processor has changed; its costs stay.

    Args:
        folder: where an image processor was saved, and perhaps a model. Without a model nothing is written.
        config_class: of the models that go with the image processor.
    """
    path = Path(folder, CONFIG_NAME)
    try:
        values = read_settings(path)
        if values.get("model_type") != config_class.model_type:
            return
        config = config_class.from_dict(values)
    except Exception as error:  # a damaged configuration: saving the image processor must not fail for that
        logger.warning(f"No model card was written for {path}: {error}")
        return
    write_card(folder, config)


def measured(measure_cost: Callable[[int, int], Any], height: int, width: int) -> str:
    """The card's section on costs, empty if they cannot be measured."""
    try:
        return cost_section(measure_cost(height, width), height, width)
    except Exception as error:  # a backbone that cannot run without data
        logger.warning(f"The model card gets no cost table: {error}")
        return ""


def section(card: str, heading: str) -> str:
    """The section of a card with its heading, without the empty line behind it; empty if the card has none."""
    match = re.search(rf"^{re.escape(heading)}\n.*?(?=\n\n## |\Z)", card, flags=re.DOTALL | re.MULTILINE)
    return match.group() if match else ""


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}
