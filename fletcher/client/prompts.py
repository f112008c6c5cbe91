"""A model's default prompt for queries and for documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fletcher.errors import ModelMismatchError

if TYPE_CHECKING:
    from fletcher.client import Client

# Names in order of preference: first those of sentence-transformers' encode_query and
# encode_document, then Nomic's task names.
QUERY_PROMPTS = ("query", "search_query")
DOCUMENT_PROMPTS = ("document", "passage", "corpus", "search_document")


def served_model(client: Client, name: str | None) -> dict[str, Any]:
    """A server's description of the model `name` or `name@hash`.

    None stands for the server's default model. For an alias, its first model is described.

    Raises:
        ModelMismatchError: The server does not serve the model.
    """
    models: list[dict[str, Any]] = client.list_models()
    found = _of_name(models, name)
    if found is None and name is not None:
        found = _of_name(models, client.aliases().get(name, "").partition(":")[0])
    if found is not None:
        return found
    known = [model["name"] for model in models]
    raise ModelMismatchError(
        f"`model` is {name!r}, which the server does not serve; it serves {', '.join(known)}",
        field="model",
        allowed=known,
    )


def _of_name(models: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any] | None:
    for model in models:
        current = model["name"] if model.get("is_current", True) else None
        names = (current, f"{model['name']}@{model['hash']}")
        if model.get("is_default") if name is None else name in names:
            return model
    return None


def default_prompt(model: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of `names` that is a prompt of the model; None: no such prompt."""
    prompts = model.get("prompts", {})
    return next((name for name in names if name in prompts), None)
