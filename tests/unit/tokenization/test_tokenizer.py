import os
import string

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace
from tokenizers.processors import TemplateProcessing

from fletcher.core.batches import TextBatch
from fletcher.errors import InvalidCommandError, ModelError, RowTooLargeError
from fletcher.models.bundle.bundle import write_manifest
from fletcher.models.bundle.spec import ModelSpec
from fletcher.tokenization import tokenizer as tokenizer_module
from fletcher.tokenization.shorten import Shortener
from fletcher.tokenization.tokenizer import Tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = string.ascii_lowercase + string.digits + "éあがกς"
WORDS = ["play", "go", "##ing", "against", "the", "computer", "世", "界", *string.punctuation]
MAX_LENGTH = 12
SPEC = ModelSpec(
    family="bert",
    dim=8,
    max_length=MAX_LENGTH,
    pooling="mean",
    normalize=True,
    num_layers=1,
    layers=(1,),
    dims=(8,),
    prompts={},
    default_prompt=None,
    pad_token_id=0,
    graph_file="model.onnx",
    graph_output="embedding",
    inputs=("input_ids", "attention_mask"),
    outputs=("embedding",),
    licence="",
    source="test",
    weights_sha256="0" * 64,
)


def bert_tokenizer(added=()):
    """The pieces of a real BERT tokenizer with a vocabulary of a few words."""
    pieces = [*SPECIAL, *WORDS, *LETTERS, *("##" + letter for letter in LETTERS)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


REFERENCE = bert_tokenizer()
TOKENIZER = Tokenizer(bert_tokenizer(), max_length=MAX_LENGTH)


def text_batch(texts, **options):
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return TextBatch(b"".join(encoded), offsets, **options)


def rows(tokens):
    return [part.tolist() for part in np.split(tokens.input_ids, tokens.offsets[1:-1])]


def reference(text, truncate, max_length=MAX_LENGTH):
    """Ids and truncation flag as the library has them, from the whole text."""
    bare = REFERENCE.encode(text, add_special_tokens=False).ids
    room = max_length - 2
    kept = bare[-room:] if truncate == "start" else bare[:room]
    return [2, *kept, 3], len(bare) > room


# Characters that each break one step of the argument in shorten.py if it is wrong: whitespace of
# several kinds, deleted and control characters, combining marks, Chinese with and without the
# boundary lead bytes, other scripts, pieces of added tokens, capitals with odd lower cases.
ALPHABET = [
    *" \t\n\r\x0b\x0c\x00\u00a0\u2028\u3000\ufffd\u200b\u200d\xad",
    *"abgopZÀéÉΣςİßﬁ\u0301\u0338\u0345\u3099~<=>.,-_'[]",
    *"世界䶵一龥豈丽あがกิ🙂𠀀",
    *SPECIAL,
    *(
        "play",
        "going",
        "go",
        "b" * 99,
        "b" * 101,
        "c7" * 1200,
        " \n" * 1500,
        "[MASK",
        "MASK]",
        "[S EP]",
    ),
]
TEXT = st.lists(st.sampled_from(ALPHABET), max_size=120).map("".join)


@pytest.fixture(params=[0, 512], autouse=True, scope="module")
def few_bytes(request):
    """Texts put together from words, however little they are, and as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_MIN_BYTES_FOR_WORDS", request.param)
        yield


@settings(deadline=None, max_examples=300)
@given(TEXT, st.sampled_from(["end", "start"]))
@example("b" * 500 + "[SEP]" + "b" * 5000 + "[SEP]go", "end")
@example("c7" * 4000 + "\u0301 go" * 3, "start")
def test_a_text_that_was_shortened_has_the_tokens_of_the_whole(text, truncate):
    tokens = TOKENIZER.encode(text_batch([text], truncate=truncate))
    ids, truncated = reference(text, truncate)
    assert rows(tokens) == [ids]
    assert tokens.truncated.tolist() == [truncated]


@settings(deadline=None, max_examples=300)
@given(TEXT, st.integers(1, 400), st.booleans())
def test_a_part_has_the_first_or_last_tokens_of_the_whole(text, size, from_end):
    encoded = text.encode()
    part, is_cut = Shortener.from_json(REFERENCE.to_str()).shorten(
        memoryview(encoded), size, from_end
    )
    whole = REFERENCE.encode(text, add_special_tokens=False).ids
    kept_ids = REFERENCE.encode(str(part, "utf-8"), add_special_tokens=False).ids
    assert is_cut == (len(encoded) > size)
    if not is_cut:
        assert kept_ids == whole
    else:
        assert len(part) <= size
        assert kept_ids == (
            whole[len(whole) - len(kept_ids) :] if from_end else whole[: len(kept_ids)]
        )


@pytest.mark.parametrize(
    "character", ["あ", "が", "ก", "é", "\u0301", "🙂", "𠀀", "\u00a0", "\x00"]
)
def test_nothing_is_cut_before_a_character_that_may_join_the_word(character):
    text = ("go" + character).encode()
    shortener = Shortener.from_json(REFERENCE.to_str())
    part, is_cut = shortener.shorten(memoryview(text), len(character.encode()), True)
    assert (bytes(part), is_cut) == (b"", True)


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXT, max_size=12), st.integers(3, MAX_LENGTH + 5))
def test_a_batch_is_its_texts_one_by_one(texts, max_length):
    tokens = TOKENIZER.encode(text_batch(texts, max_length=max_length))
    expected = [reference(text, "end", min(max_length, MAX_LENGTH)) for text in texts]
    assert rows(tokens)[: len(texts)] == [ids for ids, _ in expected]
    assert tokens.truncated.tolist() == [truncated for _, truncated in expected]
    assert tokens.token_count.tolist() == [len(ids) for ids, _ in expected]
    assert tokens.input_ids.dtype == np.int32
    assert tokens.offsets.dtype == np.int64


def test_truncation_agrees_with_the_librarys_own():
    text = "play go against the computer " * 3
    for direction in ("right", "left"):
        tokenizer = bert_tokenizer()
        tokenizer.enable_truncation(MAX_LENGTH, direction=direction)
        truncate = "end" if direction == "right" else "start"
        tokens = TOKENIZER.encode(text_batch([text], truncate=truncate))
        assert rows(tokens) == [tokenizer.encode(text).ids]


@pytest.fixture(params=["few", "many"])
def _few_or_many(request, monkeypatch):
    """A little text goes a shorter way: both must give the same."""
    if request.param == "many":
        monkeypatch.setattr(tokenizer_module, "_FEW_BYTES", -1)


@pytest.mark.usefixtures("_few_or_many")
def test_offsets_need_not_start_at_zero():
    batch = TextBatch(b"xxgo play", np.array([2, 4, 9], dtype=np.int64))
    assert rows(TOKENIZER.encode(batch)) == [
        reference("go", "end")[0],
        reference(" play", "end")[0],
    ]


@pytest.mark.usefixtures("_few_or_many")
@pytest.mark.parametrize("texts", [["go"], ["go", "", "play the computer"], ["the " * 11]])
def test_a_little_text_with_and_without_a_prompt(texts):
    for prompt in ("", "play: "):
        tokens = TOKENIZER.encode(text_batch(texts, prompt=prompt))
        expected = [reference(prompt + text, "end") for text in texts]
        assert rows(tokens) == [ids for ids, _ in expected]
        assert tokens.truncated.tolist() == [truncated for _, truncated in expected]
        assert (tokens.input_ids.dtype, tokens.offsets.dtype) == (np.int32, np.int64)


def test_a_prompt_goes_before_every_text_and_counts():
    tokens = TOKENIZER.encode(text_batch(["go", "", "the " * 20], prompt="play: "))
    expected = [reference("play: " + text, "end") for text in ("go", "", "the " * 20)]
    assert rows(tokens) == [ids for ids, _ in expected]
    assert tokens.truncated.tolist() == [False, False, True]


def test_a_text_without_tokens_is_the_same_alone_and_in_company():
    library = bert_tokenizer()
    library.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer = Tokenizer(library, max_length=MAX_LENGTH, pad_token_id=7)
    assert rows(tokenizer.encode(text_batch([""]))) == [[7]]
    assert rows(tokenizer.encode(text_batch(["", "go " * 300])))[0] == [7]


def test_too_many_tokens_are_an_error_of_that_row_alone():
    texts = ["go", "go " * 11, "go " * 10, "go " * 5000]
    tokens = TOKENIZER.encode(text_batch(texts, truncate="error"))
    assert tokens.token_count.tolist() == [3, 0, 12, 0]
    assert sorted(tokens.errors) == [1, 3]
    assert all(isinstance(error, RowTooLargeError) for error in tokens.errors.values())
    assert "has 13 tokens, expected at most 12" in tokens.errors[1].message
    assert "at least" in tokens.errors[3].message
    assert not tokens.truncated.any()


def test_no_texts_give_no_tokens():
    tokens = TOKENIZER.encode(text_batch([]))
    assert tokens.num_texts == 0
    assert len(tokens.input_ids) == 0


def test_a_max_length_without_room_for_text_is_refused():
    with pytest.raises(InvalidCommandError, match="`max_length` is 2, expected 3 to 12"):
        TOKENIZER.encode(text_batch(["go"], max_length=2))


@pytest.mark.parametrize(
    "text",
    [
        "play go " * (1 << 18),
        "a" * (1 << 21),
        "世界" * (1 << 18),
        "go " + "x" * (1 << 21),
        " " * (1 << 21),
    ],
    ids=["words", "one word", "Chinese", "a word, then one without end", "spaces"],
)
@pytest.mark.parametrize("truncate", ["end", "start"])
def test_a_very_long_text_is_not_tokenized_whole(text, truncate):
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(REFERENCE, name)

        def encode_batch_fast(self, texts, **options):
            seen.extend(map(len, texts))
            return REFERENCE.encode_batch_fast(texts, **options)

    tokens = Tokenizer(Counting(), max_length=MAX_LENGTH).encode(
        text_batch([text], truncate=truncate)
    )
    assert len(tokens.input_ids) <= MAX_LENGTH
    assert sum(seen) < 20_000


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", Lowercase()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", Whitespace()),
        lambda tokenizer: tokenizer.add_tokens(["new york"]),
        lambda tokenizer: tokenizer.add_tokens(["naïve"]),
        lambda tokenizer: tokenizer.add_tokens([tokenizers.AddedToken("go", single_word=True)]),
    ],
)
def test_where_the_argument_does_not_hold_nothing_is_cut(change):
    tokenizer = bert_tokenizer()
    change(tokenizer)
    shortener = Shortener.from_json(tokenizer.to_str())
    assert not shortener.boundaries.any()
    assert shortener.run is None
    ours = Tokenizer(tokenizer, max_length=MAX_LENGTH)
    text = "new york play go naïve " * 40
    expected = tokenizer.encode(text, add_special_tokens=False).ids[: MAX_LENGTH - 2]
    assert rows(ours.encode(text_batch([text]))) == [[2, *expected, 3]]


def test_added_tokens_keep_their_punctuation_and_runs_whole():
    boundaries = Shortener.from_json(REFERENCE.to_str()).boundaries
    expected = set(string.punctuation.encode() + b" \t\n\r") - set(b"[]") | {*range(0xE5, 0xE9)}
    assert set(np.flatnonzero(boundaries).tolist()) == expected
    letters = memoryview(b"b" * 1500 + b"foo" + b"b" * 1500)
    kept, _ = Shortener.from_json(bert_tokenizer(added=["foo"]).to_str()).shorten(
        letters, 9999, False
    )
    assert kept == letters


def test_a_damaged_tokenizer_is_a_clear_error(make_bundle):
    folder = make_bundle(b"{ not a tokenizer")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_bundle(folder)


def test_a_bundles_tokenizer_is_loaded_with_its_length(make_bundle, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer = Tokenizer.from_bundle(make_bundle(REFERENCE.to_str().encode()))
    assert tokenizer.max_length == MAX_LENGTH
    assert tokenizer.num_special_tokens == 2
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@pytest.fixture
def make_bundle(tmp_path):
    def make(tokenizer_json):
        (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
        (tmp_path / "model.onnx").write_bytes(b"unread")
        write_manifest(tmp_path, "tiny", SPEC)
        return tmp_path

    return make
