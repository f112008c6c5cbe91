"""The field `chunking`: how texts are cut, and how chunks' vectors combine.

A command has it as one string, the same in JSON, protobuf and flags:
`METHOD[:SIZE[/OVERLAP]][:AGGREGATION][:late]`, such as `tokens:256/32:mean`. Omitted parts take
their defaults.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fletcher.errors import InvalidCommandError

# Methods whose chunks are one sentence or paragraph each.
ALONE = ("each-sentence", "each-paragraph")
METHODS = ("tokens", "sentences", "paragraphs", *ALONE)
AGGREGATIONS = ("mean", "weighted", "max", "hierarchical", "none")
MAX_SIZE = 1_000_000

_SIZES = re.compile(r"([0-9]{1,7})(?:/([0-9]{1,7}))?")
_FORM = "METHOD[:SIZE[/OVERLAP]][:AGGREGATION][:late], such as tokens:256/32:mean"


@dataclass(frozen=True, slots=True)
class Chunking:
    """A way to cut texts into chunks.

    Attributes:
        method: Where a text is cut. `tokens`: after any token. `sentences`: after sentences, as
            many together as `size` allows. `paragraphs`: after paragraphs, else after sentences.
            `each-sentence`, `each-paragraph`: after each of them. A sentence or paragraph longer
            than `size` is cut after any token.
        size: Most tokens of a chunk as the model sees it, prompt and special tokens included; 0: as
            many as the model reads.
        overlap: Tokens that a chunk's text shares with the chunk before.
        aggregation: The vector of a text. `mean` of its chunks' vectors; `weighted` mean, by tokens
            and position; `max` of each dimension; `hierarchical`: mean of its paragraphs' vectors,
            which are means of their chunks'; `none`: each chunk is a row.
        late: Whether the model reads a whole text, as far as it can, before chunks are pooled.
    """

    method: str
    size: int = 0
    overlap: int = 0
    aggregation: str = "mean"
    late: bool = False

    @classmethod
    def from_text(cls, text: str) -> Chunking | None:
        """Parse a command's `chunking`; None for `none`.

        Raises:
            InvalidCommandError: The form is wrong, or a part of it is not one of the choices.
        """
        method, *parts = text.split(":")
        if method == "none" and not parts:
            return None
        if method not in METHODS:
            raise _refusal(text, f"unknown method {method[:50]!r}", ["none", *METHODS])
        found = cls(method, late=parts[-1:] == ["late"])
        parts = parts[: len(parts) - found.late]
        if parts and (sizes := _SIZES.fullmatch(parts[0])):
            found = replace(found, size=int(sizes[1]), overlap=int(sizes[2] or 0))
            if not 1 <= found.size <= MAX_SIZE:
                raise _refusal(text, f"SIZE is {sizes[1]}", [f"1 to {MAX_SIZE}"])
            if found.overlap >= found.size:
                raise _refusal(
                    text, f"OVERLAP {found.overlap} is not below SIZE", [f"0 to {found.size - 1}"]
                )
            if found.overlap and found.alone:
                raise _refusal(
                    text, f"OVERLAP is {found.overlap}, but chunks of {method} never overlap", ["0"]
                )
            parts = parts[1:]
        if parts and parts[0] not in AGGREGATIONS:
            raise _refusal(text, f"unknown aggregation {parts[0][:50]!r}", AGGREGATIONS)
        if len(parts) > 1:
            kept = str(replace(found, aggregation=parts[0]))
            raise _refusal(text, f"{parts[1][:50]!r} is unexpected", [kept])
        found = replace(found, aggregation=parts[0]) if parts else found
        if found.aggregation == "hierarchical" and not found.alone:
            raise _refusal(
                text, f"hierarchical needs chunks within a paragraph, not those of {method}", ALONE
            )
        if found.late and not (found.size or found.alone):
            raise _refusal(
                text,
                "late chunks need a SIZE: by default a chunk is all that the model reads",
                [f"{method}:SIZE:{found.aggregation}:late"],
            )
        return found

    def fitted(self, max_length: int, taken: int) -> Chunking:
        """The same chunking with its size set and checked for a model.

        The model reads `max_length` tokens, of which prompt and special tokens take `taken`.

        Raises:
            InvalidCommandError: A chunk is longer than the model reads, or has no room for text
                beside the overlap.
        """
        size = self.size or max_length
        least = taken + self.overlap + 1
        if not least <= size <= max_length:
            raise _refusal(
                str(self),
                f"SIZE is {size}, expected {least} to {max_length}: {taken} tokens of a chunk are "
                f"the prompt's and special ones, {self.overlap} are OVERLAP, and the model reads "
                f"{max_length}",
                [f"{least} to {max_length}"] if least <= max_length else ["a smaller OVERLAP"],
            )
        return replace(self, size=size)

    @property
    def alone(self) -> bool:
        """Whether each sentence or paragraph is a chunk by itself, however short."""
        return self.method in ALONE

    @property
    def needs_places(self) -> bool:
        """Whether the positions of tokens in their text are needed."""
        return self.rows or self.method != "tokens"

    @property
    def rows(self) -> bool:
        """Whether each chunk is a row of the output."""
        return self.aggregation == "none"

    def __str__(self) -> str:
        sizes = f":{self.size}/{self.overlap}" if self.size else ""
        return f"{self.method}{sizes}:{self.aggregation}{':late' * self.late}"


def _refusal(text: str, problem: str, allowed: list[str] | tuple[str, ...]) -> InvalidCommandError:
    return InvalidCommandError(
        f"`chunking` is {text[:200]!r}: {problem}; expected none or {_FORM}",
        field="chunking",
        allowed=allowed,
    )
