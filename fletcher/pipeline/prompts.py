"""Resolution of `prompt`: the name of one of the model's prompts, or literal text."""

from __future__ import annotations

import re
from collections.abc import Callable

from fletcher.errors import InvalidCommandError
from fletcher.models.bundle.bundle import ModelBundle

# Tells names from literal prompts. Names are single words. Literal prompts end in a colon, a space
# or a full sentence ("query: ", "Represent this sentence for searching relevant passages: ").
_WORD = re.compile(r"[\w.-]+")


def resolve_prompt(model: ModelBundle, asked: str | None) -> str:
    """Returns the text to put in front of each text.

    Args:
        asked: The command's `prompt`. The name of a prompt in the bundle stands for that prompt.
            Any other single word of letters, digits, `_`, `-` and `.` counts as a misspelt name.
            Everything else is literal text, including the empty string. None: the model's default.

    Raises:
        InvalidCommandError: `asked` is a single word, and the model has no prompt of that name.
    """
    if asked is None:
        asked = model.default_prompt or ""
    if asked in model.prompts:
        return model.prompts[asked]
    if _WORD.fullmatch(asked):
        names = ", ".join(model.prompts) or "no prompts"
        raise InvalidCommandError(
            f"`prompt` is {asked[:200]!r}, expected a prompt of {model.name}, which has {names}, "
            f"or literal text, which is not a single word, such as {asked[:200] + ': '!r}",
            field="prompt",
            allowed=list(model.prompts),
        )
    return asked


def prompt_tokens(model: ModelBundle, prompt: str, num_tokens: Callable[[str], int]) -> int:
    """Returns the number of tokens that are added to each text, special ones included.

    Args:
        prompt: Literal text.
        num_tokens: Counts the tokens of a text, special tokens included, up to `max_length`.

    Raises:
        InvalidCommandError: The prompt and the special tokens leave no room for a text.
    """
    taken = num_tokens(prompt)
    if taken >= model.max_length:
        raise InvalidCommandError(
            f"`prompt` takes all {model.max_length} tokens that {model.name} reads, special "
            "tokens included, and leaves no room for the text; shorten it",
            field="prompt",
            allowed=[f"< {model.max_length} tokens"],
        )
    return taken
