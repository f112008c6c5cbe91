"""A name that stands for several models, each with a share of the traffic."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import blake2b

# Where names of models are listed: all that are installed.
ANY_MODEL = "*"
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ALIAS = re.compile(rf"({MODEL_NAME})=(.+)", re.DOTALL)
_TARGET = re.compile(rf"({MODEL_NAME}(?:@[0-9a-f]+)?)(?::([0-9.]+))?")


@dataclass(frozen=True, slots=True)
class Alias:
    """Which model a call gets that asks for `name`.

    Attributes:
        name: What callers ask for.
        targets: Models, as `name` or `name@hash`, and their weights, all positive.
    """

    name: str
    targets: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Alias:
        """`NAME=MODEL:WEIGHT,MODEL:WEIGHT`; a weight that is left out is 1. Raises ValueError."""
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

    def pick(self, key: str) -> str:
        """The model of whatever `key` names: the same key gets the same, over restarts as well.

        Where weights change, only as many keys as must get another model: each draws for every
        model, from the key, a waiting time of that rate, and takes the first (Efraimidis and
        Spirakis 2006, for one).
        """
        return min(self.targets, key=lambda target: _wait(key, *target))[0]

    @property
    def shares(self) -> str:
        """The targets as `parse` reads them."""
        return ",".join(f"{name}:{weight:g}" for name, weight in self.targets)


def _wait(key: str, target: str, weight: float) -> float:
    digest = blake2b(f"{target}\0{key}".encode(), digest_size=8).digest()
    uniform = ((int.from_bytes(digest, "big") >> 11) + 0.5) / (1 << 53)
    return -math.log(uniform) / weight
