"""Self-check of the chosen engine: its vectors of sample texts against float32.

An engine that computes other vectors than float32 must not serve a model, however fast it is. The
check runs once for each combination of bundle, engine, precision, device, processor and versions.
Its result is kept in FLETCHER_HOME/tune/checks.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fletcher.config.engine import EngineConfig
from fletcher.core.batches import (
    FloatArray,
    InferenceResult,
    Int32Array,
    MicroBatch,
    TextBatch,
)
from fletcher.errors import BackendError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.budget import load_engine
from fletcher.inference.host import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.tokenization.tokenizer import Tokenizer
from fletcher.tuning.decision import CheckResult, Decision
from fletcher.tuning.record import Key
from fletcher.tuning.replica_group import ReplicaGroup
from fletcher.tuning.sample_texts import shipped_texts
from fletcher.tuning.trials import FLOOR_FLOAT32, FLOOR_OTHERS
from fletcher.util.durable import write_atomically
from fletcher.vectors.ragged import starts_of

log = logging.getLogger(__name__)

# Tokens of the sample texts. bfloat16 has all integers up to 256.
_LENGTHS = (8, 288)


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Check of engines against float32 for one host.

    Attributes:
        isolated: Run engines in child processes only. GPUs are always used by child processes.
    """

    home: Path
    host: HostInfo
    isolated: bool = False

    def checked(self, decision: Decision, asked: EngineConfig, bundle: ModelBundle) -> Decision:
        """Check the engine of a decision; return the decision, or one for float32.

        Raises:
            BackendError: The vectors are wrong, and the options ask for this precision, or it is
                float32 already.
            FletcherError: An engine cannot run the model.
        """
        config = decision.configs[0]
        result = self.check_engine(config, bundle)
        if result is None or result.passed:
            return replace(decision, check=result)
        engine = f"{config.backend} {config.precision} on {config.device}"
        log.error("%s: %s gives %s", bundle.qualified_name, engine, result)
        if config.precision in ("float32", asked.precision):
            raise BackendError(
                f"{engine} gives wrong vectors for {bundle.name}: the lowest cosine of a sample "
                f"text to {result.reference} is {result.lowest_cosine:.4f}, expected at least "
                f"{result.floor}; ask for another `precision` or `backend`",
                field="precision",
                allowed=["auto", "float32"],
            )
        configs = [replace(one, precision="float32") for one in decision.configs]
        reason = (
            f"{config.backend} float32 on {config.device}, because {config.precision} gives wrong "
            f"vectors for this model (lowest cosine {result.lowest_cosine:.4f})"
        )
        log.warning("%s: %s", bundle.qualified_name, reason)
        return self.checked(Decision(configs, reason), asked, bundle)

    def check_engine(self, config: BackendConfig, bundle: ModelBundle) -> CheckResult | None:
        """Result for an engine, from an earlier check if possible.

        Returns None if there is nothing to compare: the engine runs no model, or is the reference.

        Raises:
            FletcherError: An engine cannot run the model.
        """
        reference = _reference(config, self.host)
        if config.backend == "null" or reference is None:
            return None
        path = self._path(config, bundle)
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(path.read_bytes(), type=CheckResult)
        rows = check_rows(bundle)
        expected = self._vectors(reference, bundle, [[row] for row in rows])
        # The short text with padding and in company, then alone.
        found = self._vectors(config, bundle, [rows, rows[:1]])
        cosine = lowest_cosine(found, [*expected, expected[0]])
        exact = config.precision == "float32" and config.device == "cpu"
        result = CheckResult(
            lowest_cosine=cosine,
            floor=FLOOR_FLOAT32 if exact else FLOOR_OTHERS,
            reference=f"{reference.backend} float32",
            checked_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, msgspec.json.encode(result).decode() + "\n", unique=True)
        except OSError as error:
            log.warning("a self-check cannot be kept, so it runs at each start: %s", error)
        return result

    def _path(self, config: BackendConfig, bundle: ModelBundle) -> Path:
        key = Key.for_question(EngineConfig(), self.host, bundle)
        kind = config.device.partition(":")[0]
        about: list[Any] = [key.host, key.holds, config.backend, kind, config.precision, _LENGTHS]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        return self.home / "tune" / "checks" / f"{bundle.name}-{digest}.json"

    def _vectors(
        self, config: BackendConfig, bundle: ModelBundle, runs: Sequence[Sequence[Int32Array]]
    ) -> list[FloatArray]:
        """Vectors of each row of each run, float32 [num_vectors, width]."""
        batches = [_batch(rows) for rows in runs]
        # Few tokens, so that the warm-up is short.
        small = replace(config, bundle=str(bundle.folder), max_batch_tokens=16, cuda_graphs=False)
        if self.isolated or config.device.startswith("cuda"):
            with contextlib.closing(ReplicaGroup([small])) as group:
                results, _ = group.embed_batches(batches)
        else:
            engine = load_engine(replace(small, threads=1))
            results = [engine.run(batch) for batch in batches]
        pairs = zip(results, batches, strict=True)
        return [row for one, batch in pairs for row in _rows(one, len(batch.lengths), bundle)]


