"""Counts of the runs on each device of one model."""

from __future__ import annotations

import logging
from collections import defaultdict

from fletcher.core.batches import InferenceResult, Int32Array
from fletcher.telemetry.tracing import Telemetry
from fletcher.telemetry.utilization import Utilization

log = logging.getLogger(__name__)


class DeviceUsage:
    """Counters of each device's work, by the name of the device's replica."""

    def __init__(self, telemetry: Telemetry, model: str) -> None:
        self._telemetry = telemetry
        self._model = model
        self._budgets: dict[str, int] = {}
        self._busy: defaultdict[str, Utilization] = defaultdict(Utilization)

    def budget(self, device: str) -> int:
        """Padded tokens that a device last said it takes in one run; 0 if unknown."""
        return self._budgets.get(device, 0)

    def busy(self, device: str) -> Utilization:
        """Utilization of a device: the share of time in which it computes."""
        return self._busy[device]

    def count_run(self, device: str, lengths: Int32Array, result: InferenceResult) -> None:
        """Counts one run; `lengths` is int32 [num_rows], each row's number of tokens."""
        telemetry, labels = self._telemetry, {"model": self._model, "device": device}
        telemetry.stage_duration.record(result.compute_s, stage="inference")
        telemetry.device_batches.add(1, **labels)
        telemetry.device_tokens.add(int(lengths.sum()), **labels)
        telemetry.device_padded_tokens.add(int(lengths.max()) * len(lengths), **labels)
        telemetry.device_busy.add(result.compute_s, **labels)
        self._busy[device].record_run(result.compute_s)
        if not result.budget_tokens:
            return
        before, self._budgets[device] = self.budget(device), result.budget_tokens
        if result.budget_tokens < before:
            log.warning(
                "%s has too little memory for %d tokens in one run; it gets %d, and slowly more",
                *(device, before, result.budget_tokens),
            )
