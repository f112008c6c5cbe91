"""Parser of filters written as text: `year >= 2020 and not lang in (de, fr)`.

    condition := conjunction ("or" conjunction)*
    conjunction := term ("and" term)*
    term := "not" term | "(" condition ")" | test
    test := NAME OPERATOR VALUE | NAME ["not"] "in" "(" VALUE ("," VALUE)* ")"
          | NAME "is" ["not"] "null"

A name with spaces or signs is quoted by " or `, a text by ' or ". A quote inside is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa

from fletcher.config.option import nearest
from fletcher.errors import ColumnTypeError, InvalidCommandError, UnknownColumnError
from fletcher.stores.base import Combination, Comparison, Filter, Negation, Operator
from fletcher.stores.filter_values import MAX_EXPONENT, bind_filters, is_number

MAX_LENGTH = 65_536
MAX_DEPTH = 16
MAX_TESTS = 1000

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<quoted>'(?:[^']|'')*' | "(?:[^"]|"")*" | `(?:[^`]|``)*`)
      | (?P<sign>==|!=|<>|>=|<=|[=<>(),])
      | (?P<word>[^\s'"`=!<>(),]+)
    )""",
    re.VERBOSE,
)
_OPERATORS: dict[str, Operator] = {
    "=": "=",
    "==": "=",
    "!=": "!=",
    "<>": "!=",
    "<": "<",
    "<=": "<=",
    ">": ">",
    ">=": ">=",
}
_KEYWORDS = ("and", "or", "not", "in", "is", "null")
_WHOLE = re.compile(r"[+-]?\d{1,100}")
_NUMBER = re.compile(r"[+-]?(\d{1,100}(\.\d{0,100})?|\.\d{1,100})([eE][+-]?\d{1,4})?")
_SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # `quoted`, `sign`, `word` or `end`
    text: str  # without quotes
    start: int  # index of the first character in the filter
    quote: str = ""

    @property
    def keyword(self) -> str:
        """The keyword that the token is, in lower case; empty for other tokens."""
        word = self.text.lower() if self.kind == "word" else ""
        return word if word in _KEYWORDS else ""

    def __str__(self) -> str:
        if self.kind == "end":
            return "the end"
        return f"{self.quote}{self.text[:100]}{self.quote}"


def parse_filter(text: str, schema: pa.Schema) -> Filter:
    """The filter that a text describes, for rows of a schema.

    Raises:
        InvalidCommandError: The text is not a filter, or a value does not fit its column; the
            message has the position of the mistake.
        UnknownColumnError: It names a column that the schema lacks.
    """
    if len(text) > MAX_LENGTH:
        raise InvalidCommandError(
            f"`filter` has {len(text)} characters, expected at most {MAX_LENGTH}", field="filter"
        )
    if not text.isascii() and text.encode(errors="replace").decode() != text:
        raise InvalidCommandError("`filter` is not UTF-8", field="filter")
    return _Parser(text, schema).parse_all()


