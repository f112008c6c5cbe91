"""An evaluation of vectors that a fake server makes up, so that the right answers are known."""

import contextlib
import json

import numpy as np
import pyarrow as pa
import pytest

from fletcher.core.schema import VectorSpec, vector_columns
from fletcher.errors import DimensionMismatchError, RowTooLargeError
from fletcher.evaluation import plot, report
from fletcher.evaluation.evaluate import evaluate
from fletcher.evaluation.pairs import choose_pairs
from fletcher.evaluation.variants import Engine, Variant

EXACT, NOISY, TURNED = (Engine(name, "float32") for name in ("exact", "noisy", "turned"))
DIM, NUM = 16, 300
MODEL = {
    "name": "m",
    "hash": "0",
    "is_default": True,
    "num_layers": 6,
    "layers": [6],
    "dim": DIM,
    "dims": [DIM],
    "max_length": 8,
    "prompts": {"query": "q: ", "passage": "p: "},
}


class Answers:
    def __init__(self, batches):
        self.errors = ()
        self._batches = batches

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __iter__(self):
        return iter(self._batches)


class Server:
    """Texts are numbers; the vector of a number is the same for a query and a document."""

    def __init__(self, engine, log, *, hits=0):
        self.engine, self.log, self.hits = engine, log, hits
        self.seen = set()
        draw = np.random.default_rng(0)
        table = draw.normal(size=(NUM, DIM)).astype(np.float32)
        if engine == NOISY:
            table += draw.normal(size=table.shape).astype(np.float32)
        if engine == TURNED:
            table = np.roll(table, 1, axis=0)
        self.table = table

    def list_models(self):
        return [MODEL]

    def stats(self):
        return {"fletcher.cache.hits": self.hits}

    def exchange(self, data, options):
        self.log.append((self.engine, options))
        if options.dims == 5:
            raise DimensionMismatchError("`dims` is 5")
        key = (options.prompt, options.layers, options.chunking)
        self.hits += key in self.seen
        self.seen.add(key)
        spec = VectorSpec("m@0", options.dims or DIM, options.dtype, 6, "mean", normalized=False)
        answers = []
        for batch in data:
            texts = batch.column("text").to_pylist()
            numbers = [int(text) if text.isdigit() else 0 for text in texts]
            rows = self.table[numbers, : options.dims]
            if self.engine == TURNED and options.prompt == "passage":
                rows = np.roll(self.table, -1, axis=0)[numbers, : options.dims]
            columns = vector_columns(rows, spec, None)
            cut = pa.array([number % 100 == 0 for number in numbers])
            answer = pa.record_batch({**columns, "truncated": cut})
            answers.append(answer.replace_schema_metadata(spec.metadata()))
        return Answers(answers)


@pytest.fixture
def pairs():
    numbers = pa.chunked_array([pa.array([str(number) for number in range(NUM)])])
    return choose_pairs(numbers, numbers, num_queries=100)


@pytest.fixture
def run(pairs):
    log = []

    def run(variants, **options):
        @contextlib.contextmanager
        def open_client(engine):
            yield Server(engine, log)

        engines = [EXACT, NOISY]
        return evaluate(pairs, EXACT, engines, variants, open_client, print, **options), log

    return run


def test_the_reference_is_first_and_loses_nothing(run):
    found, log = run(None)
    first = found.rows[0]
    assert first.variant == Variant(EXACT, 6, DIM, "float32")
    assert first.recall == {1: 1.0, 10: 1.0, 100: 1.0}
    assert (first.ndcg, first.ndcg_loss, first.top, first.top_rescored) == (1, 0, 1, 1)
    assert first.cosine == pytest.approx({"mean": 1, "p1": 1, "min": 1})
    assert first.spearman == pytest.approx(1)
    assert first.alignment == pytest.approx(0, abs=1e-6)
    # Of a sphere in d dims log E exp(-4 + 4 cos) is about -4 + 8 / d.
    assert first.uniformity == pytest.approx(-3.5, abs=0.05)
    assert abs(first.mean_cosine) < 0.02
    assert {options.prompt for _, options in log} == {None, "query", "passage"}
    assert found.num_truncated == 3


def test_worse_vectors_are_found_worse(run):
    found, _ = run(None)
    (noisy,) = [row for row in found.rows if row.variant.engine == NOISY]
    # The queries of the noisy server have the same noise, so its pairs still find each other.
    assert noisy.recall[1] == 1
    assert 0.6 < noisy.cosine["mean"] < 0.8
    assert noisy.cosine["min"] < noisy.cosine["p1"] < noisy.cosine["mean"]
    assert 0.4 < noisy.spearman < 0.6
    assert noisy.top < noisy.top_rescored < 1


def test_documents_that_are_not_found(run):
    found, _ = run([Variant(TURNED)])
    turned = found.rows[1]
    assert turned.recall[1] < 0.1
    assert turned.ndcg_loss == pytest.approx(1 - turned.ndcg)
    assert turned.ndcg_loss_95 < 0.05
    assert turned.alignment == pytest.approx(2, abs=0.3)


