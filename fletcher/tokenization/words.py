"""Tokens of whole texts, put together from those of their words, most of which were seen before.

Where `Shortener`'s argument holds, a text's tokens are those of its parts between boundary bytes,
one after the other. Such parts, words with the space or the stop before them, come again and
again: the library is asked for new ones only (`python -m benchmarks overhead` compares both).

The table is arrays, too: a word of up to 23 bytes and their number are three integers, its key, and
a hash of them says in which two places it may stand. What is used stays, and what is not gives way.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.batches import BoolArray, Int32Array, Int64Array

# 57 bytes each: 15 MB. Of texts with 107,000 different words, 70 in each, so many places lack a
# third of a word a text; half as many lack one.
TABLE_BITS = 18
MAX_WORD_BYTES = 23
# A word of more is not kept.
MAX_WORD_TOKENS = 6

Encode = Callable[[list[str]], list[list[int]]]
_Keys = npt.NDArray[np.uint64]  # [3, num_words]

_FACTORS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
# The first n bytes of eight, as a little-endian integer.
_FIRST = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


class Words:
    """Texts to ids by their words. Not for several threads at once.

    Args:
        encode: Texts to their ids without special tokens.
        boundaries: bool [256], bytes at which a word begins; at least one is True.
        table_bits: Words that are kept, as a power of two.
    """

    def __init__(
        self, encode: Encode, boundaries: BoolArray, *, table_bits: int = TABLE_BITS
    ) -> None:
        self._encode = encode
        self._boundaries = boundaries
        self._shift = np.uint64(64 - table_bits)
        size = 1 << table_bits
        self._keys: _Keys = np.zeros((3, size), np.uint64)  # no word has a key of zeros
        self._lengths: Int64Array = np.zeros(size, np.int64)
        self._used: BoolArray = np.zeros(size, np.bool_)
        # Each place's ids; behind them is room for those of words that are not in the table.
        self._ids: Int32Array = np.zeros(size * MAX_WORD_TOKENS, np.int32)

    def tokens(
        self, data: bytes | memoryview, offsets: Int64Array
    ) -> tuple[Int32Array, Int64Array]:
        """The ids of texts without special tokens.

        Args:
            data: UTF-8.
            offsets: int64 [num_texts + 1] into it, from 0 to its end.

        Returns:
            int32, one text after the other; int64 [num_texts + 1], where each begins there.
        """
        view = np.frombuffer(data, np.uint8)
        begins = np.take(self._boundaries, view)
        begins[offsets[offsets < len(view)]] = True
        firsts = np.flatnonzero(begins)
        bounds = np.append(firsts, len(view))
        keys = _keys(view, bounds)
        places, is_known = self._find(keys)
        self._used[places[is_known]] = True
        starts, lengths = places * MAX_WORD_TOKENS, self._lengths[places]
        ids = self._ids
        new = np.flatnonzero(~is_known)
        if new.size:
            ids, starts[new], lengths[new] = self._look_up(data, bounds, new, keys[:, new])
        ends = np.concatenate(([0], np.cumsum(lengths)))
        source = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)
        return ids[source], ends[np.searchsorted(firsts, offsets)]

    def _find(self, keys: _Keys) -> tuple[Int64Array, BoolArray]:
        """Where words stand in the table, and whether they do."""
        places = self._places(keys)
        is_known = self._stands_at(keys, places)
        elsewhere = np.flatnonzero(~is_known)
        if elsewhere.size:
            # The neighbour: mostly in the same line of the processor's cache.
            places[elsewhere] ^= 1
            is_known[elsewhere] = self._stands_at(keys[:, elsewhere], places[elsewhere])
        return places, is_known

    def _places(self, keys: _Keys) -> Int64Array:
        """The first of the two places where each word may stand."""
        mixed = np.bitwise_xor.reduce(keys * _FACTORS[:, None], axis=0)
        mixed ^= mixed >> np.uint64(32)
        mixed *= _FACTORS[0]
        return np.asarray(mixed >> self._shift, np.int64)

    def _stands_at(self, keys: _Keys, places: Int64Array) -> BoolArray:
        equal: BoolArray = self._keys[0][places] == keys[0]
        for mine, theirs in zip(self._keys[1:], keys[1:], strict=True):
            equal &= mine[places] == theirs
        equal &= keys[-1] != 0
        return equal

    def _look_up(
        self, data: bytes | memoryview, bounds: Int64Array, new: Int64Array, keys: _Keys
    ) -> tuple[Int32Array, Int64Array, Int64Array]:
        """Asks the library for words, and keeps them.

        Args:
            data: All texts.
            bounds: int64 [num_words + 1], where each word of them begins.
            new: Which words are asked for.
            keys: [3, num_new], theirs.

        Returns:
            int32, ids; int64 [num_new] each, where a word's begin there, and how many there are.
        """
        buffers = pa.py_buffer(bounds), pa.py_buffer(data)
        words = pa.LargeStringArray.from_buffers(len(bounds) - 1, *buffers)
        encoded = words.take(pa.array(new)).dictionary_encode()
        codes = encoded.indices.to_numpy()
        found = self._encode(encoded.dictionary.to_pylist())
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        table_size = len(self._used) * MAX_WORD_TOKENS
        ends = table_size + np.cumsum(lengths)
        if ends[-1] + MAX_WORD_TOKENS > len(self._ids):
            room = np.zeros(2 * (ends[-1] - table_size) + MAX_WORD_TOKENS, np.int32)
            self._ids = np.concatenate([self._ids[:table_size], room])
        self._ids[table_size : ends[-1]] = np.fromiter(chain.from_iterable(found), np.int32)
        starts = ends - lengths
        _, first_of_each = np.unique(codes, return_index=True)
        self._keep(keys[:, first_of_each], starts, lengths)
        return self._ids, starts[codes], lengths[codes]

    def _keep(self, keys: _Keys, starts: Int64Array, lengths: Int64Array) -> None:
        """Puts words into the table, where they find a place that was not used of late."""
        places = self._places(keys)
        places = np.where(self._used[places], places ^ 1, places)
        fits = (keys[-1] != 0) & (lengths <= MAX_WORD_TOKENS)
        in_use = self._used[places]
        # What is there, and beside it, goes next unless it comes again before.
        self._used[places[fits & in_use]] = self._used[places[fits & in_use] ^ 1] = False
        new = np.flatnonzero(fits & ~in_use)
        places, first_of_each = np.unique(places[new], return_index=True)
        new = new[first_of_each]
        self._keys[:, places] = keys[:, new]
        self._lengths[places] = lengths[new]
        self._used[places] = True
        column = np.arange(MAX_WORD_TOKENS)
        # Behind its own a word gets some of the next one's ids: nobody reads them.
        of_table = self._ids[: len(self._used) * MAX_WORD_TOKENS].reshape(-1, MAX_WORD_TOKENS)
        of_table[places] = self._ids[starts[new][:, None] + column]


def _keys(view: npt.NDArray[np.uint8], bounds: Int64Array) -> _Keys:
    """uint64 [3, num_words]: a word's bytes, padded, and its size in the last one.

    Zeros in the last one: the word is too long to have a key.
    """
    padded = np.append(view, np.zeros(8 * 3, np.uint8))
    at_each = np.ndarray(len(view) + 17, "<u8", padded, strides=(1,))
    sizes, firsts = np.diff(bounds), bounds[:-1]
    keys = np.empty((3, len(firsts)), np.uint64)
    for part in range(3):
        keys[part] = at_each[firsts + 8 * part] & _FIRST[np.clip(sizes - 8 * part, 0, 8)]
    keys[-1] |= sizes.astype(np.uint64) << np.uint64(56)
    keys[-1, sizes > MAX_WORD_BYTES] = 0
    return keys
