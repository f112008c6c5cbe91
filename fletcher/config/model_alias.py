"""A name for several models, each with a share of the traffic."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import blake2b

# Stands for all installed models in a list of names.
ANY_MODEL = "*"
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ALIAS = re.compile(rf"({MODEL_NAME})=(.+)", re.DOTALL)
_TARGET = re.compile(rf"({MODEL_NAME}(?:@[0-9a-f]+)?)(?::([0-9.]+))?")


@dataclass(frozen=True, slots=True)
class Alias:
    """Division of the calls for one name among several models, by weight.

    `targets` are pairs of a model (`name` or `name@hash`) and its weight.
    """

    name: str
    targets: tuple[tuple[str, float], ...]

    @classmethod
    def from_text(cls, text: str) -> Alias:
        """Parse `NAME=MODEL:WEIGHT,...`; a missing weight is 1. Raises ValueError."""
        match = _ALIAS.fullmatch(text.strip())
        if match is None:
            raise ValueError(text)
        targets = {}
        for part in match[2].split(","):
            target = _TARGET.fullmatch(part.strip())
            weight = float(target[2] or 1) if target else 0.0
            if target is None or not 0 < weight < math.inf or target[1] in targets:
                raise ValueError(text)
            targets[target[1]] = weight
        return cls(match[1], tuple(targets.items()))

    def pick_target(self, key: str) -> str:
        """The model for a key. A key has the same model in every call and after a restart.

        A hash of key and model gives each model an exponentially distributed waiting time, with the
        model's weight as the rate. The model with the shortest time is chosen (Efraimidis and
        Spirakis 2006). So when weights change, as few keys as possible get another model.
        """
        return min(self.targets, key=lambda target: _wait(key, *target))[0]

    @property
    def shares(self) -> str:
        """The targets as text, in the form that `from_text` reads after the `=`."""
        return ",".join(f"{name}:{weight:g}" for name, weight in self.targets)


def _wait(key: str, target: str, weight: float) -> float:
    digest = blake2b(f"{target}\0{key}".encode(), digest_size=8).digest()
    uniform = ((int.from_bytes(digest, "big") >> 11) + 0.5) / (1 << 53)
    return -math.log(uniform) / weight
