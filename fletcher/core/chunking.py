"""How a long text is cut into chunks, and what becomes of their vectors: the field `chunking`.

In a command it is one string, the same in JSON, protobuf and flags:
`METHOD[:SIZE[/OVERLAP]][:AGGREGATION][:late]`, such as `tokens:256/32:mean`. What is left out takes
its default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fletcher.errors import InvalidCommandError

# Those whose chunks are each one sentence or paragraph.
ALONE = ("each-sentence", "each-paragraph")
METHODS = ("tokens", "sentences", "paragraphs", *ALONE)
AGGREGATIONS = ("mean", "weighted", "max", "hierarchical", "none")
MAX_SIZE = 1_000_000

_SIZES = re.compile(r"([0-9]{1,7})(?:/([0-9]{1,7}))?")
_FORM = "METHOD[:SIZE[/OVERLAP]][:AGGREGATION][:late], such as tokens:256/32:mean"


@dataclass(frozen=True, slots=True)
class Chunking:
    """One way to cut texts.

    Attributes:
        method: Where a text is cut. `tokens`: after any token; `sentences`: where a sentence ends,
            as many of them together as `size` allows; `paragraphs`: where a paragraph ends, else a
            sentence; `each-sentence`, `each-paragraph`: after each of them. What is longer than
            `size` by itself is cut after any token.
        size: Tokens of a chunk at most, the prompt's and special ones included, as the model sees
            it; 0: as many as the model reads.
        overlap: Tokens of its text that a chunk has in common with the one before.
        aggregation: What a text gets. `mean` of its chunks' vectors; `weighted` mean, by tokens and
            position; `max` of each dimension; `hierarchical`: mean of its paragraphs' vectors,
            which are means of their chunks'; `none` of them: each chunk is a row.
        late: The model reads all of a text before chunks become vectors, or as much as it can.
    """

    method: str
    size: int = 0
    overlap: int = 0
    aggregation: str = "mean"
    late: bool = False

    @classmethod
    def from_text(cls, text: str) -> Chunking | None:
        """The way that a command's `chunking` names; None for `none`.

        Raises:
            InvalidCommandError: It is not of the form, or names something that there is not.
        """
        method, *parts = text.split(":")
        if method == "none" and not parts:
            return None
        if method not in METHODS:
            raise _refusal(text, f"{method[:50]!r} is no method", ["none", *METHODS])
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
                    text, f"OVERLAP is {found.overlap}, but {method} has none in common", ["0"]
                )
            parts = parts[1:]
        if parts and parts[0] not in AGGREGATIONS:
            raise _refusal(text, f"{parts[0][:50]!r} is no aggregation", AGGREGATIONS)
        if len(parts) > 1:
            kept = str(replace(found, aggregation=parts[0]))
            raise _refusal(text, f"{parts[1][:50]!r} is one part too many", [kept])
        found = replace(found, aggregation=parts[0]) if parts else found
        if found.aggregation == "hierarchical" and not found.alone:
            raise _refusal(
                text, f"chunks of {method} may be of several paragraphs, not hierarchical", ALONE
            )
        if found.late and not (found.size or found.alone):
            raise _refusal(
                text,
                "late chunks of all that the model reads have nothing around them; name a SIZE",
                [f"{method}:SIZE:{found.aggregation}:late"],
            )
        return found

    def fitted(self, max_length: int, taken: int) -> Chunking:
        """The same with its size settled.

        Args:
            max_length: Tokens that the model reads.
            taken: Of each chunk, tokens that are not the text's: the prompt's and special ones.

        Raises:
            InvalidCommandError: A chunk is longer than the model reads, or has no room for text, or
                none beside the overlap.
        """
        size = self.size or max_length
        least = taken + self.overlap + 1
        if not least <= size <= max_length:
            raise _refusal(
                str(self),
                f"a chunk of {size} tokens, of which {taken} are the prompt's and special ones, "
                f"with {self.overlap} of the one before, cannot be: SIZE is from {least} to the "
                f"{max_length} that the model reads",
                [f"{least} to {max_length}"] if least <= max_length else ["a smaller OVERLAP"],
            )
        return replace(self, size=size)

    @property
    def alone(self) -> bool:
        """Each sentence or paragraph is a chunk by itself, however short."""
        return self.method in ALONE

    @property
    def needs_places(self) -> bool:
        """It matters where in its text a token is."""
        return self.rows or self.method != "tokens"

    @property
    def rows(self) -> bool:
        """Each chunk is a row of the output."""
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
