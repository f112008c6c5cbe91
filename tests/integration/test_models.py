"""Several models on one server: swaps under load, divided traffic, memory and its end."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import flight

import fletcher
from fletcher.cli import main
from fletcher.client.prompts import served_model
from fletcher.config.server import ServeConfig
from fletcher.core.command import EmbedCommand
from fletcher.errors import InvalidCommandError, UnknownModelError
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.runtime import Runtime
from tests.doubles.bundles import another
from tests.integration.flight_calls import TIMEOUT, action, command, exchange, put
from tests.integration.processes import eventually, is_alive

TEXTS = [f"word{n} and {n * 7} more" for n in range(40)]
BATCH = pa.record_batch({"text": TEXTS})


@pytest.fixture(scope="module")
def home(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLETCHER_HOME with `a` in two versions, the older one kept, and `b`."""
    home = tmp_path_factory.mktemp("home")
    models = home / "models"
    models.mkdir()
    older = another(tiny_bundle, models / "older", "a", "one")
    older.folder.rename(models / older.qualified_name)
    another(tiny_bundle, models / "a", "a", "two")
    another(tiny_bundle, models / "b", "b", "three")
    return home


@contextmanager
def serving(home: Path, **options: Any) -> Iterator[Runtime]:
    fields = {"port": 0, "backend": "null", "model": "a", "max_journal": 0, "group_delay_ms": 20}
    stores = (f"lance:{home / 'vectors'}",)
    with Runtime(
        ServeConfig.from_options(**{"home": home, "store": stores, **fields, **options})
    ) as server:
        yield server


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Runtime]:
    with serving(home, models=("b",)) as server:
        yield server


def states(client: fletcher.Client) -> dict[str, str]:
    return {f"{one['name']}@{one['hash']}": one["state"] for one in client.list_models()}


def version_of(client: fletcher.Client, name: str) -> str:
    (one,) = [one for one in client.list_models() if one["name"] == name and one["is_current"]]
    return f"{name}@{one['hash']}"


def vectors(batch: pa.RecordBatch) -> np.ndarray:
    column = batch.column("vector")
    return column.flatten().to_numpy().reshape(len(column), -1).astype(np.float32)


def installed(home: Path) -> tuple[str, str]:
    """Both versions of `a`: the kept one, and the one in use."""
    (kept,) = [path.name for path in (home / "models").glob("a@*")]
    return kept, ModelBundle.from_folder(home / "models" / "a").qualified_name


