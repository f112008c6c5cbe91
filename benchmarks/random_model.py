"""BERT checkpoint of any size with random weights: as fast as a trained one, no download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_LENGTH = 512


@dataclass(frozen=True)
class Shape:
    """Sizes of a BERT encoder; bge-base's are 768, 12, 12, 3072."""

    hidden: int
    num_layers: int
    num_heads: int
    intermediate: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`HIDDEN,LAYERS,HEADS,INTERMEDIATE`.

        Raises:
            ValueError: Another format.
        """
        shape = cls(*(int(part) for part in text.split(",")))
        if min(vars(shape).values()) < 1 or shape.hidden % shape.num_heads:
            raise ValueError(f"{text!r}: whole numbers from 1 on, HIDDEN a multiple of HEADS")
        return shape


def write_checkpoint(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """Writes a folder as sentence-transformers does: pooling by first token, normalised.

    Args:
        folder: Folder to create.
        shape: Sizes of the encoder.
        tokenizer: A tokenizer.json with BERT's special tokens.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    vocabulary = len(json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"])
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
    }
    files = {
        "config.json": {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": vocabulary,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "intermediate_size": shape.intermediate,
            "max_position_embeddings": MAX_LENGTH,
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_LENGTH,
            "model_input_names": ["input_ids", "attention_mask"],
            **special,
        },
        "sentence_bert_config.json": {"max_seq_length": MAX_LENGTH, "do_lower_case": False},
        "modules.json": [
            {
                "idx": index,
                "name": str(index),
                "path": path,
                "type": f"sentence_transformers.{kind}",
            }
            for index, (path, kind) in enumerate(
                [
                    ("", "models.Transformer"),
                    ("1_Pooling", "models.Pooling"),
                    ("2_Normalize", "models.Normalize"),
                ]
            )
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": shape.hidden,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": False,
        },
        "2_Normalize/config.json": {},
    }
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")
    _write_safetensors(folder / "model.safetensors", dict(_tensors(shape, vocabulary)))


def _tensors(shape: Shape, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape.hidden, shape.intermediate
    for kind, rows in (("word", vocabulary), ("position", MAX_LENGTH), ("token_type", 2)):
        yield f"embeddings.{kind}_embeddings.weight", (rows, hidden)
    norms = ["embeddings.LayerNorm"]
    for index in range(shape.num_layers):
        layer = f"encoder.layer.{index}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        for name, rows, columns in (
            *((f"attention.self.{part}", hidden, hidden) for part in ("query", "key", "value")),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
        ):
            yield f"{layer}.{name}.weight", (rows, columns)
            yield f"{layer}.{name}.bias", (rows,)
    for name in norms:
        yield f"{name}.weight", (hidden,)
        yield f"{name}.bias", (hidden,)


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes weights as BERT starts training; format: https://github.com/huggingface/safetensors#format."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            if name.endswith("LayerNorm.weight"):
                values += np.float32(1)
            file.write(values.tobytes())
