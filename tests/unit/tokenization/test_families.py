"""The tokenizers of every family give what the library gives, however long the text is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from fletcher.core.batches import TextBatch
from fletcher.tokenization import tokenizer as tokenizer_module
from fletcher.tokenization.gaps import Gaps
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


LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def kind(name: str, **parts: Any) -> str:
    """tokenizer.json of a family with other parts; `added` are further added tokens."""
    spec = json.loads((FAMILIES / name / "tokenizer.json").read_text())
    for one in parts.pop("added", []):
        spec["added_tokens"].append({"id": 9, "special": False, **FLAGS, **one})
    return json.dumps({**spec, **parts})


# Tokenizers of models that the families do not cover, and added tokens that reach over neighbours.
KINDS = {
    "llama": kind(
        "qwen3",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": LLAMA},
                    "behavior": "Isolated",
                    "invert": False,
                },
                BYTES,
            ],
        },
    ),
    "prefix space": kind(
        "roberta", pre_tokenizer={**BYTES, "use_regex": True, "add_prefix_space": True}
    ),
    "compatibility forms": kind("roberta", normalizer={"type": "NFKC"}),
    "single word": kind("roberta", added=[{"content": "game", "single_word": True}]),
    "takes spaces": kind("roberta", added=[{"content": "game", "lstrip": True, "rstrip": True}]),
    "normalized": kind("roberta", added=[{"content": "for", "normalized": True}]),
    **{name: kind(name) for name in NAMES if name not in ("distilbert", "mpnet")},
    "punctuation in a token": kind("roberta", added=[{"content": "a-b"}, {"content": "x1y"}]),
    "xlm-roberta": kind(
        "xlm_roberta",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {
                    "type": "Metaspace",
                    "replacement": "▁",
                    "prepend_scheme": "always",
                    "split": True,
                },
            ],
        },
    ),
    "first space": kind(
        "xlm_roberta",
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": True,
        },
    ),
    "never split": kind(
        "xlm_roberta",
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "never",
            "split": False,
        },
    ),
}


# Kinds whose texts may be divided nowhere.
NO_GAPS = ("takes spaces", "never split")


@pytest.mark.parametrize("truncate", ["end", "start"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tokenizer_has_the_librarys_tokens(name: str, truncate: str) -> None:
    reference = tokenizers.Tokenizer.from_str(KINDS[name])
    direction = "left" if truncate == "start" else "right"
    reference.enable_truncation(MAX_LENGTH, direction=direction)
    expected = [one.ids for one in reference.encode_batch(texts())]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(KINDS[name]), max_length=MAX_LENGTH)
    tokens = tokenizer.encode(text_batch(texts(), truncate))
    actual = np.split(tokens.input_ids, tokens.offsets[1:-1])
    assert [ids.tolist() for ids in actual] == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_text_has_the_tokens_of_its_parts_at_every_gap(name: str) -> None:
    gaps = Gaps.from_json(json.loads(KINDS[name]))
    if name in NO_GAPS:
        assert gaps is None
        return
    assert gaps is not None
    library = tokenizers.Tokenizer.from_str(KINDS[name])

    def tokens(part: bytes) -> list[int]:
        ids: list[int] = library.encode(part.decode(), add_special_tokens=False).ids
        return ids

    generator = np.random.default_rng(23)
    count = 0
    for _ in range(30):
        text = "".join(
            generator.choice([*PIECES, "game", "1", "'s", "for", "=\u0338"], 25)
        ).encode()
        whole = tokens(text)
        for place in gaps.places(np.frombuffer(text, np.uint8)).tolist():
            assert tokens(text[:place]) + tokens(text[place:]) == whole, (
                text[:place],
                text[place:],
            )
            count += 1
    assert count > 100


@pytest.mark.parametrize("name", sorted({*NAMES} - {"distilbert", "mpnet", "nomic_bert"}))
@pytest.mark.parametrize("truncate", ["end", "start"])
def test_little_of_a_huge_text_is_tokenized(
    name: str, truncate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library takes 200 bytes of memory for each byte of a text."""
    path = str(FAMILIES / name / "tokenizer.json")
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(path), max_length=MAX_LENGTH)
    sizes: list[int] = []
    library = tokenizer._library
    monkeypatch.setattr(
        tokenizer, "_library", lambda texts: sizes.extend(map(len, texts)) or library(texts)
    )
    tokens = tokenizer.encode(text_batch(["lorem ipsum, " * 100_000], truncate))
    assert tokens.truncated.tolist() == [True]
    assert tokens.offsets.tolist() == [0, MAX_LENGTH]
    assert sum(sizes) < 1000


def test_a_huge_word_is_refused_and_costs_other_texts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer_module, "_MAX_UNDIVIDED_BYTES", 20_000)
    path = str(FAMILIES / "roberta" / "tokenizer.json")
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(path), max_length=MAX_LENGTH)
    batch = text_batch(["a game", "x" * 100_000, "for two players", " " * 100_000], "end")
    tokens = tokenizer.encode(batch)
    assert sorted(tokens.errors) == [1, 3]
    assert "shorten it" in tokens.errors[1].message
    small = tokenizer.encode(text_batch(["a game", "for two players"], "end"))
    assert tokens.input_ids.tolist() == small.input_ids.tolist()
    assert np.diff(tokens.offsets)[[1, 3]].tolist() == [0, 0]


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
