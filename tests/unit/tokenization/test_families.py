"""The tokenizers of every family give what the library gives, however long the text is."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from fletcher.core.batches import TextBatch
from fletcher.tokenization.tokenizer import Tokenizer

FAMILIES = Path(__file__).parents[2] / "golden" / "families"
NAMES = sorted(path.stem for path in FAMILIES.glob("*.parquet"))
# Everything that a tokenizer may treat in a way of its own, and texts without a single boundary.
PIECES = [
    *("a game for two players ", "Words, words! ", "don't ", "1234567 ", "naïve café ", "Ǆ ﬁ ½ "),
    *(
        "日本語の文章",
        "한국어 ",
        "e\u0301\u0323",
        "\u200d\u200b",
        "😀👍🏽",
        "\t\n\r\n  ",
        "\u00a0\u3000",
    ),
    *("<s>", "</s>", "<pad>", "[MASK]", " <mask>", "<|endoftext|>", "▁", "Ġ", "##ing", "x" * 300),
]
MAX_LENGTH = 20


def text_batch(texts: list[str], truncate: str) -> TextBatch:
    data = [text.encode() for text in texts]
    return TextBatch(b"".join(data), np.cumsum([0, *map(len, data)]), truncate=truncate)


def texts() -> list[str]:
    generator = np.random.default_rng(17)
    lengths = [*range(1, 12), *[60] * 6, 300]
    return ["".join(generator.choice(PIECES, length)) for length in lengths]


@pytest.mark.parametrize("truncate", ["end", "start"])
@pytest.mark.parametrize("name", NAMES)
def test_truncated_texts_have_the_librarys_tokens(name: str, truncate: str) -> None:
    path = str(FAMILIES / name / "tokenizer.json")
    reference = tokenizers.Tokenizer.from_file(path)
    direction = "left" if truncate == "start" else "right"
    reference.enable_truncation(MAX_LENGTH, direction=direction)
    expected = [one.ids for one in reference.encode_batch(texts())]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(path), max_length=MAX_LENGTH)
    tokens = tokenizer.encode(text_batch(texts(), truncate))
    actual = np.split(tokens.input_ids, tokens.offsets[1:-1])
    assert [ids.tolist() for ids in actual] == expected


def test_a_text_without_tokens_has_the_padding_token() -> None:
    bare = tokenizers.Tokenizer.from_file(str(FAMILIES / "qwen3" / "tokenizer.json"))
    bare.post_processor = None
    tokenizer = Tokenizer(bare, max_length=MAX_LENGTH, pad_token_id=1)
    tokens = tokenizer.encode(text_batch(["", "a", "a" * 99, "", "b"], "error"))
    assert list(tokens.errors) == [2]
    assert np.diff(tokens.offsets).tolist() == [1, 1, 0, 1, 1]
    (letter,) = bare.encode("a").ids
    assert tokens.input_ids[:3].tolist() == [1, letter, 1]
    assert tokens.input_ids.dtype == np.int32
