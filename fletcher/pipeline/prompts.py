"""What is put before each text: a prompt of the model by its name, or literal text."""

from __future__ import annotations

import re
from collections.abc import Callable

from fletcher.errors import InvalidCommandError
from fletcher.models.bundle.bundle import ModelBundle

# Prompts end in a colon, a space or a full sentence ("query: ", "Represent this sentence for
# searching relevant passages: "); names are single words.
_WORD = re.compile(r"[\w.-]+")


def resolve_prompt(model: ModelBundle, asked: str | None) -> str:
    """The literal text that a `prompt` stands for.

    A name of the bundle's is that prompt. Any other single word of letters, digits, `_`, `-` and
    `.` is taken for a misspelt name; everything else is literal, the empty text too.

    Args:
        model: Whose prompts they are.
        asked: As in the command; None: the model's default.

    Raises:
        InvalidCommandError: A name that the model has not.
    """
    if asked is None:
        asked = model.default_prompt or ""
    if asked in model.prompts:
        return model.prompts[asked]
    if _WORD.fullmatch(asked):
        names = ", ".join(model.prompts) or "no prompts"
        raise InvalidCommandError(
            f"`prompt` is {asked[:200]!r}, which is no prompt of {model.name}; it has {names}. "
            f"Literal text is anything but a single word, such as {asked[:200] + ': '!r}",
            field="prompt",
            allowed=list(model.prompts),
        )
    return asked


def prompt_tokens(model: ModelBundle, prompt: str, num_tokens: Callable[[str], int]) -> int:
    """Tokens of every text that are not its own: the prompt's and the special ones.

    Args:
        model: What the texts are for.
        prompt: Literal text.
        num_tokens: Counts the tokens of a text, special ones included, up to `max_length`.

    Raises:
        InvalidCommandError: They leave no room for a text.
    """
    taken = num_tokens(prompt)
    if taken >= model.max_length:
        raise InvalidCommandError(
            f"`prompt` takes all {model.max_length} tokens that {model.name} reads, special "
            "tokens included, and leaves none for the text; shorten it",
            field="prompt",
            allowed=[f"< {model.max_length} tokens"],
        )
    return taken