def test_types_and_widths_are_asked_for_and_measured(run):
    variants = [Variant(EXACT, None, dims, dtype) for dims in (4, 16) for dtype in ("float16",)]
    found, log = run(variants)
    assert [(row.variant.dims, row.variant.dtype, row.bytes_per_vector) for row in found.rows] == [
        (16, "float32", 64),
        (4, "float16", 8),
        (16, "float16", 32),
    ]
    assert {options.dtype for _, options in log if options.prompt == "query"} == {"float32"}
    # That very version, even if its name stands for another one meanwhile.
    assert {options.model for _, options in log} == {"m@0"}
    # All of them are asked for: a model may have other defaults.
    assert {(options.dims, options.layers) for _, options in log} == {(16, 6), (4, 6)}
    small, half = found.rows[1:]
    assert small.cosine["mean"] == pytest.approx(0.5, abs=0.05)  # sqrt(4 / 16)
    assert half.cosine["min"] > 0.999999
    assert half.top > 0.999


def test_a_rate_is_that_of_a_run_of_the_model(run):
    found, _ = run([Variant(EXACT, None, None, "float16"), Variant(NOISY)])
    exact, half, noisy = found.rows
    assert half.texts_per_s == exact.texts_per_s  # the second had all vectors in the cache
    assert noisy.texts_per_s not in (None, exact.texts_per_s)


def test_no_rate_where_a_server_had_the_vectors_already(pairs):
    class Knowing(Server):
        def stats(self):
            self.hits += 1
            return super().stats()

    @contextlib.contextmanager
    def open_client(engine):
        yield Knowing(engine, [])

    found = evaluate(pairs, EXACT, [EXACT], [Variant(EXACT)], open_client, print)
    assert found.rows[0].texts_per_s is None
    assert any(" - " in line for line in report.table(found))


def test_a_text_without_a_vector_ends_it(pairs):
    class Failing(Server):
        def exchange(self, data, options):
            answers = super().exchange(data, options)
            answers.errors = (_Error(17, "row_too_large", "too large"),)
            return answers

    class _Error:
        def __init__(self, row, code, message):
            self.row, self.code, self.message = row, code, message

    @contextlib.contextmanager
    def open_client(engine):
        yield Failing(engine, [])

    with pytest.raises(RowTooLargeError, match="text 17: too large"):
        evaluate(pairs, EXACT, [EXACT], None, open_client, print)


def test_what_a_server_refuses_is_known_before_the_work(pairs):
    log, variants = [], [Variant(EXACT), Variant(NOISY, None, 5)]

    @contextlib.contextmanager
    def open_client(engine):
        yield Server(engine, log)

    with pytest.raises(DimensionMismatchError, match="`dims` is 5"):
        evaluate(pairs, EXACT, [EXACT], variants, open_client, print)
    assert [(engine, options.dims) for engine, options in log] == [(EXACT, DIM), (EXACT, 5)]


def test_warnings_say_what_makes_rows_doubtful(pairs):
    class Narrow(Server):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.table = np.abs(self.table)
            self.table[:10] = self.table[0]

    @contextlib.contextmanager
    def open_client(engine):
        yield Narrow(engine, [])

    found = evaluate(pairs, EXACT, [EXACT], None, open_client, print)
    warnings = "\n".join(found.warnings())
    assert "3 of 300 documents are longer than 8 tokens" in warnings
    assert "anisotropy" in warnings
    assert "exact float32, 6 layers, 16 dims, float32: 10 documents share their vector" in warnings


def test_documents_are_cut_and_queries_are_not(run, tmp_path):
    found, log = run([Variant(EXACT), Variant(EXACT, chunking="tokens:8/0:mean")])
    asked = {(options.prompt, options.chunking) for _, options in log}
    cut = ("passage", "tokens:8/0:mean")
    # Without a prompt: what is refused is known before.
    assert asked == {("query", None), ("passage", None), cut, (None, None), (None, cut[1])}
    lines = report.table(found)
    assert [line.split()[5] for line in lines[:3]] == ["R@1", "none", "tokens:8/0:mean"]
    assert found.rows[1].texts_per_s is not None
    plot.draw_report(found, tmp_path / "plot.png")


