"""What makes a saved folder a complete Hub repository, beside weights and settings: code, model card, upload.

The code, which `code.py` writes, lets `trust_remote_code=True` load it where this package is not installed.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, metadata_load
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, logging

from proscale_hf.hub.license import open_repository
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
CARD_SIGNATURE = "\n<!-- Made from the files beside it ({}). An edited card is kept. -->\n"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_card(folder: str | os.PathLike, tags: Iterable[str] = (), repo_id: str | None = None) -> None:
    """
    Write the model card for the settings in a folder; not if there is one that somebody else wrote or edited.

    What was saved matters more than its card: what goes wrong here is logged, and not raised.

    Args:
        folder: where a model was saved, and perhaps an image processor. Without a model nothing is written.
        tags: further tags for the Hub; those of a card that is there are kept.
        repo_id: name on the Hub for the examples.
    """
    card = Path(folder) / CARD_NAME
    try:
        settings = _read_json(card.with_name(CONFIG_NAME))
        if settings.get("model_type") != ProScaleMask2FormerConfig.model_type:
            return
        if os.path.lexists(card):
            if not is_own_card(card.read_text(encoding="utf-8")):
                return
            there = metadata_load(card)["tags"]
            tags = [*tags, *(tag for tag in there if not tag.endswith("-segmentation"))]  # those follow from the model
        from proscale_hf.hub.model_card import model_card  # which imports the model, and so this file

        config = ProScaleMask2FormerConfig.from_dict(settings)
        processor_settings = _read_json(card.with_name(IMAGE_PROCESSOR_NAME))
        text = model_card(config, processor_settings, tags=tags, repo_id=repo_id)
        unfinished = card.with_name(f".{CARD_NAME}.{os.getpid()}")
        unfinished.write_text(sign(text), encoding="utf-8", newline="\n")
        unfinished.replace(card)
    except Exception as error:
        logger.warning(f"No model card was written to {card}: {error}")


def sign(text: str) -> str:
    """A card, and a last line by which [`is_own_card`] knows it."""
    return text + CARD_SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def is_own_card(text: str) -> bool:
    """Whether a card is one of [`write_card`], and nobody has changed it."""
    return text == sign(text[: -len(sign(""))])


def split_hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take those of [`Upload`] out of the arguments of `save_pretrained`."""
    return {name: kwargs.pop(name) for name in inspect.signature(Upload).parameters if name in kwargs}


class Upload:
    """
    A commit of what is about to be saved in a folder. The repository is opened first: a refusal comes before the work.

    Args:
        folder: where something will be saved.
        content: what will be: a model's configuration, or an image processor.
        repo_id: the repository, created if there is none; by default of the folder's name.
        private: whether only its owner may see it.
        token: for the Hub; by default the one that is logged in.
        revision: branch, created if there is none.
        create_pr: make a pull request.
        commit_message: first line of the commit, by default "Upload model".
        commit_description: the rest.
        i_have_the_right_to_publish: make weights public although their licence does not allow it to everyone.

    Raises:
        ValueError: the weights must not be published.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        content: Any,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        i_have_the_right_to_publish: bool = False,
    ):
        self.folder = Path(folder)
        self.api = HfApi(token=token)
        repo_id = repo_id or self.folder.absolute().name
        self.repo_id = open_repository(content, repo_id, private, token, i_have_the_right_to_publish).id
        self.commit = {
            "commit_message": commit_message or "Upload model",
            "commit_description": commit_description,
            "revision": revision,
            "create_pr": create_pr,
        }
        self.before = self._modification_times()

    def send(self) -> CommitInfo:
        """Upload what was saved. A model card there is kept, and weights that are no longer read are removed."""
        revision = self.commit["revision"]
        if revision is not None and not revision.startswith("refs/pr/"):
            self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)
        siblings = self.api.model_info(self.repo_id, revision=revision).siblings
        there = {sibling.rfilename for sibling in siblings}
        names = {name for name, time in self._modification_times().items() if time != self.before.get(name)}
        if CARD_NAME not in there and (self.folder / CARD_NAME).is_file():
            names.add(CARD_NAME)
        elif CARD_NAME in names and not self._is_own_card_there(revision):
            names.discard(CARD_NAME)
        is_model = any(WEIGHTS.fullmatch(name) for name in names)
        stale = {name for name in there - names if is_model and WEIGHTS.fullmatch(name)}
        operations = [
            *(CommitOperationAdd(name, self.folder / name) for name in sorted(names)),
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ]
        return self.api.create_commit(self.repo_id, operations, **self.commit)

    def _is_own_card_there(self, revision: str | None) -> bool:
        path = self.api.hf_hub_download(self.repo_id, CARD_NAME, revision=revision)
        return is_own_card(Path(path).read_text(encoding="utf-8", errors="replace"))

    def _modification_times(self) -> dict[str, int]:
        if not self.folder.is_dir():
            return {}
        return {entry.name: entry.stat().st_mtime_ns for entry in self.folder.iterdir() if entry.is_file()}


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}
