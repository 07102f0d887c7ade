"""Images and their annotation files, brought together by name."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from proscale_hf.files.text import few


def split_folder(folder: str | Path, split: str) -> Path:
    """The folder of a split.

    Raises:
        ValueError: there is none; the message says which there are.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; check root, and that all of the data are unpacked there.")
    splits = [path.name for path in folder.iterdir() if path.is_dir()]
    if split not in splits:
        raise ValueError(f"There is no split {split!r} in {folder}; there are {few(splits)}.")
    return folder / split


def files_by_name(paths: Iterable[Path], endings: Sequence[str]) -> dict[str, Path]:
    """Files by their names without the ending; those with other endings, and hidden ones, are left out.

    Raises:
        ValueError: two files have the same name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        ending = next((ending for ending in endings if path.name.lower().endswith(ending.lower())), None)
        if ending is None or path.name.startswith("."):
            continue
        name = path.name[: -len(ending)]
        if name in found:
            raise ValueError(f"{path} and {found[name]} have the same name.")
        found[name] = path
    return found


def common_names(kinds: Mapping[str | Path, Mapping[str, Path]]) -> list[str]:
    """The names in order, each of which all kinds of files must have.

    Args:
        kinds: where the files of a kind are, and the files by name.

    Raises:
        ValueError: some kind of file is missing for a name.
    """
    names = set().union(*kinds.values())
    lacking = {folder: names - set(files) for folder, files in kinds.items()}
    if messages := [
        f"{len(some)} names have no file in {folder}: {few(some)}" for folder, some in lacking.items() if some
    ]:
        raise ValueError(f"Images and annotations must have the same names, but {'; '.join(messages)}.")
    return sorted(names)
