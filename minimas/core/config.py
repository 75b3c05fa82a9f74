"""The shape of a model, read from a Hugging Face `config.json` and checked field by field.

Field names are Hugging Face's. A field that would change the forward pass and is not implemented
raises an error that names it, at any depth of the JSON. Fields that do not affect the forward pass
are listed here, and any other field that is set causes a warning. This file does not depend on
tensors or tokenizers.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# All three have the same block. Qwen3 normalizes queries and keys per head, Qwen2 adds a bias to
# q, k and v, and Llama does neither.
FAMILIES = ("qwen3", "qwen2", "llama")
DTYPES = ("bfloat16", "float16", "float32", "float64")
# Fields that can change the forward pass -> the values that do not. null is always allowed too.
UNSUPPORTED: dict[str, Any] = {
    field: allowed
    for allowed, fields in (
        (("silu", "swish"), "hidden_act hidden_activation"),
        (("default",), "rope_type type"),  # in an object rope_parameters or rope_scaling
        (
            (False,),
            """
            attention_bias mlp_bias use_sliding_window num_experts num_local_experts
            n_routed_experts rope_interleaved final_logit_softcapping attn_logit_softcapping
            router_logit_softcapping use_parallel_residual parallel_attn alibi use_logn_attn
            attn_temperature_tuning scale_attn_by_inverse_layer_idx
            """,
        ),
        (
            (1,),
            """
            factor partial_rotary_factor rotary_pct rope_ratio embedding_multiplier
            residual_multiplier lm_head_multiplier logit_scale logits_scaling scale_emb
            """,
        ),
        (
            (),  # no value but null; layer types appear as keys if each has its own RoPE parameters
            """
            quantization_config compression_config attention_multiplier query_pre_attn_scalar
            mrope_section long_factor short_factor attention_factor no_rope_layers
            full_attention sliding_attention chunked_attention linear_attention
            no_rope_layer_interval rope_local_base_freq rotary_dim attention_chunk_size
            sliding_window_pattern clip_qkv scale_depth
            """,
        ),
        ((False, True), "tie_word_embeddings"),
        (DTYPES, "dtype torch_dtype"),  # the names in transformers 5 and 4
    )
    for field in fields.split()
}
# Numeric fields -> the largest allowed value, which has the field's type, int or float.
NUMBERS = dict.fromkeys(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings
    """.split(),
    10**7,
) | {"num_hidden_layers": 1000, "rms_norm_eps": 1e300, "rope_theta": 1e300}
KNOWN = UNSUPPORTED.keys() | set(
    """
    architectures attention_dropout bos_token_id eos_token_id head_dim hidden_size initializer_range
    intermediate_size is_llama_config layer_types max_position_embeddings max_window_layers
    model_type num_attention_heads num_hidden_layers num_key_value_heads output_attentions
    output_hidden_states pad_token_id pretraining_tp return_dict rms_norm_eps rope_parameters
    rope_scaling rope_theta sliding_window transformers_version use_cache transformers.js_config
    vocab_size _name_or_path
    """.split()
)


@dataclass(frozen=True)
class Config:
    """Shape and constants of one decoder-only transformer, made by `from_dict`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # in Qwen3 not always hidden_size // num_attention_heads
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"  # the checkpoint's
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> "Config":
        """Return the configuration in the parsed JSON of a config.json.

        Raises ValueError naming `source`, the field, what was found and what was expected.
        """
        fields = {field: value for field, value in raw.items() if value is not None}
        family: Any = fields.get("model_type")
        if family == "llama":  # the first Llama configs lack these fields
            fields.setdefault("rope_theta", 1e4)
            fields.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
        if family == "qwen2":  # always has a bias on q, k and v
            fields.pop("attention_bias", None)

        def check(good: bool, field: str, expected: str) -> None:
            if not good:
                raise ValueError(
                    f"{source}: {field}: found {fields.get(field)!r:.80}, expected {expected}"
                )

        check(family in FAMILIES, "model_type", f"one of {', '.join(FAMILIES)}")
        _refuse(fields, f"{source}: ")
        # The names in transformers 4 and 5. If both exist, the first counts, as in transformers.
        name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
        block = fields.get(name, {})
        check(isinstance(block, dict), name, "an object or null")
        fields["rope_theta"] = block.get("rope_theta", fields.get("rope_theta"))
        sizes: dict[str, Any] = {}
        for field, largest in NUMBERS.items():
            if field == "head_dim" and family != "qwen3":  # Qwen3 sets its own
                fields.setdefault(field, sizes["hidden_size"] // sizes["num_attention_heads"])
            value: Any = fields.get(field)
            kind = type(largest)
            expected = f"a positive {'integer' if kind is int else 'number'}, at most {largest:,}"
            check(type(value) in (int, kind) and 0 < value <= largest, field, expected)
            sizes[field] = kind(value)
        full = ["full_attention"] * sizes["num_hidden_layers"]
        check(fields.get("layer_types", full) == full, "layer_types", "only 'full_attention'")
        heads = sizes["num_attention_heads"]
        head_dim = sizes["head_dim"]  # even, because RoPE rotates pairs of dimensions
        divides = heads % sizes["num_key_value_heads"] == 0
        check(divides, "num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        check(head_dim % 2 == 0 and heads * head_dim <= 1e7, "head_dim", "even, ≤ 1e7 / heads")
        return cls(
            **sizes,
            model_type=family,
            tie_word_embeddings=bool(fields.get("tie_word_embeddings")),
            dtype=fields.get("dtype") or fields.get("torch_dtype", "bfloat16"),
            eos_token_ids=token_ids(fields.get("eos_token_id"), f"{source}: eos_token_id"),
        )


def _refuse(block: dict[str, Any], where: str, found: str = ": found ") -> None:
    """Raise ValueError for a field that is not implemented, at any depth; warn of unknown ones."""
    for field, value in block.items():
        allowed = (None, *UNSUPPORTED.get(field, (value,)))
        if value not in allowed:
            raise ValueError(f"{where}{field}{found}{value!r:.80}, expected one of {allowed}")
        if isinstance(value, dict):
            _refuse(value, f"{where}{field}{found}", " ")
        elif value and field not in KNOWN:
            logging.getLogger(__name__).warning("%s%s is unknown and ignored", where, field)


def read_json(path: Path, needed: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file is missing and not `needed`.

    Raises FileNotFoundError or ValueError naming the file.
    """
    if not needed and not path.exists():
        return {}
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # malformed, or not UTF-8
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: found {type(raw).__name__}, expected a JSON object")
    return raw


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Return a token id, a list of ids or None as a tuple. Raises ValueError naming `where`."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"{where}: found {value!r}, expected a token id or a list of them")
    return tuple(ids)
