"""The models of a server, and who uses which: a call holds the one it began with until it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fletcher.errors import UnknownModelError
from fletcher.models.bundle import ModelBundle
from fletcher.pipeline.embedder import Embedder
from fletcher.pipeline.intake import IntakeLimits


@dataclass(frozen=True, slots=True)
class Model:
    """A model that runs.

    Attributes:
        bundle: What it is.
        embedder: Its pipeline.
        engine: What `stats` says of how the replicas' engine was chosen.
        limits: Pieces that its vectors' width allows.
    """

    bundle: ModelBundle
    embedder: Embedder
    engine: Mapping[str, Any]
    limits: IntakeLimits


class Models:
    """Hands out leases of models. Thread-safe.

    Args:
        model: The one that is served.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._num_calls = 0
        self._changed = threading.Condition()

    @property
    def default(self) -> Model:
        """What runs where a command names no model."""
        return self._model

    def find(self, name: str | None) -> ModelBundle:
        """What a command's `model` means.

        Raises:
            UnknownModelError: Another model than the one that is served.
        """
        bundle = self._model.bundle
        known = [bundle.name, bundle.qualified_name]
        if name not in (None, *known):
            raise UnknownModelError(
                f"`model` is {name!r}, but this server runs {bundle.qualified_name}",
                field="model",
                allowed=known,
            )
        return bundle

    def queued_windows(self) -> float:
        """Tokens that wait to be planned, in windows."""
        return self._model.embedder.queued_windows()

    @contextmanager
    def lease(self, name: str | None) -> Iterator[Model]:
        """The model of that name, which stays as it is while the body runs.

        Raises:
            UnknownModelError: There is none.
        """
        self.find(name)
        with self._changed:
            self._num_calls += 1
        try:
            yield self._model
        finally:
            with self._changed:
                self._num_calls -= 1

    def close(self) -> None:
        """Ends all workers. Idempotent."""
        self._model.embedder.close()
