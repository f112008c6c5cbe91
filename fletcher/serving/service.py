"""Parts of a running server that calls use, and their statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fletcher.config.model import OutputConfig
from fletcher.delivery.delivery import Delivery
from fletcher.net.compression import AnswerCompression
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.serving.admission import Admission
from fletcher.serving.load_level import LoadMonitor
from fletcher.serving.model_manager import ModelManager
from fletcher.serving.model_versions import ServedModel
from fletcher.telemetry.tracing import Telemetry


@dataclass(frozen=True, slots=True)
class Service:
    """Parts of a running server that calls use."""

    models: ModelManager
    budget: MemoryBudget  # memory of all streams
    delivery: Delivery
    admission: Admission
    answers: AnswerCompression
    load: LoadMonitor
    telemetry: Telemetry
    outputs: OutputConfig  # vectors that commands may ask for

    def statistics(self) -> dict[str, Any]:
        """The `stats` action's answer: instruments, models, stores and workers."""
        default, running = self.models.default, self.models.running()
        engines = {name: dict(model.engine) for name, model in running.items()}
        return {
            "model": default.name,
            "models": self.models.describe(),
            "aliases": self.models.aliases(),
            "engine": engines.get(default.name, {}),
            "engines": engines,
            "draining": self.admission.draining.is_set(),
            "pressure": self.load.statistics(),
            "stores": self.delivery.statistics(),
            **self.telemetry.snapshot(),
            "memory": self.budget.statistics(),
            "tokenizers": _workers(running, "tokenizers"),
            "replicas": _workers(running, "replicas"),
        }


def _workers(running: dict[str, ServedModel], kind: str) -> list[dict[str, Any]]:
    """Statistics of all models' `tokenizers` or `replicas`."""
    return [
        {"model": name, **worker}
        for name, model in running.items()
        for worker in model.embedder.statistics()[kind]
    ]
