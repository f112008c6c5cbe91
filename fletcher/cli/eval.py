"""`fletcher eval`: measure the loss of quality by engine, depth, width and type."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fletcher.cli.command_line import command, option
from fletcher.cli.connection import EmbedTarget, target_options
from fletcher.cli.options import INPUT, format_option, json_option, paths_argument
from fletcher.cli.terminal import say
from fletcher.config.delivery import NO_STORE
from fletcher.config.server import ServeConfig
from fletcher.errors import ConfigError

if TYPE_CHECKING:
    from fletcher.client import Client
    from fletcher.config.engine import EngineConfig
    from fletcher.evaluation.evaluate import EvaluationReport
    from fletcher.evaluation.variants import Engine, Variant

# Bytes of an embedding cache entry in addition to the numbers of its vector, rounded up.
_CACHE_ENTRY_BYTES = 1024


@command(
    "eval",
    "fletcher eval corpus.parquet --query title --document body --documents 5000 --queries 1000",
    "fletcher eval corpus.parquet --query title --document body --variants 'dims=384,128'",
)
@paths_argument()
@option("--query COLUMN", required=True, heading=INPUT)
@option("--document COLUMN", required=True, heading=INPUT)
@format_option("files")
@option("--documents N", heading=INPUT)
@option("--queries N", default=1000, heading=INPUT)
@option("--variants LIST", multiple=True)
@json_option("Print one JSON object instead of the table.")
@option("--output FILE")
@option("--plot FILE")
@target_options("model", "allow_undeclared", "int8", model="Model to measure.")
def cli(
    target: EmbedTarget,
    paths: tuple[str, ...],
    query: str,
    document: str,
    format_name: str | None,
    variants: tuple[str, ...],
    **params: Any,
) -> None:
    """Measure the cost in quality of precision, depth, width and type.

    Each row of the files is a pair of a query and the document that it should find. Rows that
    repeat an earlier query or document are left out. The command embeds the pairs in several
    variants. For each variant it measures how well queries find their documents, how far the
    vectors are from float32 vectors, how fast they are computed, and their size. Speeds are only
    meaningful on a machine that does nothing else meanwhile.

    Args:
        query: Column of queries, such as titles.
        document: Column of the documents to find, such as bodies.
        documents: Number of documents to embed. They are chosen at random, the same ones on every
            run. More documents make the search harder, and take longer. Default: all.
        queries: Number of queries to ask. More queries make the confidence intervals narrower, and
            take longer.
        variants: Combinations to compare, such as 'backend=openvino precision=bfloat16,float32
            dims=384,128 dtype=float32,float16'; repeatable. Keys: backend, precision, layers, dims,
            dtype, chunking (of documents, whose chunks must be aggregated to one vector). Default:
            every engine on this machine, the layers and widths that the model declares, and all
            types.
        output: File to write the JSON object to, in addition to the table.
        plot: PNG file for a plot of quality against cost.
    """
    from fletcher.evaluation import plot
    from fletcher.evaluation.evaluate import evaluate
    from fletcher.evaluation.pairs import read_pairs
    from fletcher.evaluation.variants import parse_variants

    for name in ("documents", "queries"):
        value = params[name]
        if value is not None and value < 2:
            raise ConfigError(f"`{name}` is {value}, expected 2 or more", field=name)
    for name in ("output", "plot"):
        _check_folder(name, params[name])
    if params["plot"]:
        plot.check_matplotlib()
    config = target.resolve(store=NO_STORE)
    engines = _Engines(target, config)
    asked = [one for text in variants for one in parse_variants(text, engines.usual)]
    engines.check_variants(asked)
    pairs = read_pairs(
        paths,
        query_column=query,
        document_column=document,
        format_name=format_name,
        num_documents=params["documents"],
        num_queries=params["queries"],
        notice=say,
    )
    engines.num_texts = len(pairs.documents) + len(pairs.queries)
    found = evaluate(
        pairs,
        engines.reference,
        engines.usual,
        asked or None,
        engines.open_client,
        say,
        model_name=target.asked_model,
    )
    _print(found, **{name: params[name] for name in ("as_json", "output", "plot")})


class _Engines:
    """Engines that can run the model: on this machine, or on the remote server.

    Attributes:
        reference: Engine that computes the reference vectors: float32 on the CPU. For a remote
            server and for the backend `null`, the first of `usual`.
        usual: All engines. The first one is the engine that a server would choose.
        num_texts: Number of texts that the embedding cache of a server in this process should hold.
    """

    def __init__(self, target: EmbedTarget, config: ServeConfig) -> None:
        from fletcher.client.prompts import served_model
        from fletcher.evaluation.variants import Engine

        self._target, self._config = target, config
        self.num_texts = 0
        if target.server:
            with target.open_client(config) as client:
                model = served_model(client, target.asked_model)
                name = f"{model['name']}@{model['hash']}"
                replicas = [one for one in client.stats()["replicas"] if one["model"] == name]
            if not replicas:
                raise ConfigError(
                    f"`model` {name} is not loaded now by {target.server.uri}; "
                    f"`fletcher model load {name} --server {target.server.uri}` does that",
                    field="model",
                )
            about = replicas[0]
            own = Engine(about["backend"], about["precision"], about["device"].partition(":")[0])
            self.reference, self.usual = own, [own]
            return
        from fletcher.inference.host import detect_host
        from fletcher.models.bundle.registry import Registry
        from fletcher.tuning.candidates import TuningCandidate, engines
        from fletcher.tuning.decision import decide

        self._bundle = Registry(config.home / "models").ensure_model(config.model.default, say)
        self._host, self._asked = detect_host(), config.engine
        decision = decide(config.home, self._asked, self._host, self._bundle)
        found = engines(self._asked, self._host, self._bundle)
        candidates = [TuningCandidate(tuple(decision.configs)), *found]
        firsts = [one.configs[0] for one in candidates]
        self.usual = list(
            dict.fromkeys(
                Engine(one.backend, one.precision, one.device.partition(":")[0]) for one in firsts
            )
        )
        exact = "onnxruntime" if self._host.onnxruntime else "openvino"
        is_null = self.usual[0].backend == "null"
        self.reference = self.usual[0] if is_null else Engine(exact, "float32")

    def check_variants(self, variants: Sequence[Variant]) -> None:
        """Raise ConfigError or BackendError for a variant whose engine cannot be run."""
        from fletcher.inference.devices import resolve_replicas

        for engine in dict.fromkeys(one.engine for one in variants):
            if not self._target.server:
                resolve_replicas(self._question(engine), self._host, self._bundle)
            elif engine != self.reference:
                raise ConfigError(
                    f"`variants` asks for {engine}, but {self._target.server.uri} runs "
                    f"{self.reference}; leave out `backend` and `precision`, or --server",
                    field="variants",
                )

    @contextlib.contextmanager
    def open_client(self, engine: Engine) -> Iterator[Client]:
        """Context manager of a client of a server that runs the engine.

        A server in this process caches the model's output for each text, so that variants with
        other widths and types need no further run of the model.
        """
        config = self._config
        if not self._target.server:
            entry = 4 * self._bundle.dim + _CACHE_ENTRY_BYTES
            size = self.num_texts * entry * max(1, len(self._bundle.layers))
            config = config.with_options(embedding_cache=size)
            if engine != self.usual[0]:  # `config` already selects the first engine
                asked = self._question(engine)
                config = config.with_options(
                    device=asked.device, backend=asked.backend, precision=asked.precision
                )
        with self._target.open_client(config) as client:
            yield client

    def _question(self, engine: Engine) -> EngineConfig:
        on_cuda = engine.device == "cuda" and self._asked.device.startswith("cuda")
        return dataclasses.replace(
            self._asked,
            device=self._asked.device if on_cuda else engine.device,
            backend=engine.backend,
            precision=engine.precision,
        )


def _print(
    found: EvaluationReport, *, as_json: bool, output: Path | None, plot: Path | None
) -> None:
    from fletcher.evaluation import plot as drawing
    from fletcher.evaluation import report

    text = json.dumps(report.as_json(found), indent=2, ensure_ascii=False)
    if as_json:
        print(text)
    else:
        print("\n".join(report.table(found)))
        for warning in found.warnings():
            say(f"note: {warning}")
    if output:
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise _unwritable("output", output, error.strerror) from None
    if plot:
        drawing.draw_report(found, plot)


def _check_folder(name: str, path: Path | None) -> None:
    """Raise ConfigError before the work begins if a file cannot be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise _unwritable(name, path, "it is a folder, or its folder does not exist")


def _unwritable(name: str, path: Path, reason: str | None) -> ConfigError:
    return ConfigError(f"`{name}` is {str(path)!r}, which cannot be written: {reason}", field=name)
