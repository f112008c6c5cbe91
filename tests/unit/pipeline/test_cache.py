"""The embedding cache: what is found again, what is not, what it takes, in memory and on disk."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fletcher.core.batches import EmbeddingBatch, TextBatch
from fletcher.errors import ConfigError, NotFiniteError, RowTooLargeError
from fletcher.pipeline.cache import _ENTRY_BYTES, EmbeddingCache, MemoryCache
from fletcher.pipeline.disk_cache import DiskCache
from fletcher.telemetry.tracing import Telemetry

MIB = 1 << 20


def texts(*words: str, **fields: Any) -> TextBatch:
    data = [word.encode() for word in words]
    offsets = np.cumsum([0, *(len(one) for one in data)], dtype=np.int64)
    return TextBatch(b"".join(data), offsets, **fields)


def words_of(batch: TextBatch) -> list[str]:
    data = bytes(batch.data)
    return [data[first:last].decode() for first, last in pairwise(batch.offsets)]


def vectors(batch: TextBatch, *, norms: bool = True) -> EmbeddingBatch:
    """Tell texts apart, with digits that no rounding would keep."""
    words = words_of(batch)
    rng = [np.random.default_rng(list(word.encode())) for word in words]
    return EmbeddingBatch(
        embeddings=np.array([one.random(4) for one in rng], np.float32).reshape(-1, 4),
        norms=np.array([len(word) + 0.1 for word in words], np.float32) if norms else None,
        token_count=np.array([len(word) for word in words], np.int32),
        truncated=np.array(["cut" in word for word in words], np.bool_),
    )


def cache_of(backend: Any = None, *scope: str) -> EmbeddingCache:
    return EmbeddingCache(scope or ("m@1",), 4, backend or MemoryCache(MIB), Telemetry())


def check(got: Any, expected: EmbeddingBatch) -> None:
    for name in ("embeddings", "token_count", "truncated", "norms"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("norms", [True, False])
def test_a_text_is_embedded_once_and_found_bit_by_bit(norms: bool) -> None:
    telemetry = Telemetry()
    cache = EmbeddingCache(["m@1"], 4, MemoryCache(MIB), telemetry)
    for words, missing in (
        (("a", "", "long and cut"), ["a", "", "long and cut"]),
        (("b", "a", "c", ""), ["b", "c"]),
        (("c", "long and cut"), []),
    ):
        batch = texts(*words)
        lookup = cache.look_up(batch)
        assert words_of(lookup.missing) == missing
        check(lookup.complete(vectors(lookup.missing, norms=norms)), vectors(batch, norms=norms))
    assert telemetry.cache_hits.values() == {(): 4}
    assert telemetry.cache_misses.values() == {(): 5}
    assert telemetry.cache_memory.values() == {(): 5 * (_ENTRY_BYTES + 4 * 4 + 9)}


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("failed", ["missing", "all of the rest", "one of two"])
def test_a_failed_text_changes_nothing_of_the_others(norms: bool, failed: str) -> None:
    """If no text went through the network, the missing texts' result has no norms."""
    cache = cache_of()
    good = texts("a", "b")
    cache.look_up(good).complete(vectors(good, norms=norms))
    batch = texts("a", "too long", "b", "new")
    refusal = RowTooLargeError("too long")
    lookup = cache.look_up(batch)
    rest = vectors(lookup.missing, norms=norms)
    if failed == "all of the rest":
        result = lookup.complete(refusal)
    else:
        wrong = [0] if failed == "one of two" else [0, 1]
        kept = rest.norms if failed == "one of two" else None
        result = lookup.complete(replace(rest, norms=kept, errors=dict.fromkeys(wrong, refusal)))
    assert isinstance(result, EmbeddingBatch)
    expected = vectors(batch, norms=norms)
    sound = [place for place in range(4) if place not in result.errors]
    assert sound == ([0, 2, 3] if failed == "one of two" else [0, 2])
    np.testing.assert_array_equal(result.embeddings[sound], expected.embeddings[sound])
    if expected.norms is None:
        assert result.norms is None
    else:
        np.testing.assert_array_equal(result.norms[sound], expected.norms[sound])


def test_whatever_changes_a_vector_is_in_its_key() -> None:
    backend = MemoryCache(MIB)
    first = texts("a")
    cache_of(backend).look_up(first).complete(vectors(first))
    assert cache_of(backend).look_up(first).cached.all()
    for fields in ({"prompt": "q: "}, {"truncate": "start"}, {"max_length": 7}):
        assert not cache_of(backend).look_up(texts("a", **fields)).cached.any()
    assert not cache_of(backend, "m@2").look_up(first).cached.any()
    assert not cache_of(backend, "m@1", "openvino cpu bfloat16").look_up(first).cached.any()


