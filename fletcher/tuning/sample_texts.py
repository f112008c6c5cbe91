"""Real texts for measurements, tokenized and planned as in a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from fletcher.core.batches import Int64Array, MicroBatch, TextBatch, TokenBatch
from fletcher.models.bundle.bundle import ModelBundle
from fletcher.pipeline.planner import MAX_BATCH_ROWS, plan
from fletcher.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SampleTexts:
    """Tokenized sample texts.

    `order`, int64 [num_texts], has the texts' indexes, sorted from short to long texts.
    """

    tokens: TokenBatch
    order: Int64Array

    @classmethod
    def for_model(cls, bundle: ModelBundle) -> SampleTexts:
        """Tokenize the shipped texts for a model, each after the model's default prompt.

        Raises:
            ModelError: The bundle or its tokenizer is missing or damaged.
        """
        texts = [text.encode() for text in shipped_texts()]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        prompt = bundle.prompts.get(bundle.default_prompt or "", "")
        tokens = Tokenizer.from_bundle(bundle.folder).encode(
            TextBatch(b"".join(texts), offsets, prompt=prompt)
        )
        return cls(tokens, np.argsort(tokens.token_count, kind="stable").astype(np.int64))

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of a text."""
        return float(self.tokens.token_count.mean())

    def rows(self, number: int) -> Int64Array:
        """int64 [number], indexes of texts; their lengths are spread like those of all."""
        places = np.linspace(0, len(self.order) - 1, number).round().astype(np.int64)
        return np.asarray(self.order[places], dtype=np.int64)

    def micro_batches(
        self, rows: Int64Array, *, max_batch_tokens: int, num_runners: int
    ) -> tuple[list[Int64Array], list[MicroBatch]]:
        """Plan micro-batches of the texts `rows`.

        Returns two lists: int64 indexes into `rows` for each micro-batch, and the micro-batches.
        """
        lengths = self.tokens.token_count[rows]
        places = plan(
            lengths,
            max_batch_tokens=max_batch_tokens,
            max_batch_rows=MAX_BATCH_ROWS,
            num_runners=num_runners,
        )
        return places, [MicroBatch(self._ids(rows[one]), lengths[one]) for one in places]

    def _ids(self, rows: Int64Array) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        ids, offsets = self.tokens.input_ids, self.tokens.offsets
        return np.concatenate([ids[offsets[row] : offsets[row + 1]] for row in rows.tolist()])


def shipped_texts() -> Sequence[str]:
    """The texts that are shipped with Fletcher, which `scripts/sample` has chosen."""
    lines = files("fletcher.tuning").joinpath("sample_texts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.split("\n") if line]
