"""Table of words and their tokens, so that the library tokenizes each word once.

`fletcher.tokenization.shorten` shows for some tokenizers that a text can be split before boundary
bytes: the tokens of its parts, joined, are the tokens of the text. Such a part is a word with the
space or full stop before it. Words recur, so the library is called only for new words
(`python -m benchmarks overhead` compares both ways).

The table consists of arrays. The key of a word is three integers, made from its bytes (at most 23)
and its size. A hash of the key gives two places in the table where the word may be. Words that were
used recently stay, and other words are replaced.

Why no library: a dictionary of words costs a Python call for each word.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fletcher.core.batches import BoolArray, Int32Array, Int64Array

# Places have 57 bytes each, so the table has 15 MB. Measured on texts of 70 words with 107,000
# distinct words in all: with this size the table lacks a third of a word per text on average, and
# one word per text with half the size.
TABLE_BITS = 18
MAX_WORD_BYTES = 23
# Words with more tokens are not put into the table.
MAX_WORD_TOKENS = 6

Encode = Callable[[list[str]], list[list[int]]]
_Keys = npt.NDArray[np.uint64]  # [3, num_words]

_FACTORS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
# The first n bytes of eight, as a little-endian integer.
_FIRST = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


class Words:
    """Tokenizes texts by their words. Not thread-safe.

    Args:
        encode: The library's tokenizer: returns the tokens of each text.
        boundaries: bool [256], True for bytes at which a word starts. At least one is True.
        table_bits: Binary logarithm of the number of places in the table.
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
        # Tokens of the word at each place, followed by room for tokens of words not in the table.
        self._ids: Int32Array = np.zeros(size * MAX_WORD_TOKENS, np.int32)

    def tokenize(
        self, data: bytes | memoryview, offsets: Int64Array
    ) -> tuple[Int32Array, Int64Array]:
        """Tokenizes texts, without adding special tokens.

        Args:
            data: UTF-8 bytes of all texts.
            offsets: int64 [num_texts + 1], offsets of the texts in `data`, from 0 to its end.

        Returns:
            Two values: int32, the tokens of all texts; int64 [num_texts + 1], the offsets of the
            texts in these tokens.
        """
        view = np.frombuffer(data, np.uint8)
        begins = np.take(self._boundaries, view)
        begins[offsets[offsets < len(view)]] = True
        firsts = np.flatnonzero(begins)
        bounds = np.append(firsts, len(view))
        keys = _keys(view, bounds)
        places, is_cached = self._find(keys)
        self._used[places[is_cached]] = True
        starts, lengths = places * MAX_WORD_TOKENS, self._lengths[places]
        ids = self._ids
        new = np.flatnonzero(~is_cached)
        if new.size:
            ids, starts[new], lengths[new] = self._look_up(data, bounds, new, keys[:, new])
        ends = np.concatenate(([0], np.cumsum(lengths)))
        source = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)
        return ids[source], ends[np.searchsorted(firsts, offsets)]

    def _find(self, keys: _Keys) -> tuple[Int64Array, BoolArray]:
        """Returns the places of words, and whether each word is in the table."""
        places = self._places(keys)
        is_cached = self._is_at(keys, places)
        elsewhere = np.flatnonzero(~is_cached)
        if elsewhere.size:
            # The second place is next to the first, mostly in the same line of the CPU's cache.
            places[elsewhere] ^= 1
            is_cached[elsewhere] = self._is_at(keys[:, elsewhere], places[elsewhere])
        return places, is_cached

    def _places(self, keys: _Keys) -> Int64Array:
        """Returns the first of the two places where each word may be."""
        mixed = np.bitwise_xor.reduce(keys * _FACTORS[:, None], axis=0)
        mixed ^= mixed >> np.uint64(32)
        mixed *= _FACTORS[0]
        return np.asarray(mixed >> self._shift, np.int64)

    def _is_at(self, keys: _Keys, places: Int64Array) -> BoolArray:
        equal: BoolArray = self._keys[0][places] == keys[0]
        for mine, theirs in zip(self._keys[1:], keys[1:], strict=True):
            equal &= mine[places] == theirs
        equal &= keys[-1] != 0
        return equal

    def _look_up(
        self, data: bytes | memoryview, bounds: Int64Array, new: Int64Array, keys: _Keys
    ) -> tuple[Int32Array, Int64Array, Int64Array]:
        """Tokenizes words with the library, and puts them into the table.

        Returns:
            Three values: int32, an array of tokens; int64 [num_new], the index of each word's first
            token in that array; int64 [num_new], each word's number of tokens.
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
        """Puts each word into the table if one of its places was not used recently."""
        places = self._places(keys)
        places = np.where(self._used[places], places ^ 1, places)
        fits = (keys[-1] != 0) & (lengths <= MAX_WORD_TOKENS)
        in_use = self._used[places]
        # If both places of a word are in use, the words there may be replaced the next time, unless
        # they are used again until then.
        self._used[places[fits & in_use]] = self._used[places[fits & in_use] ^ 1] = False
        new = np.flatnonzero(fits & ~in_use)
        places, first_of_each = np.unique(places[new], return_index=True)
        new = new[first_of_each]
        # Behind a short word's tokens, its place gets tokens of other words, which are never read.
        of_table = self._ids[: len(self._used) * MAX_WORD_TOKENS].reshape(-1, MAX_WORD_TOKENS)
        # Until everything else is written, the last part of the key says that the place is free.
        # Any of these steps may lack memory, and a word must not be found with another's tokens.
        self._keys[-1, places] = 0
        of_table[places] = self._ids[starts[new][:, None] + np.arange(MAX_WORD_TOKENS)]
        self._lengths[places] = lengths[new]
        self._used[places] = True
        self._keys[:-1, places] = keys[:-1, new]
        self._keys[-1, places] = keys[-1, new]


def _keys(view: npt.NDArray[np.uint8], bounds: Int64Array) -> _Keys:
    """Returns uint64 [3, num_words], the key of each word.

    A key is the word's bytes, padded with zeros to 23, and then its size in the last byte. The last
    integer is 0 for words that are too long for a key.
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