class _Parser:
    def __init__(self, text: str, schema: pa.Schema) -> None:
        self._text = text
        self._schema = schema
        self._tokens = _split(text)
        self._next = 0
        self._num_tests = 0

    def parse_all(self) -> Filter:
        found = self._condition(0)
        token = self._peek()
        if token.kind != "end":
            raise self._wrong(token, "`and`, `or` or the end (a text with spaces is quoted)")
        return found

    def _condition(self, depth: int) -> Filter:
        parts = [self._conjunction(depth)]
        while self._take_keyword("or"):
            parts.append(self._conjunction(depth))
        return parts[0] if len(parts) == 1 else Combination("or", tuple(parts))

    def _conjunction(self, depth: int) -> Filter:
        parts = [self._term(depth)]
        while self._take_keyword("and"):
            parts.append(self._term(depth))
        return parts[0] if len(parts) == 1 else Combination("and", tuple(parts))

    def _term(self, depth: int) -> Filter:
        token = self._peek()
        if depth > MAX_DEPTH:
            raise _wrong_at(
                self._text, token, f"is nested too deeply; expected at most {MAX_DEPTH} levels"
            )
        if self._take_keyword("not"):
            return Negation(self._term(depth + 1))
        if self._take_sign("("):
            inner = self._condition(depth + 1)
            self._expect_sign(")")
            return inner
        return self._test()

    def _test(self) -> Filter:
        self._num_tests += 1
        start = self._peek()
        if self._num_tests > MAX_TESTS:
            raise _wrong_at(self._text, start, f"has too many tests; expected at most {MAX_TESTS}")
        name = self._name()
        token = self._peek()
        if self._take_keyword("is"):
            negated = self._take_keyword("not")
            if not self._take_keyword("null"):
                raise self._wrong(self._peek(), "`null`")
            return _negated(Comparison(name, "is null"), negated)
        negated = self._take_keyword("not")
        if self._take_keyword("in"):
            self._expect_sign("(")
            values = [self._value(name)]
            while self._take_sign(","):
                values.append(self._value(name))
            self._expect_sign(")")
            return _negated(self._checked(Comparison(name, "in", tuple(values)), start), negated)
        if negated:
            raise self._wrong(self._peek(), "`in`")
        if token.kind != "sign" or token.text not in _OPERATORS:
            raise self._wrong(token, f"{', '.join(_OPERATORS)}, `in` or `is` after the column")
        self._next += 1
        comparison = Comparison(name, _OPERATORS[token.text], self._value(name))
        return self._checked(comparison, start)

    def _name(self) -> str:
        token = self._peek()
        if token.kind not in ("word", "quoted") or token.keyword or token.quote == "'":
            raise self._wrong(token, "the name of a column")
        if token.text not in self._schema.names:
            names = self._schema.names
            raise UnknownColumnError(
                f"`filter` names {token.text[:200]!r} at character {token.start + 1}"
                f"{nearest(token.text[:200], names)}; known: {', '.join(names)}",
                field="filter",
                allowed=names,
            )
        self._next += 1
        return token.text

    def _value(self, name: str) -> Any:
        token = self._peek()
        if token.keyword == "null":
            raise self._wrong(token, f"a value; test for null by `{name} is null`")
        if token.kind not in ("word", "quoted") or token.keyword or token.quote == "`":
            raise self._wrong(token, "a value (quote a text with spaces or signs)")
        self._next += 1
        kind = self._schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        word = token.text if token.kind == "word" else None
        value: Any = token.text  # `_checked` refuses types that cannot be compared
        if pa.types.is_boolean(kind):
            value = None if word is None else _SWITCHES.get(word.lower())
        elif is_number(kind):
            value = None if word is None else _to_number(word)
        if value is None:
            expected = "true or false" if pa.types.is_boolean(kind) else "a number, not quoted"
            raise self._wrong(token, f"{expected}: {name!r} is {kind}")
        return value

    def _checked(self, comparison: Comparison, start: _Token) -> Comparison:
        try:
            bind_filters("", self._schema, [comparison])
        except ColumnTypeError as error:
            raise InvalidCommandError(
                f"`filter` at character {start.start + 1}: {error.message}",
                field="filter",
                allowed=error.allowed,
            ) from None
        return comparison

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take_keyword(self, word: str) -> bool:
        found = self._peek().keyword == word
        self._next += found
        return found

    def _take_sign(self, sign: str) -> bool:
        token = self._peek()
        found = token.kind == "sign" and token.text == sign
        self._next += found
        return found

    def _expect_sign(self, sign: str) -> None:
        if not self._take_sign(sign):
            raise self._wrong(self._peek(), f"`{sign}`")

    def _wrong(self, token: _Token, expected: str) -> InvalidCommandError:
        return _wrong_at(self._text, token, f"has {token}; expected {expected}")


def _split(text: str) -> Sequence[_Token]:
    tokens = []
    place, end = 0, len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None or match.end() > end:
            start = place + len(text[place:]) - len(text[place:].lstrip())
            token = _Token("sign", text[start], start)
            wrong = "does not end" if text[start] in "'\"`" else "is not understood"
            raise _wrong_at(text, token, f"has {text[start]} that {wrong}")
        kind = str(match.lastgroup)
        found, start, place = match[kind], match.start(kind), match.end()
        if kind == "quoted":
            quote = found[0]
            tokens.append(_Token(kind, found[1:-1].replace(quote * 2, quote), start, quote))
        else:
            tokens.append(_Token(kind, found, start))
    return [*tokens, _Token("end", "", end)]


def _to_number(word: str) -> int | Decimal | None:
    if _WHOLE.fullmatch(word):
        return int(word)
    if not _NUMBER.fullmatch(word):
        return None
    number = Decimal(word)
    return number if abs(number.adjusted()) <= MAX_EXPONENT else None


def _negated(filter_: Filter, negated: bool) -> Filter:
    return Negation(filter_) if negated else filter_


def _wrong_at(text: str, token: _Token, what: str) -> InvalidCommandError:
    before = text[max(0, token.start - 30) : token.start]
    return InvalidCommandError(
        f"`filter` {what}, at character {token.start + 1}, after {before!r}; write filters like "
        "year >= 2020 and (lang = de or title is null)",
        field="filter",
    )
