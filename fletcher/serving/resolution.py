"""What a command means for a model: its vectors, prompt and exit layer."""

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
        taken: Tokens of each chunk that the prompt and special tokens take; 0 without prompt and
            chunking.
    """

    spec: VectorSpec
    prompt: str
    layers: int
    taken: int = 0


def resolve_command(
    served: ServedModel, command: EmbedCommand, dtypes: tuple[str, ...], rules: OutputConfig
) -> ResolvedCommand:
    """Makes every choice that a command leaves open.

    Args:
        served: The model that does it.
        command: What is asked.
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
    taken = 0
    if chunking is not None:
        check_late(model, chunking, spec.layers)
    if prompt or chunking is not None:
        taken = prompt_tokens(model, prompt, served.embedder.num_tokens)
        chunking = chunking and chunking.fitted(model.max_length, taken)
        spec = replace(spec, chunking=chunking)
    layers = 0 if spec.layers == model.num_layers else spec.layers
    return ResolvedCommand(spec, prompt, layers, taken)