def _reference(config: BackendConfig, host: HostInfo) -> BackendConfig | None:
    """Engine to compare with, in float32 on the CPU; None if `config` is that engine."""
    backend = "onnxruntime" if host.onnxruntime and not host.cuda_provider else "openvino"
    if backend == "openvino" and not host.openvino:
        backend = "onnxruntime"
    if (config.backend, config.precision, config.device) == (backend, "float32", "cpu"):
        return None
    return BackendConfig(backend=backend, device="cpu", bundle=config.bundle)


def check_rows(bundle: ModelBundle) -> list[Int32Array]:
    """Token ids of the sample texts, a short and a long one."""
    text = " ".join(shipped_texts())[: 16 * max(_LENGTHS)].encode()
    tokenizer = Tokenizer.from_bundle(bundle.folder)
    lengths = [min(length, bundle.max_length) for length in _LENGTHS]
    offsets = np.array([0, len(text)])
    return [
        tokenizer.encode(TextBatch(text, offsets, max_length=length)).input_ids
        for length in lengths
    ]


def lowest_cosine(found: Sequence[FloatArray], expected: Sequence[FloatArray]) -> float:
    """Lowest cosine of two vectors at one place; -1 for a missing or infinite one."""
    lowest = 1.0
    for vectors, right in zip(found, expected, strict=True):
        if vectors.shape != right.shape or not np.isfinite(vectors).all():
            return -1.0
        norms = np.linalg.norm(vectors, axis=1), np.linalg.norm(right, axis=1)
        # Two vectors of zeros, as of a sparse model, are equal.
        cosines = ((norms[0] == 0) & (norms[1] == 0)).astype(np.float32)
        products, lengths = (vectors * right).sum(axis=1), norms[0] * norms[1]
        np.divide(products, lengths, out=cosines, where=lengths > 0)
        lowest = min(lowest, float(cosines.min(initial=1.0)))
    return lowest


def _batch(rows: Sequence[Int32Array]) -> MicroBatch:
    lengths = np.array([len(row) for row in rows], np.int32)
    return MicroBatch(np.concatenate(rows).astype(np.int32), lengths)


def _rows(result: InferenceResult, num_rows: int, bundle: ModelBundle) -> list[FloatArray]:
    """Each row's vectors. The weights of a sparse row become one vector."""
    embeddings = np.asarray(result.embeddings, np.float32)
    counts = result.counts
    if counts is None:
        return [embeddings[row : row + 1] for row in range(num_rows)]
    starts = starts_of(counts)
    rows = [embeddings[start : start + count] for start, count in zip(starts, counts, strict=True)]
    if bundle.output != "sparse":
        return rows
    dense = np.zeros((num_rows, bundle.dim), np.float32)
    for row, pairs in enumerate(rows):
        dense[row, pairs[:, 0].astype(np.int64)] = pairs[:, 1]
    return [dense[row : row + 1] for row in range(num_rows)]
