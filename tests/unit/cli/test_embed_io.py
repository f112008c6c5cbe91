"""Standard input of `fletcher embed -`: lines, and one growing text."""

import io

import pytest

from fletcher.cli import embed_io
from fletcher.errors import InvalidCommandError


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_lines_end_in_three_ways_and_a_mark_is_no_text(end: bytes) -> None:
    stdin = io.BufferedReader(io.BytesIO(b"\xef\xbb\xbfa" + end + end + b" b" + end))
    assert list(embed_io.lines(stdin)) == ["a", "", " b"]


def test_a_mark_within_the_input_is_text_and_other_encodings_are_refused() -> None:
    stdin = io.BufferedReader(io.BytesIO("a\n\ufeffb".encode()))
    assert list(embed_io.lines(stdin)) == ["a", "\ufeffb"]
    with pytest.raises(InvalidCommandError, match="line 2"):
        list(embed_io.lines(io.BufferedReader(io.BytesIO(b"a\n\xff"))))


def test_a_growing_text_has_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.BufferedReader(io.BytesIO("\ufeffa\ufeffb".encode()))
    monkeypatch.setattr(embed_io, "_standard_input", lambda: stdin)
    texts = [batch.column("text")[0].as_py() for batch in embed_io.TextStream().batches()]
    assert "".join(texts) == "a\ufeffb"
