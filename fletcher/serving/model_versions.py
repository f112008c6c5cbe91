"""One version of a model on a server: what it is, whether it runs, and who holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fletcher.core.schema import VectorSpec
from fletcher.errors import FletcherError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.pipeline.embedder import Embedder
from fletcher.pipeline.input.limits import IntakeLimits

State = Literal["configured", "loading", "ready", "retiring", "gone"]


@dataclass(frozen=True, slots=True)
class ServedModel:
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

    def half(self, spec: VectorSpec) -> bool:
        """Whether such vectors can be float16 all the way: nothing is done to them here."""
        return (
            spec.dtype == "float16"
            and spec.output == "dense"
            and spec.chunking is None
            and (spec.dims, spec.normalized) == (self.bundle.dim, self.bundle.normalize)
            and not self.embedder.keeps_vectors
        )


class ModelSource(Protocol):
    """Where models come from."""

    def find_bundle(self, name: str) -> ModelBundle:
        """What is installed under a `name` or `name@hash`.

        Raises:
            UnknownModelError: Nothing is.
            ModelError: It is damaged.
        """
        ...

    def load_model(self, bundle: ModelBundle) -> ServedModel:
        """Starts and warms a model.

        Raises:
            FletcherError: It is gone, damaged or does not run here; nothing is left.
        """
        ...


@dataclass(slots=True, eq=False)
class Version:
    """A bundle and what this server has of it; guarded by its owner's lock.

    Attributes:
        state: `configured`: not loaded, until somebody asks for it; `loading`; `ready`;
            `retiring`: takes no new calls, and is closed when its last one has ended; `gone`.
        model: What runs; None where nothing does.
        num_calls: Calls that hold it.
        last_used: When one last began or ended, by the owner's clock.
        memory_bytes: What its processes took when they were last measured; 0: never.
        measured: When that was.
        keep: Once retired it is `configured`, not `gone`.
        closing: Its processes are being ended.
        failure: What callers are told of why it could not be loaded.
        cause: What it was.
        failed_until: Until when nobody tries again.
    """

    bundle: ModelBundle
    state: State = "configured"
    model: ServedModel | None = None
    num_calls: int = 0
    last_used: float = 0.0
    memory_bytes: int = 0
    measured: float = float("-inf")
    keep: bool = True
    closing: bool = False
    failure: FletcherError | None = None
    cause: Exception | None = None
    failed_until: float = float("-inf")

    @property
    def name(self) -> str:
        """`name@hash`."""
        return self.bundle.qualified_name

    @property
    def idle(self) -> bool:
        """It runs and nobody holds it."""
        return self.state == "ready" and not self.num_calls

    def is_outdated(self, installed: ModelBundle) -> bool:
        """Whether it runs with other exits or int8 ranges than the same version has by now."""
        running = self.model
        return (
            running is not None
            and not self.closing
            and _beside_hash(running.bundle) != _beside_hash(installed)
        )

    @property
    def needed_bytes(self) -> int:
        """What it takes, or at least: as measured, and before that the size of its files."""
        return self.memory_bytes or self.bundle.num_bytes


def _beside_hash(bundle: ModelBundle) -> tuple[object, ...]:
    """What can change while a bundle's hash, which is of its whole vectors, stays."""
    return bundle.layers, {cut: one.hash for cut, one in bundle.calibration.ranges.items()}
