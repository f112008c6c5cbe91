"""Names, leases, and models that come and go; with models that are nothing but names."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from fletcher.config.model_alias import Alias
from fletcher.core.chunking import Chunking
from fletcher.core.schema import VectorSpec
from fletcher.errors import (
    BackendError,
    DrainingError,
    InvalidCommandError,
    ModelError,
    OverloadedError,
    UnknownModelError,
)
from fletcher.serving.model_lifecycle import ModelTiming
from fletcher.serving.model_manager import ModelManager
from fletcher.serving.model_versions import ServedModel
from tests.integration.processes import eventually


class FakeSource:
    """Installed are the versions in `hashes`; loading waits while `gate` is closed."""

    def __init__(self, **hashes: str) -> None:
        self.hashes = hashes
        self.sizes: dict[str, int] = {}
        self.layers: tuple[int, ...] = (6,)
        self.ranges: dict[str, Any] = {}
        self.broken: set[str] = set()
        self.damaged: dict[str, str] = {}  # by model, `find_bundle` or `load_model`
        self.gate = threading.Event()
        self.gate.set()
        self.loaded: list[str] = []
        self.closed: list[str] = []

    def find_bundle(self, name: str) -> Any:
        short, _, version = name.partition("@")
        if short not in self.hashes:
            raise UnknownModelError("not installed")
        if self.damaged.get(short) == "find_bundle":
            raise ModelError(f"model {name}: model.onnx has 1 bytes, expected 2; add it again")
        version = version or self.hashes[short]
        return SimpleNamespace(
            name=short,
            hash=version,
            qualified_name=f"{short}@{version}",
            num_bytes=100,
            layers=self.layers,
            calibration=SimpleNamespace(ranges=dict(self.ranges)),
        )

    def load_model(self, bundle: Any) -> ServedModel:
        name = bundle.qualified_name
        bundle = self.find_bundle(name)
        assert self.gate.wait(30)
        if name in self.broken:
            raise BackendError("it does not run: /a/path")
        if self.damaged.get(bundle.name) == "load_model":
            raise ModelError(f"model {name}: model.onnx has a wrong SHA-256; add it again")
        self.loaded.append(name)
        embedder = SimpleNamespace(
            close=lambda: self.closed.append(name),
            memory_bytes=lambda: self.sizes.get(name, 100),
            queued=lambda stage: 2,
            queued_windows=lambda: 0.5,
            ready=True,
        )
        return ServedModel(bundle, embedder, {}, None)  # type: ignore[arg-type]


Start = Callable[..., ModelManager]


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(a="1", b="1", c="1")


@pytest.fixture
def start(source: FakeSource) -> Iterator[Start]:
    with ExitStack() as running:

        def make(*names: str, aliases: tuple[str, ...] = (), **options: Any) -> ModelManager:
            models = ModelManager(source, names[0], **options)
            running.callback(models.close)
            models.start(names[1:], [Alias.from_text(text) for text in aliases])
            return models

        yield make


def states(models: ModelManager) -> dict[str, str]:
    return {f"{one['name']}@{one['hash']}": one["state"] for one in models.describe()}


def leased(models: ModelManager, name: str | None = None, **options: Any) -> str:
    with models.lease(name, **options) as model:
        return model.bundle.qualified_name


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:  # noqa: BLE001
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def test_a_name_a_version_and_no_name(start: Start, source: FakeSource) -> None:
    models = start("a", "b")
    assert source.loaded == ["a@1", "b@1"]
    assert [leased(models, name) for name in (None, "a", "b", "b@1")] == [
        *("a@1", "a@1", "b@1", "b@1")
    ]
    with pytest.raises(UnknownModelError) as caught:
        leased(models, "c")  # installed, and not served
    assert list(caught.value.allowed) == ["a", "b", "a@1", "b@1"]
    assert models.queued("texts") == 4
    assert models.queued_windows() == 1.0


def test_a_swap_waits_for_the_new_and_then_for_the_olds_calls(
    start: Start, source: FakeSource
) -> None:
    models = start("a")
    with models.lease("a") as old:
        source.hashes["a"] = "2"
        source.gate.clear()
        thread, swapped = in_thread(lambda: models.swap_model("a"))
        eventually(lambda: states(models).get("a@2") == "loading", "the new one is loaded")
        assert leased(models, "a") == "a@1"
        source.gate.set()
        thread.join(30)
        assert swapped == ["a@2"]
        assert leased(models) == leased(models, "a") == "a@2"
        assert old.bundle.qualified_name == "a@1"
        assert states(models) == {"a@1": "retiring", "a@2": "ready"}
        with pytest.raises(UnknownModelError):
            leased(models, "a@1")
        assert source.closed == []
    eventually(lambda: states(models) == {"a@2": "ready"}, "the old one is gone")
    assert source.closed == ["a@1"]
    assert models.swap_model("a") == "a@2"  # nothing to do
    assert source.loaded == ["a@1", "a@2"]


@pytest.mark.parametrize("step", ["find_bundle", "load_model"])
def test_a_damaged_model_is_named_with_its_file(
    start: Start, source: FakeSource, step: str
) -> None:
    # The actions answered `internal`, or that the caller should try again.
    models = start("a", loadable=["b"], timing=ModelTiming(failed_s=0.0))
    source.damaged["b"] = step
    for action in (models.load_model, models.swap_model):
        with pytest.raises(UnknownModelError, match=r"model b.*: model\.onnx has") as caught:
            action("b")
        assert caught.value.field == "model"
    if step == "load_model":
        with pytest.raises(UnknownModelError, match=r"model b.*: model\.onnx has"):
            leased(models, "b@1")
    source.damaged.clear()
    assert models.load_model("b") == "b@1"


def test_a_swap_that_fails_changes_nothing(start: Start, source: FakeSource) -> None:
    models = start("a")
    source.hashes["a"] = "2"
    source.broken.add("a@2")
    with pytest.raises(OverloadedError) as caught:
        models.swap_model("a")
    assert "path" not in caught.value.message
    assert leased(models) == "a@1"
    source.broken.clear()
    assert models.swap_model("a") == "a@2"


def test_versions_are_side_by_side_until_one_is_unloaded(start: Start, source: FakeSource) -> None:
    models = start("a", "b", loadable=["c"])
    source.hashes["b"] = "2"
    assert models.load_model("b") == "b@2"
    assert [leased(models, name) for name in ("b", "b@1", "b@2")] == ["b@1", "b@1", "b@2"]
    assert models.unload_model("b@2") == "b@2"
    eventually(lambda: "b@2" not in states(models), "it is gone")
    assert models.unload_model("b") == "b@1"
    eventually(lambda: states(models) == {"a@1": "ready"}, "the other one, too")
    assert models.load_model("c") == "c@1"
    assert leased(models, "c") == "c@1"


def test_what_may_be_loaded_is_what_the_operator_configured(
    start: Start, source: FakeSource
) -> None:
    # Callers could load whatever was installed, and with it fill the memory.
    models = start("a", "b@1", loadable=["c"])
    source.hashes |= {"b": "2", "d": "1"}
    for change in (models.load_model, models.swap_model):
        for name in ("d", "d@1"):
            with pytest.raises(UnknownModelError, match="may load a, b, c; its option --load"):
                change(name)
        # Other versions of a permitted name may be loaded, and unloaded ones again.
        assert [change(name) for name in ("b", "c@2", "a@3")] == ["b@2", "c@2", "a@3"]
    models.unload_model("b")
    assert models.load_model("b") == "b@2"
    anything = start("a", loadable=["*"])
    assert anything.load_model("d") == "d@1"


def test_what_calls_are_sent_to_is_not_unloaded(start: Start) -> None:
    models = start("a", "b", "c", aliases=("search=b:1,c@1:1",))
    for name in ("a", "a@1", "b", "c"):
        with pytest.raises(InvalidCommandError, match="needed"):
            models.unload_model(name)
    models.remove_alias("search")
    assert models.unload_model("c") == "c@1"
    with pytest.raises(InvalidCommandError, match="unknown `alias`"):
        models.remove_alias("search")


def test_a_swap_leaves_a_version_that_an_alias_names(start: Start, source: FakeSource) -> None:
    models = start("a", "b", aliases=("search=b@1:1",))
    source.hashes["b"] = "2"
    assert models.swap_model("b") == "b@2"
    assert leased(models, "search") == "b@1"
    assert leased(models, "b") == "b@2"


def test_an_alias_divides_and_a_dataset_keeps_its_model(start: Start, source: FakeSource) -> None:
    models = start("a", "b", aliases=("search=a:1,b:1", "default=b"))
    keys = [f"key-{n}" for n in range(50)]
    first = [leased(models, "search", alias_key=key) for key in keys]
    assert set(first) == {"a@1", "b@1"}
    assert [leased(models, "search", alias_key=key) for key in keys] == first
    assert {leased(models, "search") for _ in range(50)} == {"a@1", "b@1"}
    assert {leased(models, "search", alias_key=key, dataset_model="b@1") for key in keys} == {"b@1"}
    # Of another model the dataset's rows cannot be, whatever the alias says: delivery refuses it.
    assert [leased(models, "search", alias_key=key, dataset_model="z@1") for key in keys] == first
    assert leased(models) == models.default.name == "b@1"
    assert models.is_divided("search")
    assert not models.is_divided(None)
    with pytest.raises(UnknownModelError):
        models.set_alias(Alias.from_text("other=a,nobody"))
    with pytest.raises(InvalidCommandError, match="a model's name"):
        models.set_alias(Alias.from_text("a=b"))
    with pytest.raises(InvalidCommandError, match="is an alias"):
        models.load_model("search")
    source.hashes["search"] = "1"
    for change in (models.load_model, models.swap_model):
        with pytest.raises(InvalidCommandError, match="is an alias"):
            change("search@1")


def test_the_least_recently_used_makes_room_and_comes_again(
    start: Start, source: FakeSource
) -> None:
    models = start("a", "b", "c", max_bytes=250)
    assert states(models) == {"a@1": "ready", "b@1": "ready", "c@1": "configured"}
    leased(models, "a")
    assert leased(models, "c") == "c@1"
    assert states(models) == {"a@1": "ready", "b@1": "configured", "c@1": "ready"}
    assert source.closed == ["b@1"]
    assert leased(models, "b") == "b@1"
    assert states(models) == {"a@1": "configured", "b@1": "ready", "c@1": "ready"}
    memory = {one["name"]: one["memory_bytes"] for one in models.describe()}
    assert memory == {"a": 0, "b": 100, "c": 100}


def test_at_the_start_none_makes_room_for_a_later_one(start: Start, source: FakeSource) -> None:
    source.sizes["c@1"] = 160  # its files have 100
    models = start("a", "b", "c", max_bytes=350)
    eventually(lambda: states(models)["c@1"] == "configured", "the last one is unloaded")
    assert source.closed == ["c@1"]
    assert leased(models, "c") == "c@1"
    assert states(models) == {"a@1": "configured", "b@1": "ready", "c@1": "ready"}


def test_a_model_in_use_is_not_unloaded_for_another(start: Start, source: FakeSource) -> None:
    models = start("a", "b", max_bytes=150, timing=ModelTiming(room_wait_s=0.2))
    with models.lease("a"):
        with pytest.raises(OverloadedError, match="in use") as caught:
            leased(models, "b")
        assert caught.value.retry_after_ms
        thread, outcome = in_thread(lambda: leased(models, "b"))
        eventually(lambda: states(models)["b@1"] == "loading", "it waits for room")
    thread.join(30)
    assert outcome == ["b@1"]


def test_a_model_larger_than_all_memory_is_refused(start: Start, source: FakeSource) -> None:
    source.sizes["b@1"] = 1000
    with pytest.raises(UnknownModelError, match="takes 1,000 bytes"):
        start("a", "b", max_bytes=500)
    models = start("a", max_bytes=500, loadable=["b"])
    for _ in range(2):
        with pytest.raises(UnknownModelError, match="takes 1,000 bytes"):
            models.load_model("b")
    assert source.loaded.count("b@1") == 2  # by two servers: once measured, it is not tried again
    assert source.closed.count("b@1") == 2
    assert leased(models) == "a@1"


def test_memory_that_grows_is_taken_from_the_idle(start: Start, source: FakeSource) -> None:
    now = [0.0]
    models = start("a", "b", max_bytes=250, clock=lambda: now[0])
    source.sizes["b@1"] = 200
    now[0] += 60
    leased(models, "b")
    models._lifecycle.unload_excess()
    eventually(lambda: states(models)["a@1"] == "configured", "the other one is unloaded")
    source.sizes["b@1"] = 300
    now[0] += 60
    models._lifecycle.unload_excess()
    assert states(models)["b@1"] == "ready"  # unloaded and loaded again it would take as much


def test_a_caller_waits_or_is_told_to_come_again(
    start: Start, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = start("a", "b", max_bytes=150)
    source.gate.clear()
    gone = threading.Event()
    thread, outcome = in_thread(lambda: leased(models, "b", is_cancelled=gone.is_set))
    eventually(lambda: states(models)["b@1"] == "loading", "it is loaded")
    gone.set()
    thread.join(30)
    (error,) = outcome
    assert isinstance(error, OverloadedError)
    assert error.retry_after_ms
    thread, outcome = in_thread(lambda: leased(models, "b"))
    source.gate.set()
    thread.join(30)
    assert outcome == ["b@1"]


def test_what_does_not_load_is_not_tried_by_every_call(start: Start, source: FakeSource) -> None:
    now = [0.0]
    models = start("a", "b", max_bytes=150, clock=lambda: now[0])
    source.broken.add("b@1")
    tried = []
    load = source.load_model
    source.load_model = lambda bundle: tried.append(bundle.name) or load(bundle)  # type: ignore
    for _ in range(3):
        with pytest.raises(OverloadedError, match="cannot be loaded"):
            leased(models, "b")
    assert tried == ["b"]
    assert models.serves
    source.broken.clear()
    now[0] += 31
    assert leased(models, "b") == "b@1"


def test_force_cuts_off_the_calls(start: Start, source: FakeSource) -> None:
    models = start("a", "b")
    with models.lease("b"):
        models.unload_model("b", force=True)
        assert source.closed == ["b@1"]
        assert states(models) == {"a@1": "ready"}
    assert states(models) == {"a@1": "ready"}


def test_what_was_cut_off_takes_no_memory_and_comes_again(start: Start, source: FakeSource) -> None:
    models = start("a", "b", max_bytes=250)
    with models.lease("b"):  # by a client that never hears of it
        models.unload_model("b", force=True)
        thread, outcome = in_thread(lambda: models.load_model("b"))
        thread.join(30)
        assert outcome == ["b@1"]
        with models.lease("a"), models.lease("b"):
            pass
    assert leased(models, "b") == "b@1"
    assert source.loaded == ["a@1", "b@1", "b@1"]
    assert source.closed == ["b@1"]


def test_a_version_given_twice_is_loaded_once(start: Start, source: FakeSource) -> None:
    start("a", "a@1", "b", "b@1").close()
    assert source.loaded == ["a@1", "b@1"]
    assert sorted(source.closed) == source.loaded


@pytest.mark.parametrize("names", [("b@0", "b"), ("b", "b@0"), ("a", "b@0", "b")])
def test_a_plain_name_is_what_is_installed(start: Start, names: tuple[str, ...]) -> None:
    models = start(*names)
    assert leased(models, "b") == "b@1"
    assert leased(models, "b@0") == "b@0"


def test_a_swap_back_while_the_old_one_is_held(start: Start, source: FakeSource) -> None:
    models = start("a")
    with models.lease("a"):
        source.hashes["a"] = "2"
        assert models.swap_model("a") == "a@2"
        assert states(models)["a@1"] == "retiring"
        thread, outcome = in_thread(lambda: models.swap_model("a@1"))
        thread.join(30)
        assert outcome == ["a@1"]
        eventually(lambda: states(models) == {"a@1": "ready"}, "the other one is gone")
    assert leased(models, "a") == "a@1"
    assert source.loaded == ["a@1", "a@2"]
    assert source.closed == ["a@2"]


def test_a_version_with_other_exits_or_ranges_is_not_taken_for_the_same(
    start: Start, source: FakeSource
) -> None:
    models = start("a", "b")
    source.layers = (3, 6)
    for change in (models.swap_model, models.load_model):
        with pytest.raises(InvalidCommandError, match="other exit layers"):
            change("b")
    assert leased(models, "b") == "b@1"
    models.unload_model("b", force=True)
    assert models.load_model("b") == "b@1"
    assert models.bundles()["b@1"].layers == (3, 6)
    source.ranges = {"cut": SimpleNamespace(hash="1")}
    with pytest.raises(InvalidCommandError, match="int8 ranges"):
        models.swap_model("b@1")
    assert source.loaded == ["a@1", "b@1", "b@1"]


def test_a_model_loaded_on_demand_is_described_as_it_is_by_then(
    start: Start, source: FakeSource
) -> None:
    models = start("a", "b", max_bytes=150)
    source.layers = (3, 6)
    leased(models, "b")
    assert models.bundles()["b@1"].layers == (3, 6)
    assert models.swap_model("b") == "b@1"


def test_what_cannot_be_measured_counts_with_its_files(start: Start, source: FakeSource) -> None:
    source.sizes = dict.fromkeys(("a@1", "b@1", "c@1"), 0)
    models = start("a", "b", "c", max_bytes=250)
    assert states(models) == {"a@1": "ready", "b@1": "ready", "c@1": "configured"}
    leased(models, "a")
    assert leased(models, "c") == "c@1"
    assert states(models) == {"a@1": "ready", "b@1": "configured", "c@1": "ready"}


def test_the_end_stops_loads_that_wait_for_others(start: Start, source: FakeSource) -> None:
    models = start("a", loadable=["b", "c"])
    tried = []
    load = source.load_model
    source.load_model = lambda bundle: tried.append(bundle.name) or load(bundle)  # type: ignore
    source.gate.clear()
    first, _ = in_thread(lambda: models.load_model("b"))
    eventually(lambda: tried == ["b"], "one is loaded")
    second, outcome = in_thread(lambda: models.load_model("c"))
    eventually(lambda: states(models).get("c@1") == "loading", "another one waits")
    loaders = [one for one in threading.enumerate() if one.name.startswith("load ")]
    closing, _ = in_thread(models.close)
    second.join(30)
    assert isinstance(outcome[0], DrainingError)
    source.gate.set()
    for thread in (first, closing, *loaders):
        thread.join(30)
    assert len(loaders) == 2
    assert tried == ["b"]
    assert sorted(source.closed) == ["a@1", "b@1"]


def test_what_is_loaded_is_not_unloaded_meanwhile(start: Start, source: FakeSource) -> None:
    models = start("a", loadable=["b"])
    source.gate.clear()
    thread, outcome = in_thread(lambda: models.load_model("b"))
    eventually(lambda: states(models).get("b@1") == "loading", "it is loaded")
    with pytest.raises(OverloadedError, match="being loaded"):
        models.unload_model("b@1")
    source.gate.set()
    thread.join(30)
    assert outcome == ["b@1"]


def test_the_end_comes_to_all_also_to_those_who_wait(start: Start, source: FakeSource) -> None:
    models = start("a", "b", loadable=["c"])
    source.gate.clear()
    thread, outcome = in_thread(lambda: models.load_model("c"))
    eventually(lambda: states(models).get("c@1") == "loading", "it is loaded")
    closing, _ = in_thread(models.close)
    thread.join(30)
    assert isinstance(outcome[0], DrainingError)
    source.gate.set()
    closing.join(30)
    eventually(lambda: sorted(source.closed) == ["a@1", "b@1", "c@1"], "all are closed")
    with pytest.raises(DrainingError):
        leased(models)


@pytest.mark.parametrize(
    ("asked", "kept", "half"),
    [
        ({}, False, True),
        ({}, True, False),  # the cached vectors also serve calls for float32
        ({"dtype": "float32"}, False, False),
        ({"dtype": "int8"}, False, False),
        ({"dims": 4}, False, False),
        ({"normalized": False}, False, False),
        ({"output": "multi"}, False, False),
        ({"chunking": Chunking.from_text("tokens:8/2:mean")}, False, False),
    ],
)
def test_vectors_are_float16_from_the_graph_on_where_nothing_else_is_done_to_them(
    asked: dict[str, Any], kept: bool, half: bool
) -> None:
    bundle, embedder = SimpleNamespace(dim=8, normalize=True), SimpleNamespace(keeps_vectors=kept)
    model = ServedModel(bundle, embedder, {}, None)  # type: ignore[arg-type]
    spec = VectorSpec("m@1", 8, "float16", 1, "mean", normalized=True)
    assert model.gives_float16(dataclasses.replace(spec, **asked)) == half


@pytest.mark.parametrize("verb", ["load", "close"])
def test_a_thread_that_cannot_start_once_leaves_the_model_usable(
    start: Start, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    # The model stayed `loading`, or was never closed.
    models = start("a", loadable=["b"])
    begin, failed = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(f"{verb} ") and not failed:
            failed.append(thread.name)
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OverloadedError, match="thread"):
        models.load_model("b")
        models.unload_model("b")
    assert failed
    models.load_model("b")
    assert leased(models, "b") == "b@1"
    models.unload_model("b")
    eventually(lambda: states(models) == {"a@1": "ready"}, "it is gone")
