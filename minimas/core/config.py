"""The shape of a model, read from a Hugging Face `config.json` and checked field by field.

Names are Hugging Face's. A field that would change the mathematics and is not implemented is
refused by name. Fields that do not change a forward pass are listed, so that no other field is
ignored without a warning. Does not know: tensors, tokenizers.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The same block three times: Qwen3 normalizes queries and keys per head, Qwen2 adds a bias to q, k
# and v, Llama does neither.
FAMILIES = ("qwen3", "qwen2", "llama")
DTYPES = ("bfloat16", "float16", "float32", "float64")
# Fields that change the mathematics -> the value that means "not in use". Null always does.
UNSUPPORTED: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "num_experts": 0,
    "num_local_experts": 0,
    "n_routed_experts": 0,
    "partial_rotary_factor": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logit_scale": 1,
    **dict.fromkeys("final_logit_softcapping attention_multiplier no_rope_layers".split()),
    "quantization_config": None,
}
IGNORED = frozenset(
    """
    architectures attention_bias attention_dropout bos_token_id eos_token_id initializer_range
    is_llama_config layer_types max_window_layers output_attentions output_hidden_states
    pad_token_id pretraining_tp return_dict rope_interleaved rope_parameters rope_scaling
    sliding_window torch_dtype transformers_version use_cache transformers.js_config _name_or_path
    """.split()
)
Require = Callable[[bool, str, str], None]  # whether a field is right, its name, what is expected


@dataclass(frozen=True)
class Config:
    """Shape and constants of one decoder-only transformer; `from_dict` makes it."""

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
    dtype: str = "bfloat16"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> "Config":
        """Read the dict of a config.json.

        Raises ValueError naming `source`, the field, what was found and what was expected.
        """
        raw = dict(raw)  # `_read_rotary_base` changes it

        def require(good: bool, field: str, expected: str) -> None:
            if not good:
                found = f"found {raw.get(field)!r:.80}"
                raise ValueError(f"{source}: {field}: {found}, expected {expected}")

        def number(field: str, kind: type = int, most: float = 10**7, default: Any = None) -> Any:
            value = default if raw.get(field) is None else raw[field]
            good = type(value) in (int, kind) and 0 < value <= most
            name = "integer" if kind is int else "number"
            require(good, field, f"a positive {name}, at most {most:,}")
            return kind(value)

        _refuse(raw, require)
        _read_rotary_base(raw, require)
        family = raw["model_type"]
        hidden_size, layers = number("hidden_size"), number("num_hidden_layers", most=1000)
        full = raw.get("layer_types") in (None, ["full_attention"] * layers)
        require(full, "layer_types", "'full_attention' for every layer")
        heads = number("num_attention_heads")
        # Qwen3's head size is free of hidden_size, so a guess would be wrong.
        head_dim = number("head_dim", default=None if family == "qwen3" else hidden_size // heads)
        even = head_dim % 2 == 0 and heads * head_dim <= 1e7  # RoPE turns pairs
        require(even, "head_dim", "an even number")
        kv_heads = number("num_key_value_heads", default=heads if family == "llama" else None)
        expected = f"a divisor of num_attention_heads, {heads}"
        require(heads % kv_heads == 0, "num_key_value_heads", expected)
        _warn(raw.keys() - {field.name for field in dataclasses.fields(cls)}, raw, source)
        return cls(
            family,
            number("vocab_size"),
            hidden_size,
            number("intermediate_size"),
            layers,
            heads,
            kv_heads,
            head_dim,
            number("rms_norm_eps", float, 1e300),
            number("rope_theta", float, 1e300),
            number("max_position_embeddings"),
            raw.get("tie_word_embeddings", False),
            raw.get("dtype") or raw.get("torch_dtype") or "bfloat16",
            token_ids(raw.get("eos_token_id"), f"{source}: eos_token_id"),
        )


def _refuse(raw: Mapping[str, Any], require: Require) -> None:
    """Refuse what is not implemented, and values of the wrong type."""
    family = raw.get("model_type")
    require(family in FAMILIES, "model_type", f"one of {', '.join(FAMILIES)}")
    for field, off in UNSUPPORTED.items():
        require(raw.get(field) in (None, off), field, repr(off))
    bias = (None, False, family == "qwen2")  # Qwen2 always has one on q, k and v
    require(raw.get("attention_bias") in bias, "attention_bias", "false")
    tied = raw.get("tie_word_embeddings", False)
    require(isinstance(tied, bool), "tie_word_embeddings", "true or false")
    for field in ("dtype", "torch_dtype"):  # transformers 5 and 4
        require(raw.get(field) in (None, *DTYPES), field, f"one of {', '.join(DTYPES)}")


def _read_rotary_base(raw: dict[str, Any], require: Require) -> None:
    """Set `rope_theta` to that of `rope_parameters`, where transformers 5 writes it."""
    if raw["model_type"] == "llama":
        raw.setdefault("rope_theta", 1e4)  # the first Llamas have no such field
    for field in ("rope_scaling", "rope_parameters"):
        block = {} if raw.get(field) is None else raw[field]
        require(isinstance(block, Mapping), field, "an object or null")
        kind = block.get("rope_type", block.get("type", "default"))
        whole = "factor" not in block and block.get("partial_rotary_factor", 1) == 1
        require(kind == "default" and whole, field, "rope_type 'default' of whole heads")
        raw["rope_theta"] = block.get("rope_theta", raw.get("rope_theta"))


def _warn(fields: Iterable[str], raw: Mapping[str, Any], source: str) -> None:
    for field in fields:
        if raw[field] and field not in IGNORED and field not in UNSUPPORTED:
            message = "%s: %s is not a known field; it is ignored"
            logging.getLogger(__name__).warning(message, source, field)


def read_json(path: Path, needed: bool = True) -> dict[str, Any]:
    """Read the object in a JSON file; returns {} for a missing file that is not `needed`.

    Raises FileNotFoundError or ValueError with the file's name.
    """
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
    """Return a token id, a list of them or None as a tuple; raises ValueError naming `where`."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"{where}: found {value!r}, expected a token id or a list of them")
    return tuple(ids)
