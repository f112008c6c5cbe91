"""Replicas that die or fail at one token; `load_poisoned` makes them in a worker process."""

from __future__ import annotations

import os
import signal

from fletcher.core.batches import InferenceResult, MicroBatch
from fletcher.errors import BackendError
from fletcher.inference.null import NullBackend

POISON = 666


class PoisonedReplica(NullBackend):
    """The null backend, except for batches with the token `POISON`."""

    def __init__(self, outcome: str) -> None:
        super().__init__(dim=16)
        self._outcome = outcome

    def run(self, batch: MicroBatch) -> InferenceResult:
        if POISON in batch.input_ids:
            if self._outcome == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise BackendError("the engine failed")
        return super().run(batch)


def load_poisoned(outcome: str) -> PoisonedReplica:
    return PoisonedReplica(outcome)
