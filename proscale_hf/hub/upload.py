"""The one way to the Hub: open the repository, save into an empty folder, upload that folder in one commit."""

import inspect
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from proscale_hf.hub.card_mark import CARD_NAME, is_own_card
from proscale_hf.hub.license import check_may_publish


WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class HubRepository:
    """
    A model repository on the Hub, created unless it exists. Opening it comes before the work: what the Hub or the
    weights' licence refuses is known before anything is saved.

    Args:
        repo_id: the repository; without a namespace it is the user's own.
        config: configuration of the model that will go there; None for an image processor.
        private: whether only its owner may see it.
        token: for the Hub; by default the one that is logged in.
        revision: branch, created if there is none.
        create_pr: make a pull request.
        commit_message: first line of the commit.
        commit_description: the rest.
        i_have_the_right_to_publish: make weights public although their licence does not allow it to everyone.

    Raises:
        ValueError: the weights must not be published, or the repository exists and is public though it should be
            private.
    """

    def __init__(
        self,
        repo_id: str,
        config: Any = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        i_have_the_right_to_publish: bool = False,
    ):
        check_may_publish(config, bool(private), i_have_the_right_to_publish)
        self.api = HfApi(token=token)
        info = self.api.model_info(self.api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if private and not info.private:
            raise ValueError(
                f"{info.id} exists already and is public, but this model should go to a private repository: make it "
                "private in its settings on the Hub, or choose another name."
            )
        self.id = info.id
        self.revision = revision
        self.commit = {
            "commit_message": commit_message or "Upload model",
            "commit_description": commit_description,
            "create_pr": create_pr,
        }

    def upload(self, folder: str | os.PathLike, card: Path | None = None) -> CommitInfo:
        """
        Upload all files of a folder in one commit.

        Weights that are no longer read are removed. A model card that somebody wrote is not replaced by one of ours.

        Args:
            folder: has the files that go up, and no others.
            card: the model card from somewhere else; the folder's own goes up if there is no such file.
        """
        files = {path.name: path for path in Path(folder).iterdir()}
        if card is not None and card.is_file():
            files[CARD_NAME] = card
        if self.revision is not None and not self.revision.startswith("refs/pr/"):
            self.api.create_branch(self.id, branch=self.revision, exist_ok=True)
        info = self.api.model_info(self.id, revision=self.revision)
        there = {sibling.rfilename for sibling in info.siblings}
        if CARD_NAME in files and CARD_NAME in there and _is_own(files[CARD_NAME]) and not self._has_own_card():
            del files[CARD_NAME]
        has_weights = any(WEIGHTS.fullmatch(name) for name in files)
        stale = [name for name in there - files.keys() if has_weights and WEIGHTS.fullmatch(name)]
        operations = [
            *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ]
        return self.api.create_commit(
            self.id, operations, revision=self.revision, parent_commit=info.sha, **self.commit
        )

    def _has_own_card(self) -> bool:
        return _is_own(Path(self.api.hf_hub_download(self.id, CARD_NAME, revision=self.revision)))


def _is_own(card: Path) -> bool:
    return is_own_card(card.read_text(encoding="utf-8", errors="replace"))


def split_hub_arguments(kwargs: dict[str, Any], folder: str | os.PathLike) -> dict[str, Any]:
    """Take the arguments of [`HubRepository`] out of those of `save_pretrained`; the folder names the repository."""
    arguments = {name: kwargs.pop(name) for name in inspect.signature(HubRepository).parameters if name in kwargs}
    arguments["repo_id"] = arguments.get("repo_id") or Path(folder).absolute().name
    return arguments