def test_table_json_and_plot(run, tmp_path):
    found, _ = run([Variant(EXACT, None, dims, "float16") for dims in (4, 16)])
    lines = report.table(found)
    assert [line.split()[:5] for line in lines[1:4]] == [
        ["exact", "float32", "6", "16", "float32"],
        ["exact", "float32", "6", "4", "float16"],
        ["exact", "float32", "6", "16", "float16"],
    ]
    assert "NDCG@10" in lines[0]
    assert "texts/s" in lines[5]
    rows = json.loads(json.dumps(report.as_json(found)))["rows"]
    assert [row["dims"] for row in rows] == [16, 4, 16]
    assert rows[0]["recall"]["10"] == 1
    assert rows[0]["backend"] == "exact"
    plot.check_matplotlib()
    plot.draw_report(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class ListServer(Server):
    """Every text has several weights or vectors, made from its number."""

    def __init__(self, output, *args):
        super().__init__(*args)
        self.output = output
        draw = np.random.default_rng(5)
        self.counts = draw.integers(1, 6, NUM).astype(np.int32)
        width = 2 if output == "sparse" else DIM
        self.rows = [draw.normal(size=(number, width)).astype(np.float32) for number in self.counts]
        for row in self.rows:
            if output == "sparse":
                row[:, 0] = np.sort(draw.choice(DIM, len(row), replace=False))
                row[:, 1] = np.abs(row[:, 1])
            else:
                row[:] = row / np.linalg.norm(row, axis=1, keepdims=True)

    def list_models(self):
        return [MODEL | {"output": self.output}]

    def exchange(self, data, options):
        self.log.append((self.engine, options))
        spec = VectorSpec(
            *("m@0", DIM, options.dtype, 6, "none"), normalized=True, output=self.output
        )
        answers = []
        for batch in data:
            texts = batch.column("text").to_pylist()
            numbers = [int(text) if text.isdigit() else 0 for text in texts]
            rows = np.concatenate([self.rows[number] for number in numbers])
            columns = vector_columns(rows, spec, None, self.counts[numbers])
            answer = pa.record_batch({**columns, "truncated": [False] * len(numbers)})
            answers.append(answer.replace_schema_metadata(spec.metadata()))
        return Answers(answers)


def ranking(server, output, queries, documents):
    """Documents of each query by plain loops, best first."""
    scores = np.empty((len(queries), len(documents)))
    for place, query in enumerate(queries):
        asked = server.rows[query]
        for other, document in enumerate(documents):
            row = server.rows[document]
            if output == "sparse":
                weights = {int(index): value for index, value in row}
                scores[place, other] = sum(w * weights.get(int(i), 0) for i, w in asked)
            else:
                scores[place, other] = sum(max(one @ each for each in row) for one in asked)
    return np.argsort(-scores, axis=1, kind="stable")


@pytest.mark.parametrize(
    ("output", "sizes"),
    [("sparse", {"float32": 8, "float16": 6}), ("multi", {"float32": 64, "float16": 32})],
)
def test_sparse_and_token_vectors_are_ranked_as_by_plain_loops(pairs, tmp_path, output, sizes):
    server = ListServer(output, EXACT, [])

    @contextlib.contextmanager
    def open_client(engine):
        yield server

    found = evaluate(pairs, EXACT, [EXACT], None, open_client, print)
    dtypes = ["float32", "float16", *(["int8"] if output == "multi" else [])]
    assert [row.variant.dtype for row in found.rows] == dtypes
    queries = [int(text) for text in pairs.queries.to_pylist()]
    documents = [int(text) for text in pairs.documents.to_pylist()]
    order = ranking(server, output, queries, documents)
    places = (order == pairs.relevant[:, None]).argmax(axis=1) + 1
    first = found.rows[0]
    assert first.recall == {k: (places <= k).mean() for k in (1, 10, 100)}
    gains = np.where(places <= 10, 1 / np.log2(1 + places), 0)
    assert first.ndcg == pytest.approx(gains.mean())
    assert (first.ndcg_loss, first.top, first.top_rescored) == (0, 1, 1)
    assert first.spearman == pytest.approx(1)
    assert first.cosine == pytest.approx({"mean": 1, "p1": 1, "min": 1})
    assert (first.alignment, first.uniformity, first.mean_cosine) == (None, None, None)
    assert first.num_alike == 0
    for row in found.rows[:2]:
        size = sizes[row.variant.dtype] * server.counts[documents].mean()
        assert row.bytes_per_vector == round(size)
        assert 0.999 < row.cosine["min"] <= 1 + 1e-9
    assert {options.dtype for _, options in server.log if options.prompt == "query"} == {"float32"}
    assert any(" - " in line for line in report.table(found))
    json.dumps(report.as_json(found), allow_nan=False)
    list(found.warnings())
    plot.draw_report(found, tmp_path / "plot.png")


def test_a_model_for_dot_products_is_ranked_by_them(pairs):
    class Long(Server):
        """Documents point the same way; only their lengths tell them apart."""

        def exchange(self, data, options):
            answers = super().exchange(data, options)
            said = {b"fletcher.similarity": b"dot"}
            answers._batches = [
                one.replace_schema_metadata({**one.schema.metadata, **said}) for one in answers
            ]
            return answers

    @contextlib.contextmanager
    def open_client(engine):
        server = Long(engine, [])
        server.table = np.outer(np.arange(1, NUM + 1), np.ones(DIM)).astype(np.float32)
        yield server

    found = evaluate(pairs, EXACT, [EXACT], [Variant(EXACT)], open_client, print)
    # For every query, the longest document is the most similar one.
    longest = pairs.documents.to_pylist().index(str(NUM - 1))
    asked = longest < len(pairs.queries)
    assert found.rows[0].recall[1] == pytest.approx(asked / len(pairs.queries))
