"""`fletcher similar` with a server elsewhere and with one in its process."""

import io
import json
import os
import sys

import numpy as np
import pytest

import fletcher
from fletcher.cli import main
from fletcher.config.server import ServeConfig
from fletcher.runtime import Runtime

TEXTS = ["vector store", "arrow flight and more", "fast", "text search"]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_bundle):
    home = tmp_path_factory.mktemp("home")
    (home / "models").symlink_to(tiny_bundle.folder.parent)
    config = ServeConfig.from_options(
        port=0,
        home=home,
        model=tiny_bundle.name,
        backend="onnxruntime",
        device="cpu",
        store=("none",),
    )
    with Runtime(config) as runtime:
        yield runtime.address


@pytest.fixture
def call(server, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("FLETCHER_")]:
        monkeypatch.delenv(name)

    def call(*words, stdin=None, code=0):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        assert main(["similar", *words, "--server", server]) == code
        return capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def cosines(server):
    with fletcher.connect(server) as client:
        vectors = client.embed(TEXTS)
    return vectors @ vectors.T


def test_every_pair_most_alike_first(call, cosines):
    pairs = [json.loads(line) for line in call(*TEXTS, "--json").out.splitlines()]
    assert len(pairs) == 6
    for pair in pairs:
        expected = cosines[TEXTS.index(pair["first"]), TEXTS.index(pair["second"])]
        assert pair["cosine"] == pytest.approx(expected, abs=1e-6)
    shown = [pair["cosine"] for pair in pairs]
    assert shown == pytest.approx(sorted(cosines[np.triu_indices(4, 1)])[::-1], abs=1e-6)
    assert len(call("-", "--k", "2", stdin="\n".join(TEXTS)).out.splitlines()) == 2


def test_candidates_of_a_file(call, server, tmp_path):
    # Two batches and more, the best in the last; a row without a text in between.
    rows = [f"model batch data {number}" for number in range(5000)] + TEXTS
    path = tmp_path / "candidates.jsonl"
    lines = [json.dumps({"body": None if row == 2500 else text}) for row, text in enumerate(rows)]
    path.write_text("\n".join(lines))
    with fletcher.connect(server) as client:
        queries = client.embed(TEXTS[:2], prompt="query")
        cosines = queries @ client.embed(rows).T
    cosines[:, 2500] = -1
    words = ["--candidates", str(path), "--text", "body", "--k", "3"]
    printed = call(*TEXTS[:2], *words, "--json")
    assert "1 of 5004 candidates have no vector" in printed.err
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert [(one["text"], one["rank"]) for one in found] == [
        (text, rank) for text in TEXTS[:2] for rank in (1, 2, 3)
    ]
    for one in found:
        assert one["candidate"] == rows[one["row"]]
        expected = cosines[TEXTS.index(one["text"])]
        assert one["cosine"] == pytest.approx(expected[one["row"]], abs=1e-6)
        assert one["cosine"] == pytest.approx(np.sort(expected)[-one["rank"]], abs=1e-6)
    assert max(one["row"] for one in found) >= 4096  # found in a second batch
    printed_lines = call(*TEXTS[:2], *words).out.splitlines()
    assert len(printed_lines) == 8
    assert printed_lines[0] == TEXTS[0]


def test_candidates_by_standard_input(call):
    lines = call("fast", "--candidates", "-", stdin="\n".join(TEXTS)).out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert {line.split("  ")[-1] for line in lines} == set(TEXTS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["alone"], "`texts` has 1 texts, expected at least 2"),
        (["-", "--candidates", "-"], "standard input can be one of them"),
        (["a", "b", "--k", "0"], "`k` is 0, expected 1 to 10000"),
        (["a", "--candidates", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_what_cannot_be_compared(call, words, expected):
    assert expected in call(*words, code=2).err


def test_without_a_server(call, tiny_bundle, tmp_path, capsys):
    (tmp_path / "models").symlink_to(tiny_bundle.folder.parent)
    words = ["--home", str(tmp_path), "--model", tiny_bundle.name, "--backend", "null"]
    assert main(["similar", "same", "same", *words]) == 0
    assert capsys.readouterr().out.split() == ["1.0000", "same", "|", "same"]
