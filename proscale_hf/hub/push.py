"""Uploads a folder that holds a complete model, and nothing else. All is checked before the first byte is sent."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from proscale_hf.files.text import one_line
from proscale_hf.hub.card_file import write_card
from proscale_hf.hub.card_mark import CARD_NAME
from proscale_hf.hub.errors import HubError, explain
from proscale_hf.hub.families import FAMILIES
from proscale_hf.hub.license import check_may_publish
from proscale_hf.hub.upload import HubRepository


OPTIONAL_FILES = {".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt"}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    i_have_the_right_to_publish: bool = False,
) -> str:
    """
    Upload a model folder to a model repository on the Hub, in a single commit.

    Weights that the repository has, and the folder has not, are removed from it. A model card that nobody has edited is
    written again, with the repository's name in its examples.

    Args:
        folder: What `save_pretrained` of model and image processor wrote.
        repo_id: The repository; it is created if there is none. Without a namespace it is the user's own.
        private: The repository must be private.
        dry_run: Send nothing, and ask the Hub nothing.
        i_have_the_right_to_publish: Make weights public although their licence does not allow it to everyone.

    Returns:
        The repository's address; of a dry run the files with their sizes, and the model card, as text.

    Raises:
        HubError: something is missing in the folder or does not belong there, the weights' licence forbids it, or the
            Hub refused.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if not folder.is_dir():
        raise HubError(f"There is no folder {folder}.")
    config = _read_config(folder)
    write_card(folder, config, repo_id=repo_id)
    files = model_files(folder)
    try:
        check_may_publish(config, private, i_have_the_right_to_publish)
    except ValueError as error:
        raise HubError(str(error)) from error
    if dry_run:
        return _describe(folder, files, repo_id, private)
    try:
        repository = HubRepository(repo_id, config, private, i_have_the_right_to_publish=i_have_the_right_to_publish)
        repository.upload(folder)
    except Exception as error:  # the client's, its HTTP library's and our own: all must end in one line
        raise HubError(f"The upload to {repo_id} failed: {explain(error)}.") from error
    return f"{constants.ENDPOINT}/{repository.id}"


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        HubError: the Hub cannot have a repository of this name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} cannot be a repository on the Hub: give USER/NAME, in letters, digits, '-', '_' and '.'."
        ) from error


def model_files(folder: Path) -> list[str]:
    """
    The files of a complete model folder.

    Args:
        folder: What `save_pretrained` of model and image processor wrote.

    Returns:
        Their names, sorted.

    Raises:
        HubError: one is missing or damaged, or there is something else in the folder.
    """
    entries = {entry.name: entry for entry in folder.iterdir()}
    for entry in entries.values():
        if entry.is_symlink() or not entry.is_file():
            raise HubError(f"{entry} is no plain file. A model folder has nothing else; take it away.")
    for name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME, CARD_NAME):
        if name not in entries:
            raise HubError(f"{folder} is no complete model: {name} is missing. Save model and image processor again.")
    expected = {CONFIG_NAME, IMAGE_PROCESSOR_NAME, CARD_NAME, *_weights_files(folder), *_code_files(folder)}
    missing, others = sorted(expected - set(entries)), sorted(set(entries) - expected - OPTIONAL_FILES)
    if missing:
        raise HubError(f"{folder} is no complete model: {', '.join(missing)} missing. Save the model again.")
    if others:
        raise HubError(f"{folder} has files that do not belong to a model: {', '.join(others)}. Take them away.")
    try:
        ModelCard.load(folder / CARD_NAME)
    except Exception as error:  # YAML has its own types
        raise HubError(f"The metadata at the top of {folder / CARD_NAME} is not valid: {one_line(error)}") from error
    return sorted(entries)


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / CONFIG_NAME).is_file():
        raise HubError(f"{folder} is no complete model: {CONFIG_NAME} is missing. Save the model again.")
    values = _read_json(folder / CONFIG_NAME)
    if values.get("model_type") not in FAMILIES:
        raise HubError(f"{folder} has another kind of model: its model_type is {values.get('model_type')!r}.")
    try:
        return FAMILIES[values["model_type"]].config_class.from_dict(values)
    except Exception as error:  # whatever a wrong value leads to
        raise HubError(f"{folder / CONFIG_NAME} is no configuration of this model: {one_line(error)}") from error


def _weights_files(folder: Path) -> set[str]:
    """The files that the weights lie in, all of which can be read."""
    names = {SAFE_WEIGHTS_NAME}
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise HubError(f"{index} does not say where the weights are. Save the model again.")
        names = {SAFE_WEIGHTS_INDEX_NAME, *shards.values()}
    for name in names - {SAFE_WEIGHTS_INDEX_NAME}:
        if Path(name).name != name or not (folder / name).is_file():
            raise HubError(f"{folder} is no complete model: {name} is missing. Save the model again.")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise HubError(
                f"{folder / name} is damaged or incomplete ({one_line(error)}). Save the model again."
            ) from error
    return names


def _code_files(folder: Path) -> set[str]:
    """The modules that `auto_map` in the configuration files names, and what they import from each other."""
    names = set()
    for file_name in (CONFIG_NAME, IMAGE_PROCESSOR_NAME):
        auto_map = _read_json(folder / file_name).get("auto_map")
        if not isinstance(auto_map, dict) or not auto_map:
            raise HubError(f"{folder / file_name} names no code (auto_map). Save it again with this package's classes.")
        for reference in auto_map.values():
            references = reference if isinstance(reference, list) else [reference]
            names |= {f"{name.partition('.')[0]}.py" for name in references if isinstance(name, str)}
    for name in sorted(names):
        try:
            names |= {Path(path).name for path in get_relative_import_files(folder / name)}
        except OSError as error:
            missing = Path(error.filename or name).name
            raise HubError(f"{folder} is no complete model: {missing} is missing. Save the model again.") from error
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise HubError(f"{path} must hold a JSON object.")
    return content


def _describe(folder: Path, files: list[str], repo_id: str, private: bool) -> str:
    sizes = [(folder / name).stat().st_size for name in files]
    width = max(map(len, files))
    lines = [f"{name:<{width}}  {size / 1e6:10.3f} MB" for name, size in zip(files, sizes, strict=True)]
    kind = "private" if private else "public"
    header = f"{len(files)} files, {sum(sizes) / 1e6:.3f} MB, would go to the {kind} repository {repo_id}:"
    card = (folder / CARD_NAME).read_text(encoding="utf-8")
    return "\n".join([header, *lines, "", f"{CARD_NAME}:", card.rstrip()])
