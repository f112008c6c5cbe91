"""Versions of models on a server: bundle, state and processes."""

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
    """A running model."""

    bundle: ModelBundle
    embedder: Embedder
    engine: Mapping[str, Any]  # how the engine of its replicas was chosen, for `stats`
    limits: IntakeLimits  # limits of row slices, which depend on the vectors' width
    is_null: bool = False  # its vectors are made without the model

    def gives_float16(self, spec: VectorSpec) -> bool:
        """Whether the model may output float16, as nothing else changes its vectors."""
        return (
            spec.dtype == "float16"
            and spec.output == "dense"
            and spec.chunking is None
            and (spec.dims, spec.normalized) == (self.bundle.dim, self.bundle.normalize)
            and not self.embedder.keeps_vectors
        )


class ModelSource(Protocol):
    """Installed models, and the means to run them."""

    def find_bundle(self, name: str) -> ModelBundle:
        """The bundle of `name` or `name@hash`. Raises UnknownModelError, ModelError."""
        ...

    def load_model(self, bundle: ModelBundle) -> ServedModel:
        """Start and warm up a model's processes; after an error, no process is left."""
        ...


@dataclass(slots=True, eq=False)
class ModelVersion:
    """A bundle and its processes; guarded by `ModelLifecycle.changed`."""

    bundle: ModelBundle
    state: State = "configured"
    model: ServedModel | None = None  # its processes, if there are any
    num_calls: int = 0  # calls that hold the version
    last_used: float = 0.0  # when a call last began or ended, by the lifecycle's clock
    memory_bytes: int = 0  # memory of its processes when last measured; 0: never measured
    measured: float = float("-inf")  # time of the last measurement
    returns: bool = True  # whether it is `configured` after retiring, or `gone`
    closing: bool = False  # its processes are being closed
    failure: FletcherError | None = None  # told to callers if it could not be loaded
    cause: Exception | None = None  # why it could not be loaded
    failed_until: float = float("-inf")  # time until which calls do not load it again

    @property
    def name(self) -> str:
        """Name of the version: `name@hash`."""
        return self.bundle.qualified_name

    @property
    def idle(self) -> bool:
        """Whether the version is ready and no call holds it."""
        return self.state == "ready" and not self.num_calls

    @property
    def is_leaving(self) -> bool:
        """Whether the version is retiring and cannot be loaded again by a call."""
        return self.state == "retiring" and not self.returns

    def is_outdated(self, installed: ModelBundle) -> bool:
        """Whether exits or int8 ranges of the running version differ from `installed`."""
        running = self.model
        return (
            running is not None
            and not self.closing
            and _outside_hash(running.bundle) != _outside_hash(installed)
        )

    @property
    def needed_bytes(self) -> int:
        """Measured memory of the processes; before a measurement, the size of the files."""
        return self.memory_bytes or self.bundle.num_bytes


def _outside_hash(bundle: ModelBundle) -> tuple[object, ...]:
    """Properties that the bundle's hash does not cover."""
    return bundle.layers, {cut: one.hash for cut, one in bundle.calibration.ranges.items()}
