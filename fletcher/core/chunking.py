"""The field `chunking`: how texts are cut, and how chunks' vectors combine.

In a command the field is one string, written the same way in JSON, protobuf and flags:
`METHOD[:SIZE[/OVERLAP]][:AGGREGATION][:late]`, such as `tokens:256/32:mean`. Parts of the string
that are left out have their defaults.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from fletcher.errors import InvalidCommandError

# Methods by which every chunk is exactly one sentence or one paragraph.
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
        method: Where a text is cut. `tokens`: after any token. `sentences`: at the end of a
            sentence, with as many sentences in a chunk as `size` allows. `paragraphs`: at the end
            of a paragraph, or of a sentence if the paragraph is too long. `each-sentence`,
            `each-paragraph`: after every sentence or paragraph. A sentence or paragraph longer than
            `size` is cut after any token.
        size: Maximum number of tokens in a chunk, including prompt and special tokens; 0: as many
            as the model reads.
        overlap: Number of text tokens that a chunk shares with the chunk before it.
        aggregation: How chunks' vectors become the vector of a text. `mean`: their mean.
            `weighted`: their mean, weighted by tokens and position. `max`: the maximum in each
            dimension. `hierarchical`: first a mean for each paragraph, then the mean of these
            means. `none`: no vector of the text; each chunk is an output row.
        late: Whether the model reads the text around a chunk, as far as its length allows, before
            the chunk's tokens are pooled (late chunking).
    """

    method: str
    size: int = 0
    overlap: int = 0
    aggregation: str = "mean"
    late: bool = False

    @classmethod
    def from_text(cls, text: str) -> Chunking | None:
        """Parse the `chunking` of a command; return None for `none`.

        Raises:
            InvalidCommandError: The text does not have the form above, or names an unknown choice.
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
        """The same chunking with a size that is set and checked for a model.

        Args:
            max_length: Number of tokens that the model reads.
            taken: Number of prompt and special tokens in each chunk.

        Raises:
            InvalidCommandError: A chunk would be longer than the model reads, or would have no room
                for text besides prompt, special tokens and overlap.
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
        """Whether every sentence or paragraph becomes a separate chunk, however short."""
        return self.method in ALONE

    @property
    def needs_places(self) -> bool:
        """Whether cutting or output needs the position of each token in its text."""
        return self.rows or self.method != "tokens"

    @property
    def rows(self) -> bool:
        """Whether each chunk becomes an output row."""
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
