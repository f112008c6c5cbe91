"""Loading of a model: engine, worker processes, batching and limits for a bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from fletcher.config.engine import EngineConfig
from fletcher.config.model import CacheConfig
from fletcher.config.server import LimitsConfig, ServeConfig
from fletcher.errors import BackendError
from fletcher.inference.backend import BackendConfig
from fletcher.inference.budget import load_inline
from fletcher.inference.devices import resolve_replicas
from fletcher.inference.host import HostInfo
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.models.bundle.registry import Registry
from fletcher.pipeline.cache import CacheBackend, EmbeddingCache, MemoryCache
from fletcher.pipeline.disk_cache import DiskCache
from fletcher.pipeline.embedder import Embedder, ModelProcesses, SharedResources
from fletcher.pipeline.input.limits import COLUMN_BYTES, MAX_SLICE_ROWS, IntakeLimits
from fletcher.pipeline.interactive.path import InlineModel, Run
from fletcher.pipeline.memory_budget import MemoryBudget
from fletcher.pipeline.planner import MAX_BATCH_ROWS, plan
from fletcher.pipeline.scheduler import BatchingConfig, ModelShape
from fletcher.serving.model_versions import ServedModel
from fletcher.telemetry.tracing import Telemetry
from fletcher.tokenization.null import NullTokenizer
from fletcher.tokenization.tokenizer import Tokenizer
from fletcher.tokenization.worker import TokenizerConfig
from fletcher.tuning.decision import Decision, decide
from fletcher.tuning.self_check import SelfCheck
from fletcher.workers.messages import WorkerSpec

log = logging.getLogger(__name__)

# Runs per batch window. At this number, padding costs 1-2% on the corpus (docs/lab-book.md).
_WINDOW_RUNS = 64


@dataclass(frozen=True, slots=True)
class ModelLoader:
    """The `ModelSource` of a server: each model has its own workers."""

    config: ServeConfig
    host: HostInfo
    budget: MemoryBudget
    telemetry: Telemetry
    under_pressure: Callable[[], bool]  # whether batch windows should be larger
    backend: CacheBackend | None  # storage of the embedding cache, if there is one

    @property
    def _registry(self) -> Registry:
        return Registry(self.config.home / "models")

    def find_bundle(self, name: str) -> ModelBundle:
        return self._registry.get_model(name)

    def load_model(self, bundle: ModelBundle) -> ServedModel:
        # Verify the files: a flipped bit in the weights would give plausible but wrong vectors.
        bundle = self._registry.verify_model(bundle.qualified_name)
        decision, standby = _decide(self.config, bundle, self.host)
        check = SelfCheck(self.config.home, self.host, self.config.workers.isolate_engine)
        decision = check.checked(decision, self.config.engine, bundle)
        embedder = self._embedder(bundle, decision.configs, standby)
        embedder.start()
        limits = _limits(self.config.limits, bundle, self.budget.reserve_bytes)
        is_null = self.config.engine.backend == "null"
        return ServedModel(bundle, embedder, decision.describe(), limits, is_null)

    def _embedder(
        self, bundle: ModelBundle, replicas: list[BackendConfig], standby: list[BackendConfig]
    ) -> Embedder:
        config = self.config
        num_tokenizers = config.workers.tokenizer_workers or _tokenizers(self.host.cores, replicas)
        null, isolated = config.workers.tokenizer == "null", config.workers.isolate_engine
        tokenizer_factory = f"fletcher.tokenization.{'null' if null else 'worker'}:load"
        tokenizer_config = TokenizerConfig(str(bundle.folder), bundle.hash)
        engines = [replace(one, version=bundle.hash) for one in (*replicas, *standby)]
        specs = [
            WorkerSpec(f"{one.device.replace(':', '-')}-{n}", "fletcher.inference.budget:load", one)
            for n, one in enumerate(engines)
        ]
        max_batch_tokens = engines[0].max_batch_tokens
        return Embedder(
            ModelShape(bundle.width, bundle.num_layers, bundle.qualified_name),
            ModelProcesses(
                tokenizers=[
                    WorkerSpec(f"tokenizer-{n}", tokenizer_factory, tokenizer_config)
                    for n in range(num_tokenizers)
                ],
                replicas=specs[: len(replicas)],
                standby=specs[len(replicas) :],
                options=config.workers,
            ),
            BatchingConfig(
                plan=lambda lengths, num_runners: plan(
                    lengths,
                    max_batch_tokens=max_batch_tokens,
                    max_batch_rows=MAX_BATCH_ROWS,
                    num_runners=num_runners,
                ),
                window_tokens=_WINDOW_RUNS * max_batch_tokens,
                max_queue_delay_s=config.workers.max_queue_delay_ms / 1000,
                under_pressure=self.under_pressure,
            ),
            SharedResources(self.budget, self.telemetry, self._cache(bundle, engines)),
            InlineModel() if isolated else _inline_model(bundle, null, engines[0]),
        )

    def _cache(self, bundle: ModelBundle, replicas: list[BackendConfig]) -> EmbeddingCache | None:
        if self.backend is None or bundle.output != "dense":  # all entries have one size
            return None
        # Vectors differ in their last digits between engines and between precisions.
        engines = {
            f"{one.backend} {one.device.partition(':')[0]} {one.precision}" for one in replicas
        }
        # Another version of Fletcher may have written another graph for the same model.
        graphs = sorted(bundle.graph_digests().values())
        scope = [bundle.qualified_name, self.config.workers.tokenizer, *sorted(engines), *graphs]
        return EmbeddingCache(scope, bundle.dim, self.backend, self.telemetry)


def _inline_model(bundle: ModelBundle, null: bool, replica: BackendConfig) -> InlineModel:
    """Copies of the tokenizer and of a replica's engine for the front process."""

    def load() -> Run | None:
        backend = load_inline(replica)
        return None if backend is None else backend.run

    tokenizer = (NullTokenizer if null else Tokenizer).from_bundle(bundle.folder)
    return InlineModel(tokenizer.encode, load)


