"""Short names of the published models: `from_pretrained("proscale-swin-t-coco")`.

A name stands for the checkpoint that PRO-SCALE or Mask2Former published, converted; `hub/model_zoo.json` has the facts
about each. A local folder of that name comes first, then the repository in the project's namespace on the Hub.
"""

import contextlib
import difflib
import os
from collections.abc import Iterator

from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id


HUB_NAMESPACE = "proscale-hf"
NAMESPACE_VARIABLE = "PROSCALE_HUB_NAMESPACE"

RESNETS = ("r50", "r101")
SWINS = ("swin-t", "swin-s", "swin-b", "swin-b-22k", "swin-l-22k")
SWINS_ON_CITYSCAPES = ("swin-t", "swin-s", "swin-b-22k", "swin-l-22k")
MASK2FORMER_BACKBONES = {
    "coco-panoptic": RESNETS + SWINS,
    "coco-instance": RESNETS + SWINS,
    "cityscapes-panoptic": RESNETS + SWINS_ON_CITYSCAPES,
    "cityscapes-instance": RESNETS + SWINS_ON_CITYSCAPES,
    "cityscapes-semantic": RESNETS + SWINS_ON_CITYSCAPES,
    "ade20k-panoptic": ("r50", "swin-l-22k"),
    "ade20k-instance": ("r50", "swin-l-22k"),
    "ade20k-semantic": RESNETS + SWINS,
    "mapillary-vistas-panoptic": ("r50", "swin-l-22k"),
    "mapillary-vistas-semantic": ("r50", "swin-l-22k"),
}
MODEL_NAMES = (
    "proscale-r50-coco",
    "proscale-swin-t-coco",
    *(f"mask2former-{backbone}-{task}" for task, backbones in MASK2FORMER_BACKBONES.items() for backbone in backbones),
)


class NotOnTheHubError(OSError):
    """The Hub has no repository for a short name; the text is one line that says what to do."""


def resolve(name: str | os.PathLike) -> str | os.PathLike:
    """
    What a model's name means to transformers.

    Args:
        name: A short name, a Hub id or a path.

    Returns:
        The Hub id of a short name that no local folder has. Anything else as it is.

    Raises:
        ValueError: the name looks like a short name, and is none; or the namespace that `PROSCALE_HUB_NAMESPACE` names
            is not possible on the Hub.
    """
    if not isinstance(name, str) or os.path.isdir(name):
        return name
    if name in MODEL_NAMES:
        return _in_namespace(name)
    looks_like_ours = name.lower().startswith(("proscale-", "mask2former-")) and not {"/", os.sep} & set(name)
    if looks_like_ours and not os.path.exists(name):
        closest = difflib.get_close_matches(name.lower(), MODEL_NAMES, n=len(MODEL_NAMES), cutoff=0)
        raise ValueError(
            f"There is no folder and no published model {name!r}. Published are (closest first): {', '.join(closest)}."
        )
    return name


@contextlib.contextmanager
def resolved(name: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """
    `resolve`, for loading inside of a `with` block.

    Args:
        name: A short name, a Hub id or a path.

    Yields:
        What `resolve` gives.

    Raises:
        ValueError: see `resolve`.
        NotOnTheHubError: inside of the block the Hub had no repository for a short name.
    """
    source = resolve(name)
    try:
        yield source
    except OSError as error:
        if source == name or not _is_missing_repository(error):
            raise
        raise NotOnTheHubError(
            f"{name} is not on the Hub as {source}, or is private there. Convert the original checkpoint "
            f"(python -m convert.detectron2 --help) and give the folder, or set {NAMESPACE_VARIABLE} to a user or "
            "organization that has the model."
        ) from error


def _in_namespace(name: str) -> str:
    namespace = os.environ.get(NAMESPACE_VARIABLE) or HUB_NAMESPACE
    repo_id = f"{namespace}/{name}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{NAMESPACE_VARIABLE} is {namespace!r}; set it to the name of a user or organization on the Hub."
        ) from None
    return repo_id


def _is_missing_repository(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, RepositoryNotFoundError):
            return not isinstance(error, GatedRepoError)
        error = error.__cause__
    return False
