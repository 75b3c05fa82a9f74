"""The shape of a model, read from a Hugging Face `config.json` and checked field by field.

Names are Hugging Face's. A field that would change the mathematics and is not implemented is refused by name; those
that do not touch a forward pass are listed, so that silence is a decision. Does not know: tensors, tokenizers.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One block, three layouts: Qwen3 normalizes queries and keys per head, Qwen2 adds a bias to q, k and v, Llama neither.
FAMILIES = ("qwen3", "qwen2", "llama")
DTYPES = ("bfloat16", "float16", "float32", "float64")
# Fields that change the mathematics -> the values that mean "not in use"; null and absence always do.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    **dict.fromkeys("mlp_bias use_sliding_window".split(), (False,)),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), (0,)),
    **dict.fromkeys(
        "partial_rotary_factor embedding_multiplier residual_multiplier logit_scale".split(), (1,)
    ),
    **dict.fromkeys(
        "final_logit_softcapping attention_multiplier no_rope_layers quantization_config".split(),
        (),
    ),
}
IGNORED = frozenset(
    "architectures attention_bias attention_dropout bos_token_id eos_token_id initializer_range is_llama_config "
    "layer_types max_window_layers output_attentions output_hidden_states pad_token_id pretraining_tp return_dict "
    "rope_interleaved rope_parameters rope_scaling sliding_window torch_dtype transformers_version use_cache "
    "transformers.js_config _name_or_path".split()
)


@dataclass(frozen=True)
class Config:
    """Shape and constants of one decoder-only transformer; build it with `from_dict`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not hidden_size // num_attention_heads in Qwen3
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"  # what the checkpoint was saved in
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> "Config":
        """Read the dict of a config.json; raises ValueError naming `source`, the field, found and expected."""

        def require(good: bool, field: str, expected: str) -> None:
            if not good:
                raise ValueError(
                    f"{source}: {field}: found {raw.get(field)!r:.80}, expected {expected}"
                )

        def number(field: str, kind: type, default: float | None = None) -> Any:
            value: Any = default if raw.get(field) is None else raw[field]
            good = isinstance(value, int if kind is int else int | float) and not isinstance(
                value, bool
            )
            most = 1e300 if kind is float else 10**3 if field == "num_hidden_layers" else 10**7
            name = "number" if kind is float else "integer"
            require(good and 0 < value <= most, field, f"a positive {name}, at most {most:,}")
            return kind(value)

        family = raw.get("model_type")
        require(family in FAMILIES, "model_type", f"one of {', '.join(FAMILIES)}")
        bias = {
            "attention_bias": (False, True) if family == "qwen2" else (False,)
        }  # Qwen2 has one on q, k, v always
        for field, off in (UNSUPPORTED | bias).items():
            require(
                raw.get(field) is None or raw[field] in off,
                field,
                repr(off[0]) if off else "null, not supported",
            )
        plain = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
        sizes = {field: number(field, int) for field in plain.split()}
        heads, full = sizes["num_attention_heads"], ["full_attention"] * sizes["num_hidden_layers"]
        require(
            raw.get("layer_types") in (None, full),
            "layer_types",
            "'full_attention' for every layer",
        )
        kv_heads = number("num_key_value_heads", int, heads if family == "llama" else None)
        require(
            heads % kv_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads, {heads}",
        )
        # Qwen3's is free of hidden_size, so a guess would be wrong; the other two may leave it out.
        head_dim = number(
            "head_dim", int, sizes["hidden_size"] // heads if family != "qwen3" else None
        )
        require(
            head_dim % 2 == 0 and heads * head_dim <= 1e7,
            "head_dim",
            "an even number, as RoPE turns pairs",
        )
        require(
            isinstance(raw.get("tie_word_embeddings", False), bool),
            "tie_word_embeddings",
            "true or false",
        )
        stored = "dtype" if raw.get("dtype") else "torch_dtype"  # transformers 5 and 4
        require(raw.get(stored) in (None, *DTYPES), stored, f"one of {', '.join(DTYPES)}")
        for field in (
            raw.keys()
            - IGNORED
            - UNSUPPORTED.keys()
            - {field.name for field in dataclasses.fields(cls)}
        ):
            if raw[field]:
                logging.getLogger(__name__).warning(
                    "%s: %s is not a known field; it is ignored", source, field
                )
        return cls(
            model_type=str(family),
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=number("rms_norm_eps", float),
            rope_theta=_rope_theta(raw, source),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            dtype=raw.get(stored) or "bfloat16",
            eos_token_ids=token_ids(raw.get("eos_token_id"), f"{source}: eos_token_id"),
        )


def read_json(path: Path, needed: bool = True) -> dict[str, Any]:
    """The object in a JSON file, {} for a missing one that is not `needed`; FileNotFoundError, ValueError name it."""
    if not needed and not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # malformed, or not UTF-8
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: found {type(raw).__name__}, expected a JSON object")
    return raw


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """A token id, a list of them or None, as a tuple; raises ValueError naming `where`."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"{where}: found {value!r}, expected a token id or a list of them")
    return tuple(ids)


def _rope_theta(raw: Mapping[str, Any], source: str) -> float:
    """The rotary base: at the top level, or in `rope_parameters` as transformers 5 writes it."""
    theta = raw.get(
        "rope_theta", 1e4 if raw.get("model_type") == "llama" else None
    )  # the first Llamas do not say
    for field in ("rope_scaling", "rope_parameters"):
        block = {} if raw.get(field) is None else raw[field]
        if not isinstance(block, Mapping):
            raise ValueError(f"{source}: {field}: found {block!r}, expected an object or null")
        kind = block.get("rope_type", block.get("type", "default"))
        if kind != "default" or "factor" in block or block.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"{source}: {field}: found {block!r:.80}, expected rope_type 'default' of whole heads"
            )
        theta = block.get("rope_theta", theta)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta <= 1e300:
        raise ValueError(f"{source}: rope_theta: found {theta!r}, expected a positive number")
    return float(theta)