def test_swaps_under_load_fail_no_call_and_mix_no_batch(home: Path, server: Runtime) -> None:
    versions = installed(home)
    with fletcher.connect(server.address) as client:
        expected = {}
        for name in versions:
            client.load_model(name)
            expected[name] = client.embed(TEXTS, model=name, dtype="float16").astype(np.float32)
        assert not np.array_equal(*expected.values())
        client.unload_model(versions[0])
        done = threading.Event()
        failures: list[BaseException] = []
        served: list[str] = []

        def load(number: int) -> None:
            try:
                with fletcher.connect(server.address) as mine:
                    while not done.is_set():
                        batches = [BATCH.slice(n % 3) for n in range(number % 4 + 1)]
                        with mine.exchange(batches, EmbedCommand(model="a")) as answers:
                            count = 0
                            for n, batch in enumerate(answers):
                                model = answers.schema.metadata[b"fletcher.model"].decode()
                                model = model.removeprefix("null-")
                                assert np.array_equal(vectors(batch), expected[model][n % 3 :])
                                count += 1
                            assert count == len(batches)
                        served.append(model)
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        threads = [threading.Thread(target=load, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        try:
            for n in range(4):
                assert client.swap_model(versions[n % 2]) == versions[n % 2]
                before = len(served)  # while the model loads, calls go on with the other one
                eventually(lambda: len(served) > before + 16 or failures, "calls go on")  # noqa: B023
        finally:
            done.set()
            for thread in threads:
                thread.join(60)
        assert failures == []
        assert set(served) == set(versions)
        eventually(lambda: versions[0] not in states(client), "the old one is gone")
        assert states(client)[versions[1]] == "ready"


def test_a_call_keeps_the_version_it_began_with(
    home: Path, server: Runtime, client: fletcher.Client
) -> None:
    kept, current = installed(home)
    expected = client.embed(TEXTS, model="a", dtype="float16").astype(np.float32)
    with flight.connect(server.address) as plain:
        writer, reader = plain.do_exchange(command(model="a", upload_id="u"), TIMEOUT)
        writer.begin(BATCH.schema)
        writer.write_batch(BATCH)
        assert np.array_equal(vectors(reader.read_chunk().data), expected)
        assert client.swap_model(kept) == kept
        assert states(client)[current] == "retiring"
        assert not np.array_equal(client.embed(TEXTS, model="a", dtype="float16"), expected)
        with pytest.raises(UnknownModelError):
            client.embed(["x"], model=current)
        writer.write_batch(BATCH)
        assert np.array_equal(vectors(reader.read_chunk().data), expected)
        writer.done_writing()
        writer.close()
    eventually(lambda: current not in states(client), "the old one is gone")
    assert client.swap_model("a") == current  # what is installed under the name


def test_an_unloaded_model_is_unknown_and_its_processes_are_gone(
    server: Runtime, client: fletcher.Client
) -> None:
    (b,) = [one for one in server.service.models.running().values() if one.bundle.name == "b"]
    pools = (b.embedder.tokenizers, b.embedder.replicas)
    workers = [pid for pool in pools for pid in pool.process_ids()]
    assert len(workers) == 2
    name = client.unload_model("b")
    eventually(lambda: name not in states(client), "it is gone")
    assert not any(is_alive(pid) for pid in workers)
    with pytest.raises(UnknownModelError, match="this server runs a@"):
        client.embed(["x"], model="b")
    assert client.load_model("b") == name
    assert client.embed(["x"], model="b").shape == (1, 32)
    taken = {one["name"]: one["memory_bytes"] for one in client.list_models()}
    assert 20e6 < taken["b"] < 300e6


def test_names_only_of_what_is_configured_and_installed(
    client: fletcher.Client, home: Path
) -> None:
    names = ["nobody", str(home / "models" / "b"), "../models/b", "grpc://host:1", "b@000000000000"]
    for name in names:
        refused = "known: " if name.startswith("b@") else "this server may load a, b; its option"
        for change in (client.load_model, client.swap_model):
            with pytest.raises(UnknownModelError, match=refused):
                change(name)
    with serving(home, loadable_models=("*",)) as server, fletcher.connect(server.address) as other:
        assert [one["name"] for one in other.list_models()] == ["a"]
        assert other.load_model("b").startswith("b@")
    with pytest.raises(InvalidCommandError, match="needed: it is the default"):
        client.unload_model("a")
    with flight.connect(client.address) as plain:
        for body in ({"path": "x"}, {"model": 1}, {}, {"model": "b", "force": "yes"}):
            with pytest.raises(flight.FlightInternalError):
                action(plain, "unload_model", body)


def test_an_alias_divides_calls_and_says_which_it_was(
    server: Runtime, client: fletcher.Client
) -> None:
    both = {version_of(client, "a"), version_of(client, "b")}
    assert client.set_alias("search", {"a": 3, "b": 1}) == {"search": "a:3,b:1"}
    with flight.connect(server.address) as plain:

        def served(**fields: Any) -> str:
            body = {"texts": ["x"], "model": "search", **fields}
            return str(action(plain, "embed", body)["model"]).removeprefix("null-")

        first = [served(upload_id=f"u{n}") for n in range(24)]
        assert set(first) == both
        assert [served(upload_id=f"u{n}") for n in range(24)] == first
        writer, reader = plain.do_exchange(command(model="search", upload_id="u0"), TIMEOUT)
        writer.begin(BATCH.schema)
        assert reader.schema.metadata[b"fletcher.model"].decode() == f"null-{first[0]}"
        writer.close()

        # A dataset has vectors of one model, whatever the weights and whoever writes.
        def put_into(dataset: str, upload_id: str) -> str:
            options = {"model": "search", "dataset": dataset, "upload_id": upload_id}
            answers = put(plain, [BATCH], BATCH.schema, end=BATCH.num_rows, **options)
            assert answers[-1]["complete"]
            return str(answers[-1]["model"]).removeprefix("null-")

        chosen = {f"split{n}": put_into(f"split{n}", "u1") for n in range(4)}
        client.set_alias("search", {"a": 1, "b": 3})
        assert {name: put_into(name, "u2") for name in chosen} == chosen
        for other in ("a", "b"):
            client.set_alias("search", {other: 1})
            for dataset, model in chosen.items():
                if not model.startswith(other):
                    with pytest.raises(flight.FlightInternalError, match="model"):
                        put_into(dataset, "u3")
    assert client.set_alias("search", None) == {}
    with pytest.raises(UnknownModelError):
        client.embed(["x"], model="search")


def test_a_killed_replica_affects_only_its_model(server: Runtime, client: fletcher.Client) -> None:
    def restarts() -> dict[str, int]:
        return {one["model"]: one["restarts"] for one in client.stats()["replicas"]}

    before = restarts()
    running = server.service.models.running()
    pools = {name: model.embedder.replicas for name, model in running.items()}
    a, b = version_of(client, "a"), version_of(client, "b")
    os.kill(pools[b].process_ids()[0], signal.SIGKILL)
    assert client.embed(["x"], model="a").shape == (1, 32)
    assert client.embed(["x"], model="b").shape == (1, 32)
    # A single text may run in the front process, before the loss of the replica is noticed.
    eventually(lambda: restarts()[b] == before[b] + 1, "the killed replica starts again")
    assert restarts()[a] == before[a]
    assert client.stats()["fletcher.worker.usable"][f"{a},cpu-0"] == 1


def test_a_restarted_replica_does_not_take_a_newer_version(
    home: Path, tiny_bundle: ModelBundle
) -> None:
    with serving(home, model="b") as server, fletcher.connect(server.address) as client:
        expected = client.embed(TEXTS)
        models = home / "models"
        kept = models / ModelBundle.from_folder(models / "b").qualified_name
        (models / "b").rename(kept)  # as `fletcher model add --replace` does
        another(tiny_bundle, models / "b", "b", "four")
        try:
            (model,) = server.service.models.running().values()
            for pool in (model.embedder.replicas, model.embedder.tokenizers):
                os.kill(pool.process_ids()[0], signal.SIGKILL)
            assert np.array_equal(client.embed(TEXTS), expected)
            assert client.swap_model("b") != kept.name
            assert not np.array_equal(client.embed(TEXTS), expected)
        finally:
            (models / "b").rename(models.parent / "away")
            kept.rename(models / "b")


def test_models_that_were_not_used_make_room(home: Path) -> None:
    with serving(home, models=("b",)) as server, fletcher.connect(server.address) as client:
        taken = [one["memory_bytes"] for one in client.list_models()]
    bound = int(max(taken) * 1.5)
    strangers = set(psutil.Process().children())
    with (
        serving(home, models=("b",), max_model_memory=bound) as server,
        fletcher.connect(server.address) as client,
    ):
        a, b = version_of(client, "a"), version_of(client, "b")
        eventually(lambda: states(client) == {a: "ready", b: "configured"}, "one fits")
        children = set(psutil.Process().children()) - strangers
        for model, other in [("b", a), ("a", b)] * 2:
            assert client.embed(["x"], model=model).shape == (1, 32)
            assert states(client)[other] == "configured"
            now = set(psutil.Process().children()) - strangers
            assert len(now) == len(children) == 2
            assert now & children == set()  # the processes of the other are gone
            children = now
            assert client.ready()
            assert sum(one["memory_bytes"] for one in client.list_models()) < bound
        # What is in use stays: others are told to come again, and get their turn in the end.
        with flight.connect(server.address) as plain:
            writer, reader = plain.do_exchange(command(model="a"), TIMEOUT)
            writer.begin(BATCH.schema)
            writer.write_batch(BATCH)
            assert reader.read_chunk().data.num_rows == len(TEXTS)
            with pytest.raises(flight.FlightError):
                list(
                    exchange(
                        plain,
                        [BATCH],
                        BATCH.schema,
                        model="b",
                        options=flight.FlightCallOptions(timeout=0.5),
                    )
                )
            writer.done_writing()
            writer.close()
        assert client.embed(["x"], model="b").shape == (1, 32)


def test_from_the_command_line(
    home: Path, server: Runtime, client: fletcher.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str, code: int = 0) -> str:
        assert main(["model", *argv, "--server", server.address]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    kept, current = installed(home)
    b = version_of(client, "b")
    eventually(lambda: kept not in states(client), "what an earlier test loaded has retired")
    assert f"{current}  ready  0 calls" in run("running")
    assert run("load", kept) == f"{kept}  ready\n"
    assert f"{kept}  ready  0 calls" in (listed := run("running"))
    assert "as NAME@HASH alone" in listed
    assert json.loads(run("swap", kept, "--json")) == {"model": kept, "state": "ready"}
    assert run("swap", "a") == f"{current}  ready\n"
    assert run("alias", "both", "a:0.5", "b") == "both  a:0.5,b:1\n"
    assert served_model(client, "both") == served_model(client, "a")
    assert "needed: alias both" in run("unload", "b", code=2)
    assert "expected MODEL:WEIGHT" in run("alias", "both", "a:0", code=2)
    assert run("alias", "both") == ""
    assert run("unload", "b", "--force") == f"{b}  retiring\n"
    eventually(lambda: b not in states(client), "it is gone")
    assert "may load a, b; its option --loadable-models" in run("load", "nobody", code=1)
    assert run("load", "b") == f"{b}  ready\n"


def test_a_damaged_model_does_not_take_the_others_place(home: Path, client: Any) -> None:
    models = home / "models"
    kept, current = installed(home)
    weights = models / kept / "model.weights"
    good = weights.read_bytes()
    weights.write_bytes(bytes(len(good)))
    try:
        with pytest.raises(UnknownModelError, match="weights has a wrong SHA-256") as caught:
            client.swap_model(kept)
        assert kept in caught.value.message
        assert str(home) not in caught.value.message
        assert version_of(client, "a") == current
    finally:
        weights.write_bytes(good)


def test_search_asks_in_the_version_that_a_dataset_has(
    home: Path, server: Runtime, client: fletcher.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, current = installed(home)
    client.load_model(kept)
    for name, version in (("newer", current), ("older", kept)):
        client.put(BATCH, EmbedCommand(dataset=name, model=version, durability="store"))
        argv = ["search", TEXTS[7], "--dataset", name, "--store", f"lance:{home / 'vectors'}"]
        for elsewhere in (["--server", server.address], ["--home", str(home), "--backend", "null"]):
            capsys.readouterr()
            assert main([*argv, *elsewhere, "--prompt", "", "--json", "--k", "1"]) == 0
            assert json.loads(capsys.readouterr().out)["text"] == TEXTS[7]
