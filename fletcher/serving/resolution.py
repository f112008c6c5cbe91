"""Resolution of a command against a model: vectors, prompt, exit layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fletcher.config.model import OutputConfig
from fletcher.core.chunking import Chunking
from fletcher.core.command import EmbedCommand
from fletcher.core.schema import VectorSpec
from fletcher.pipeline.prompts import prompt_tokens, resolve_prompt
from fletcher.pipeline.vector_spec import check_late, vector_spec
from fletcher.serving.model_versions import ServedModel


@dataclass(frozen=True, slots=True)
class ResolvedCommand:
    """A command with every choice made.

    Attributes:
        spec: The vectors.
        prompt: Literal text put before every text.
        layers: Exit layer; 0: the last one, however it was asked for, so that all such work runs
            together.
        chunk_overhead: Tokens of each chunk that the prompt and special tokens take; 0 without
            prompt and chunking.
    """

    spec: VectorSpec
    prompt: str
    layers: int
    chunk_overhead: int = 0


def resolve_command(
    served: ServedModel, command: EmbedCommand, dtypes: tuple[str, ...], rules: OutputConfig
) -> ResolvedCommand:
    """Make every choice that a command leaves open.

    Args:
        served: The model that does it.
        command: The client's options.
        dtypes: Element types that the destination takes.
        rules: Vectors that the server gives.

    Raises:
        DimensionMismatchError, InvalidCommandError: The model cannot give such vectors, or has no
            such prompt or chunks.
    """
    model = served.bundle
    spec = vector_spec(model, command, dtypes, rules)
    prompt = resolve_prompt(model, command.prompt)
    chunking = Chunking.from_text(command.chunking or "none")
    chunk_overhead = 0
    if chunking is not None:
        check_late(model, chunking, spec.layers)
    if prompt or chunking is not None:
        chunk_overhead = prompt_tokens(model, prompt, served.embedder.num_tokens)
        chunking = chunking and chunking.fitted(model.max_length, chunk_overhead)
        spec = replace(spec, chunking=chunking)
    layers = 0 if spec.layers == model.num_layers else spec.layers
    return ResolvedCommand(spec, prompt, layers, chunk_overhead)
