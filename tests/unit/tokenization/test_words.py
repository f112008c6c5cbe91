import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fletcher.tokenization.shorten import Shortener
from fletcher.tokenization.words import MAX_WORD_TOKENS, Words
from tests.unit.tokenization.test_tokenizer import REFERENCE, TEXT

BOUNDARIES = Shortener.from_json(REFERENCE.to_str()).boundaries


class Library:
    """The library, and what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.extend(texts)
        encodings = REFERENCE.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def tokens(words, texts):
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    ids, bounds = words.tokenize(b"".join(encoded), offsets)
    assert (ids.dtype, bounds.dtype) == (np.int32, np.int64)
    return [part.tolist() for part in np.split(ids, bounds[1:-1])][: len(texts)]


# So small that words take each other's places all the time; kept from example to example.
CROWDED = Words(Library(), BOUNDARIES, table_bits=3)


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXT, max_size=6))
def test_texts_have_the_tokens_that_the_library_gives_the_whole(texts):
    assert tokens(CROWDED, texts) == Library()(texts)
    assert tokens(CROWDED, texts) == Library()(texts)


def test_the_library_is_asked_for_new_words_only():
    library = Library()
    words = Words(library, BOUNDARIES, table_bits=10)
    texts = ["go the go the", "the going, the"]
    assert tokens(words, texts) == Library()(texts)
    assert sorted(library.asked) == sorted(["go", " the", " go", "the", " going", ","])
    library.asked.clear()
    texts.append("the computer")
    assert tokens(words, texts) == Library()(texts)
    assert library.asked == [" computer"]


def test_long_words_and_those_of_many_tokens_are_not_kept():
    library = Library()
    words = Words(library, BOUNDARIES, table_bits=10)
    many, long, few, short = "a" * (MAX_WORD_TOKENS + 1), "b" * 24, "a" * MAX_WORD_TOKENS, "go" * 11
    for _ in range(2):
        assert tokens(words, [many, long, few, short]) == Library()([many, long, few, short])
    assert [library.asked.count(word) for word in (many, long, few)] == [2, 2, 1]


def test_words_that_are_used_stay_when_others_want_their_place():
    library = Library()
    words = Words(library, BOUNDARIES, table_bits=4)
    for number in range(100):
        tokens(words, [f"go go {number}"])
    assert library.asked.count(" go") < 20


def test_bytes_of_zero_do_not_make_one_word_of_two():
    words = Words(Library(), BOUNDARIES, table_bits=10)
    texts = ["go", "go\0", "go\0\0", "\0", "", "go"]
    for _ in range(2):
        assert tokens(words, texts) == Library()(texts)


class Fails:
    """NumPy whose call number `at` lacks memory."""

    def __init__(self, at):
        self.left = at

    def __getattr__(self, name):
        function = getattr(np, name)
        if isinstance(function, type | np.ufunc) or not callable(function):
            return function

        def call(*args, **named):
            self.left -= 1
            if not self.left:
                raise MemoryError
            return function(*args, **named)

        return call


def test_no_word_has_wrong_tokens_after_a_failure(monkeypatch):
    texts = ["go the going computer aa bb", "cc the dd", "the ee ff go"]
    at, failed = 0, True
    while failed:
        at, failed = at + 1, False
        words = Words(Library(), BOUNDARIES, table_bits=3)
        tokens(words, texts[:1])
        with monkeypatch.context() as patched:
            patched.setattr("fletcher.tokenization.words.np", Fails(at))
            try:
                tokens(words, texts)
            except MemoryError:
                failed = True
        for _ in range(2):
            assert tokens(words, texts) == Library()(texts), at
    assert at > 20