def test_a_text_that_failed_is_not_remembered_and_leaves_the_others() -> None:
    cache = cache_of()
    one = texts("a")
    cache.look_up(one).complete(vectors(one))
    error = RowTooLargeError("too long")
    lookup = cache.look_up(texts("b", "a", "bad"))
    result = vectors(lookup.missing)
    result.errors[1] = error
    got: Any = lookup.complete(result)
    assert got.errors == {2: error}
    np.testing.assert_array_equal(got.embeddings[1], vectors(one).embeddings[0])
    lookup = cache.look_up(texts("bad", "b"))
    assert words_of(lookup.missing) == ["bad"]
    # The whole of it failed: what was cached is there all the same.
    got = lookup.complete(error)
    assert got.errors == {0: error}
    assert cache.look_up(texts("bad")).complete(error) is error


def test_the_least_recently_used_go_first_and_the_bound_holds() -> None:
    value = b"v" * 100
    backend = MemoryCache(3 * (_ENTRY_BYTES + 100))
    keys = [bytes([n]) * 16 for n in range(5)]
    backend.store_values(keys[:3], [value] * 3)
    assert backend.load_values(keys[:1]) == [value]  # used
    backend.store_values(keys[3:4], [value])
    assert [one is not None for one in backend.load_values(keys)] == [
        True,
        False,
        True,
        True,
        False,
    ]
    backend.store_values(keys * 3, [value] * 15)
    assert backend.num_bytes <= 3 * (_ENTRY_BYTES + 100)
    small = MemoryCache(10)
    small.store_values(keys, [value] * 5)
    assert (small.num_bytes, small.load_values(keys)) == (0, [None] * 5)


def test_many_threads() -> None:
    cache = cache_of(MemoryCache(50 * (_ENTRY_BYTES + 25)))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(100):
                batch = texts(*(f"text {n}" for n in rng.integers(0, 100, 10)))
                lookup = cache.look_up(batch)
                check(lookup.complete(vectors(lookup.missing)), vectors(batch))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_on_disk_it_outlives_its_owner(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    batch = texts("a", "b", "long and cut")
    backend = DiskCache(tmp_path / "cache", 64 * MIB)
    cache = cache_of(backend)
    lookup = cache.look_up(batch)
    assert not lookup.cached.any()
    check(lookup.complete(vectors(batch)), vectors(batch))
    backend.close()
    backend.close()
    assert not cache.look_up(batch).cached.any()  # closed, it has nothing, without an error
    backend = DiskCache(tmp_path / "cache", 64 * MIB)
    cache = cache_of(backend)
    lookup = cache.look_up(texts("c", "a", "long and cut"))
    assert words_of(lookup.missing) == ["c"]
    check(lookup.complete(vectors(lookup.missing)), vectors(texts("c", "a", "long and cut")))
    backend.close()


def test_on_disk_the_bound_holds_and_what_is_used_stays(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    bound = 8 * MIB
    backend = DiskCache(tmp_path, bound)
    favourite = b"f" * 16
    backend.store_values([favourite], [b"x" * 1500])
    deadline = time.monotonic() + 30
    for n in range(60):
        keys = [n.to_bytes(8, "big") + bytes([k]) * 8 for k in range(100)]
        backend.store_values(keys, [bytes(1500)] * 100)
        while backend.load_values(keys[-1:]) == [None]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        backend.load_values([favourite])
        assert 0 < backend.num_bytes <= bound
    assert backend.load_values([favourite]) == [b"x" * 1500]
    assert backend.load_values([bytes(8) + bytes(8)]) == [None]
    assert (tmp_path / "data.mdb").stat().st_size <= bound
    backend.close()


def test_a_damaged_value_on_disk_is_none(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    backend = DiskCache(tmp_path, 64 * MIB)
    backend.store_values([b"k" * 16], [b"value"])
    backend.close()
    with lmdb.open(str(tmp_path), max_dbs=3) as env, env.begin(write=True) as transaction:
        values = env.open_db(b"values", txn=transaction)
        stored = transaction.get(b"k" * 16, db=values)
        transaction.put(b"k" * 16, stored[:-1] + b"!", db=values)
    backend = DiskCache(tmp_path, 64 * MIB)
    assert backend.load_values([b"k" * 16]) == [None]
    backend.close()


def test_without_lmdb_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ConfigError, match=r"pip install 'longbow-fletcher\[cache\]'"):
        DiskCache(tmp_path, 64 * MIB)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="embedding_cache_dir"):
        DiskCache(tmp_path / "file", 64 * MIB)


@pytest.mark.parametrize("norm", [None, np.nan, np.inf])
def test_failed_texts_leave_the_others_their_norms(norm: float | None) -> None:
    cache = cache_of()
    first = cache.look_up(texts("a", "b"))
    first.complete(vectors(first.missing))
    lookup = cache.look_up(texts("a", "bad", "b"))
    result = vectors(lookup.missing)
    norms = None if norm is None else np.array([norm], np.float32)
    failed = replace(result, norms=norms, errors={0: NotFiniteError("NaN")})
    found = lookup.complete(failed)
    assert isinstance(found, EmbeddingBatch)
    assert list(found.errors) == [1]
    assert found.norms is not None
    assert found.norms[[0, 2]] == pytest.approx([1.1, 1.1])
    assert words_of(cache.look_up(texts("bad", "a")).missing) == ["bad"]
