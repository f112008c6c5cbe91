"""Two servers in this process, one with an embedding cache."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pyarrow as pa
from pyarrow import flight

from fletcher.config.server import ServeConfig
from fletcher.models.bundle.registry import Registry
from fletcher.runtime import Runtime
from fletcher.stores.address import open_store
from tests.conftest import GOLDEN
from tests.faults.cache_calls import MAX_ROW_BYTES, Server

_MODELS = ("tiny", "shallow")


def exit_models(home: Path) -> Path:
    """Add a model that normalises, and one with an exit; returns `home`."""
    registry = Registry(home / "models")
    registry.add_model(str(GOLDEN / "tiny"), progress=lambda _: None)
    registry.add_model(str(GOLDEN / "tiny"), name="shallow", exits=[1], progress=lambda _: None)
    return home


class Pair:
    """The two servers.

    Args:
        home: A home with the models of `exit_models`.
        folder: Empty folder for vectors, journals and the cache.
        kind: Where the cache keeps its entries: memory or disk.
        backend: The engine.
    """

    def __init__(self, home: Path, folder: Path, *, kind: str, backend: str) -> None:
        self.models = _MODELS
        self._home = home
        self._folder = folder
        self._kind = kind
        self._backend = backend

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            cache: dict[str, object] = {"embedding_cache": 64 << 20}
            if self._kind == "disk":
                cache["embedding_cache_dir"] = self._folder / "cache"
            self.cached, self._runtime = self._start(stack, "cached", cache)
            self.plain, _ = self._start(stack, "plain", {})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def num_hits(self) -> int:
        """Number of texts that the cache had."""
        return int(self._runtime.service.telemetry.snapshot()["fletcher.cache.hits"])

    def _start(
        self, stack: ExitStack, name: str, more: dict[str, object]
    ) -> tuple[Server, Runtime]:
        home, vectors = self._folder / name, self._folder / f"{name}-vectors"
        home.mkdir()
        (home / "models").symlink_to(self._home / "models")
        fields: dict[str, object] = {
            "port": 0,
            "home": home,
            "model": _MODELS[0],
            "models": list(_MODELS),
            "backend": self._backend,
            "precision": "auto" if self._backend == "null" else "float32",
            "store": (f"parquet:{vectors}",),
            "group_delay_ms": 1,
            "drain_timeout": 5,
            "allow_undeclared": True,
            "tokenizer_workers": 1,
            "max_row_bytes": MAX_ROW_BYTES,
        }
        config = ServeConfig.from_options(**{**fields, **more})
        runtime = stack.enter_context(Runtime(config))
        client = stack.enter_context(flight.connect(runtime.address))
        store = open_store(f"parquet:{vectors}")
        stack.callback(store.close)

        def read(dataset: str) -> pa.Table | None:
            runtime.service.delivery.flush(20.0)
            if store.dataset(dataset) is None:
                return None
            return store.scan(dataset).read_all()

        return Server(client, read), runtime