def open_cache_backend(config: CacheConfig) -> CacheBackend | None:
    """Storage of the embedding cache, if any. Raises ConfigError for a bad folder."""
    if not config.max_bytes:
        return None
    if config.folder is None:
        return MemoryCache(config.max_bytes)
    return DiskCache(config.folder, config.max_bytes)


def _decide(
    config: ServeConfig, bundle: ModelBundle, host: HostInfo
) -> tuple[Decision, list[BackendConfig]]:
    """The replicas to run, and standby replicas for the time when no GPU works."""
    try:
        decision = decide(config.home, config.engine, host, bundle)
    except BackendError as error:
        if config.workers.device_fallback == "none" or not config.engine.device.startswith("cuda"):
            raise
        log.warning("%s; the CPU takes over", error)
        return _on_cpu(config.engine, bundle, host), []
    log.info("%s: %s", bundle.qualified_name, decision.reason)
    on_gpu = any(one.device.startswith("cuda") for one in decision.configs)
    if not (on_gpu and config.workers.device_fallback == "cpu"):
        return decision, []
    return decision, _on_cpu(config.engine, bundle, host).configs


def _on_cpu(config: EngineConfig, bundle: ModelBundle, host: HostInfo) -> Decision:
    """Replicas on the CPU in place of a GPU.

    They use float32, which gives the vectors that are nearest to the GPU's.
    """
    backend = "null" if config.backend == "null" else "auto"
    asked = EngineConfig(device="cpu", backend=backend, precision="float32", threads=config.threads)
    rule = resolve_replicas(asked, host, bundle)
    log.info("%s, when no GPU is left: %s", bundle.qualified_name, rule.reason)
    return Decision(rule.configs, rule.reason)


def _tokenizers(cores: int, replicas: list[BackendConfig]) -> int:
    """Number of tokenizer processes.

    One process tokenizes 8,000 texts/s. A GPU needs tokenizers on nearly all cores.
    """
    on_gpu = any(one.device.startswith("cuda") for one in replicas)
    return max(1, cores - 1) if on_gpu else max(1, cores // 8)


def _limits(config: LimitsConfig, bundle: ModelBundle, reserve_bytes: int) -> IntakeLimits:
    """Limits of row slices, which must fit into the memory reserved for a stream."""
    # A row's vectors in float32, both in the batch window and as output, and the small columns.
    bytes_per_row = 8 * bundle.width * bundle.max_vectors + COLUMN_BYTES
    slice_bytes = reserve_bytes // 8  # a text is held up to three times: 3/8 of the reserve
    return IntakeLimits(
        max_message_bytes=config.max_message_bytes,
        max_row_bytes=config.max_row_bytes,
        slice_rows=max(16, min(MAX_SLICE_ROWS, reserve_bytes // 2 // bytes_per_row)),
        slice_bytes=max(4096, slice_bytes),
        # If rows have several vectors, no table of vectors by dictionary value is kept.
        table_values=32 * 2**20 // (4 * bundle.dim) if bundle.output == "dense" else 0,
        bytes_per_row=bytes_per_row,
    )
