"""Names of presets: ARCHITECTURE-BACKBONE-DATASET, with numbers of layers behind if they are not the usual ones."""

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple


class PresetParts(NamedTuple):
    """What a name says; `stages` has one digit for each stage, or is None."""

    architecture: str
    backbone: str
    data: str
    stages: str | None


@dataclass(frozen=True)
class PresetNames:
    """
    The names of a family's presets.

    Args:
        architectures: their names.
        backbones: their names.
        data: names of data sets, with the task if that is not the usual one.
        stages: numbers of layers for the architecture that has stages.
        staged: that architecture.
    """

    architectures: Collection[str]
    backbones: Collection[str]
    data: Collection[str]
    stages: Collection[str]
    staged: str

    def __iter__(self) -> Iterator[str]:
        for architecture, backbone, data in product(self.architectures, self.backbones, self.data):
            for stages in ("", *(f"-{stages}" for stages in self.stages if architecture == self.staged)):
                yield f"{architecture}-{backbone}-{data}{stages}"

    def __contains__(self, name: str) -> bool:
        return self.find(name) is not None

    def find(self, name: str) -> PresetParts | None:
        """What a name says; None if this is no preset's name."""
        choices = (
            "|".join(map(re.escape, names)) for names in (self.architectures, self.backbones, self.data, self.stages)
        )
        match = re.fullmatch("({})-({})-({})(?:-({}))?".format(*choices), str(name))
        if match is None or (match[4] is not None and match[1] != self.staged):
            return None
        return PresetParts(*match.groups())

    def parts(self, name: str) -> PresetParts:
        """
        What a name says.

        Raises:
            ValueError: there is no such preset; the message has the nearest names.
        """
        parts = self.find(name)
        if parts is None:
            nearest = difflib.get_close_matches(str(name).lower(), list(self), n=3, cutoff=0)
            raise ValueError(f"There is no preset {name!r}. The nearest names are {', '.join(nearest)}.")
        return parts
