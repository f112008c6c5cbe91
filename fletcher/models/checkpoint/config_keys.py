"""Known keys of config.json, and refusal of all others.

Every key is read by the family, or changes no vector, or is refused. The family's reader gets a
`ReadConfig`, which remembers the keys that were read. Afterwards
`check_all_known` refuses the rest. So a key that a new release of transformers adds is refused,
until somebody has looked at its meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fletcher.errors import ModelError

# Keys that change no vector of any family: names, versions, and settings of training, of heads for
# other tasks and of text generation.
_WITHOUT_EFFECT = """
    _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    bos_token_id chunk_size_feed_forward cls_token_id decoder_start_token_id dtype eos_token_id
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
    initializer_factor initializer_range label2id license mask_token_id matryoshka_dimensions
    model_max_length model_name model_type name_or_path num_labels output_attentions
    output_hidden_states output_past prefix problem_type return_dict sentence_transformers
    sep_token_id task_specific_params tf_legacy_loss tie_word_embeddings tokenizer_class torch_dtype
    torchscript transformers.js_config transformers_version unk_token_id use_bfloat16 use_cache
    use_return_dict xla_device

    attention_dropout attention_probs_dropout_prob attn_pdrop classifier_activation classifier_bias
    classifier_dropout classifier_pooling directionality dropout embd_pdrop embedding_dropout
    hidden_dropout_prob mlp_dropout pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type qa_dropout resid_pdrop seq_classif_dropout

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    top_k top_p typical_p
"""


class ReadConfig(Mapping[str, Any]):
    """Content of config.json that remembers the keys that were looked up."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    def check_all_known(self, ignored: Collection[str]) -> None:
        """Check that all keys were read or change no vector.

        `ignored` has further keys that change no vector of this family. A key without a value
        (null, or an empty list or object) is accepted.

        Raises:
            ModelError: A key is unknown.
        """
        without_effect = set(_WITHOUT_EFFECT.split())
        for key, value in self._config.items():
            known = key in self._read or key in without_effect or key in ignored
            if known or value is None or value in ([], {}):
                continue
            why = "which is no setting that Fletcher knows of this family, and could change vectors"
            if key == "auto_map":
                why = "which replaces the family's code by other code"
            elif key == "quantization_config":
                why = "which changes the weights; take the checkpoint that is not quantized"
            raise ModelError(
                f"config.json: `{key}` is {repr(value)[:200]}, {why}; if it does not change "
                "vectors, remove it from config.json",
                field=key,
            )
