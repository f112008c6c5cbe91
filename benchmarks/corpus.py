"""Texts to measure with: the shared corpus, or the shipped sample if that is absent."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "corpus" / "debian.parquet"
SHIPPED = ROOT / "examples" / "data" / "debian-sample.parquet"


@dataclass(frozen=True)
class Corpus:
    """Real English text: descriptions of Debian packages.

    Attributes:
        name: Name of the file.
        titles: utf8, one short line each.
        bodies: utf8, about 470 characters each.
    """

    name: str
    titles: pa.Array
    bodies: pa.Array

    @classmethod
    def load(cls, path: Path | None = None) -> Corpus:
        """Reads a Parquet file with `title` and `body`; None: the best corpus there is."""
        if path is None:
            path = SHARED if SHARED.is_file() else SHIPPED
            if path is SHIPPED:
                print(f"the shared corpus is not here: using {SHIPPED.name}", file=sys.stderr)
        table = pq.read_table(path, columns=["title", "body"]).combine_chunks()
        titles, bodies = (
            pc.fill_null(table[name].cast(pa.utf8()), "").combine_chunks()
            for name in ("title", "body")
        )
        return cls(f"{path.name}, {table.num_rows:,} rows", titles, bodies)

    def sample(self, num_texts: int, *, seed: int = 0) -> list[str]:
        """A choice of bodies, the same for the same seed; all of them if there are fewer."""
        return self._sample(self.bodies, num_texts, seed)

    def sample_titles(self, num_texts: int, *, seed: int = 0) -> list[str]:
        """A choice of titles, like `sample`."""
        return self._sample(self.titles, num_texts, seed)

    def recombined(
        self, num_rows: int | None, *, batch_rows: int, seed: int = 0
    ) -> Iterator[pa.RecordBatch]:
        """Any number of different texts: the first half of one body, the second of another.

        Args:
            num_rows: None: endless.
            batch_rows: Rows of a batch.
            seed: The same texts for the same seed.

        Yields:
            Batches of `id` int64 and `text` utf8.
        """
        rng = np.random.default_rng(seed)
        middles = pc.divide(pc.utf8_length(self.bodies), 2)
        firsts, seconds = _halves(self.bodies, middles)
        done = 0
        while num_rows is None or done < num_rows:
            size = batch_rows if num_rows is None else min(batch_rows, num_rows - done)
            parts = [
                half.take(pa.array(rng.integers(0, len(half), size))) for half in (firsts, seconds)
            ]
            text = pc.binary_join_element_wise(*parts, " ")
            ids = pa.array(np.arange(done, done + size, dtype=np.int64))
            yield pa.record_batch({"id": ids, "text": text})
            done += size

    @staticmethod
    def _sample(column: pa.Array, num_texts: int, seed: int) -> list[str]:
        order: npt.NDArray[np.intp] = np.random.default_rng(seed).permutation(len(column))
        return list(column.take(pa.array(order[:num_texts])).to_pylist())


def numbered(texts: list[str], *, batch_rows: int) -> list[pa.RecordBatch]:
    """Batches as a client sends them: `id` int64, the place in the list, and `text`."""
    table = pa.table(
        {"id": np.arange(len(texts), dtype=np.int64), "text": pa.array(texts, pa.utf8())}
    )
    return list(table.to_batches(max_chunksize=batch_rows))


def _halves(column: pa.Array, middles: pa.Array) -> tuple[pa.Array, pa.Array]:
    pairs = zip(column.to_pylist(), middles.to_pylist(), strict=True)
    halves = [(text[:middle], text[middle:]) for text, middle in pairs]
    firsts, seconds = zip(*halves, strict=True)
    return pa.array(firsts, pa.utf8()), pa.array(seconds, pa.utf8())
