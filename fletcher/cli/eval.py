"""`fletcher eval`: what engines, depths, widths and types cost in quality, on one's own texts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fletcher.cli.connection import add_connection, local_config, open_client, without_store
from fletcher.cli.parser import add_format, add_paths, check_server, given_flags
from fletcher.cli.terminal import say
from fletcher.config.delivery import NO_STORE
from fletcher.config.server import ServeConfig
from fletcher.errors import ConfigError

if TYPE_CHECKING:
    from fletcher.client import Client
    from fletcher.config.engine import EngineConfig
    from fletcher.evaluation.evaluate import EvaluationReport
    from fletcher.evaluation.variants import Engine, Variant

# What the vectors of a text take in the embedding cache beside their numbers, with room to spare.
_CACHE_ENTRY_BYTES = 1024


def add_parser(subparsers: Any) -> None:
    """Adds `eval`."""
    parser = subparsers.add_parser(
        "eval",
        usage="fletcher eval [options] PATH... --query COLUMN --document COLUMN",
        help="measure what precision, depth, width and type cost in quality",
        description="Embeds a corpus of pairs in several ways and measures how well each query "
        "finds its document, how far the vectors are from float32's, how fast they are made and "
        "how large they are. Every row of the files is a pair; rows whose query or document came "
        "before are left out. Rates mean something on a quiet machine only.",
        example="fletcher eval corpus.parquet --query title --document body --documents 5000 "
        "--queries 1000",
    )
    add_paths(parser)
    parser.add_argument(
        "--query", required=True, metavar="COLUMN", help="what is asked, such as a title"
    )
    parser.add_argument(
        "--document", required=True, metavar="COLUMN", help="what should be found, such as a body"
    )
    add_format(parser, "of the files")
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="documents to embed, a fixed random choice; more: a harder search, and longer "
        "(default: all)",
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=1000,
        metavar="N",
        help="queries to ask; more: narrower intervals (default: 1000)",
    )
    parser.add_argument(
        "--variants",
        action="append",
        metavar="LIST",
        help="what to compare: 'backend=openvino precision=bfloat16,float32 dims=384,128 "
        "dtype=float32,float16' is every combination; keys: backend, precision, layers, dims, "
        "dtype, chunking (of documents, one vector each); repeatable (default: every engine here, "
        "and the depths, widths and types that the model declares)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the JSON there, beside the table"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw quality against cost there, as a PNG"
    )
    add_connection(parser, ("model", "allow_undeclared", "int8"))


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints."""
    from fletcher.evaluation import plot
    from fletcher.evaluation.evaluate import evaluate
    from fletcher.evaluation.pairs import read_pairs
    from fletcher.evaluation.variants import parse_variants

    check_server(args)
    for name in ("documents", "queries"):
        value = getattr(args, name)
        if value is not None and value < 2:
            raise ConfigError(f"`{name}` is {value}, expected 2 or more", field=name)
    for name in ("output", "plot"):
        _check_folder(name, getattr(args, name))
    if args.plot:
        plot.check_matplotlib()
    config = local_config(args, store=NO_STORE)
    engines = _Engines(args, config)
    lists = args.variants and [parse_variants(text, engines.usual) for text in args.variants]
    variants = [one for some in lists for one in some] if lists else None
    engines.check(variants or ())
    pairs = read_pairs(
        args.paths,
        query_column=args.query,
        document_column=args.document,
        format_name=args.format,
        num_documents=args.documents,
        num_queries=args.queries,
        notice=say,
    )
    engines.num_texts = len(pairs.documents) + len(pairs.queries)
    found = evaluate(
        pairs,
        engines.reference,
        engines.usual,
        variants,
        engines.open,
        say,
        model_name=given_flags(args).get("model") if args.server else None,
    )
    _print(found, args)
    return 0


class _Engines:
    """What can run the model: in this process, or the one engine of a server elsewhere.

    Attributes:
        reference: What makes the reference: float32 on the CPU.
        usual: All that can be had here, what a server would take first.
        num_texts: Texts whose vectors are kept in a server's embedding cache while it is open.
    """

    def __init__(self, args: argparse.Namespace, config: ServeConfig) -> None:
        from fletcher.client.prompts import served_model
        from fletcher.evaluation.variants import Engine

        self._args, self._config = args, config
        self.num_texts = 0
        if args.server:
            with open_client(args, config) as client:
                model = served_model(client, given_flags(args).get("model"))
                name = f"{model['name']}@{model['hash']}"
                replicas = [one for one in client.stats()["replicas"] if one["model"] == name]
            if not replicas:
                raise ConfigError(
                    f"`model` {name} is not loaded now by {args.server}; "
                    f"`fletcher model load {name} --server {args.server}` does that",
                    field="model",
                )
            about = replicas[0]
            own = Engine(about["backend"], about["precision"], about["device"].partition(":")[0])
            self.reference, self.usual = own, [own]
            return
        from fletcher.inference.devices import detect_host
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

    def check(self, variants: Sequence[Variant]) -> None:
        """Refuses engines that cannot be had. Raises ConfigError or BackendError."""
        from fletcher.inference.devices import resolve_replicas

        for engine in dict.fromkeys(one.engine for one in variants):
            if not self._args.server:
                resolve_replicas(self._question(engine), self._host, self._bundle)
            elif engine != self.reference:
                raise ConfigError(
                    f"`variants` asks for {engine}, but {self._args.server} runs {self.reference}; "
                    "leave out `backend` and `precision`, or --server",
                    field="variants",
                )

    @contextlib.contextmanager
    def open(self, engine: Engine) -> Iterator[Client]:
        """A client of a server that runs it, until it is left.

        A server in this process keeps what the model gave for each text, so that other widths and
        types are made of it by the same code as ever, without running the model again.
        """
        config = without_store(self._config)
        if not self._args.server:
            entry = 4 * self._bundle.dim + _CACHE_ENTRY_BYTES
            size = self.num_texts * entry * max(1, len(self._bundle.layers))
            config = config.with_options(embedding_cache=size)
            if engine != self.usual[0]:  # which is what the options, and `tune`, make of it
                asked = self._question(engine)
                config = config.with_options(
                    device=asked.device, backend=asked.backend, precision=asked.precision
                )
        with open_client(self._args, config) as client:
            yield client

    def _question(self, engine: Engine) -> EngineConfig:
        on_cuda = engine.device == "cuda" and self._asked.device.startswith("cuda")
        return dataclasses.replace(
            self._asked,
            device=self._asked.device if on_cuda else engine.device,
            backend=engine.backend,
            precision=engine.precision,
        )


def _print(found: EvaluationReport, args: argparse.Namespace) -> None:
    from fletcher.evaluation import plot, report

    text = json.dumps(report.as_json(found), indent=2, ensure_ascii=False)
    if args.json:
        print(text)
    else:
        print("\n".join(report.table(found)))
        for warning in found.warnings():
            say(f"note: {warning}")
    if args.output:
        try:
            args.output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise _unwritable("output", args.output, error.strerror) from None
    if args.plot:
        plot.draw_report(found, args.plot)


def _check_folder(name: str, path: Path | None) -> None:
    """Refuses a file that could not be written after all the work is done."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise _unwritable(name, path, "it is a folder, or its folder does not exist")


def _unwritable(name: str, path: Path, reason: str | None) -> ConfigError:
    return ConfigError(f"`{name}` is {str(path)!r}, which cannot be written: {reason}", field=name)
