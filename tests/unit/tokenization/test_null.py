import numpy as np
import pytest

from fletcher.core.batches import TextBatch
from fletcher.errors import RowTooLargeError
from fletcher.tokenization.null import NullTokenizer

TOKENIZER = NullTokenizer(max_length=8)


def encode(texts, **options):
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    tokens = TOKENIZER.encode(TextBatch(b"".join(encoded), offsets, **options))
    return tokens, [part.tolist() for part in np.split(tokens.input_ids, tokens.offsets[1:-1])]


def ids(text):
    data = text.encode()
    parts = [data[first : first + 4] for first in range(0, len(data) + 1, 4)]
    return [int.from_bytes(part, "little") & 0x7FFFFFFF for part in parts]


def test_four_bytes_are_a_token_and_what_is_left_is_the_last():
    texts = ["", "abc", "abcd", "abcdefg", "déjà vu \U0001f642"]
    tokens, rows = encode(texts)
    assert rows == [ids(text) for text in texts]
    assert tokens.token_count.tolist() == [1, 1, 2, 2, 4]
    assert not tokens.truncated.any()


@pytest.mark.parametrize("truncate", ["end", "start"])
def test_long_texts_lose_what_they_would_lose_to_a_real_one(truncate):
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens, rows = encode(["a", text, "b"], truncate=truncate)
    assert rows[1] == (ids(text)[:8] if truncate == "end" else ids(text)[-8:])
    assert tokens.truncated.tolist() == [False, True, False]
    _, rows = encode([text], truncate=truncate, max_length=3)
    assert len(rows[0]) == 3


def test_too_long_is_an_error_where_it_is_asked_to_be():
    tokens, rows = encode(["a", "b" * 99, "c"], truncate="error")
    assert rows == [ids("a"), [], ids("c")]
    assert isinstance(tokens.errors[1], RowTooLargeError)
    assert "25 tokens, expected at most 8" in tokens.errors[1].message


def test_a_prompt_stands_before_every_text():
    _, rows = encode(["ab", ""], prompt="q: ")
    assert rows == [ids("q: ab"), ids("q: ")]


def test_no_texts_give_no_tokens():
    assert encode([])[0].num_texts == 0
