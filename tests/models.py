"""Tiny random models of the three families, and model folders made from them, for all tests.

Weights are about 1/sqrt(fan_in); norm gains and biases are random. Smaller weights and gains of 1
would hide bugs below any tolerance.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from minimas import Config, KVCache, Qwen3
from minimas.core.config import FAMILIES

TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"
# (num_attention_heads, num_key_value_heads, head_dim): grouped heads, one key-value head per query
# head, and one for all. hidden_size is 16, so only the second has head_dim = hidden_size // heads.
LAYOUTS = ((4, 2, 6), (4, 4, 4), (4, 1, 8))


def tiny_config(family: str = "qwen3", **overrides: Any) -> Config:
    """Return a config of two layers with grouped heads, by default untied.

    Its head_dim is not hidden_size // heads.
    """
    heads, kv_heads, head_dim = LAYOUTS[0]
    fields = {
        "model_type": family,
        "vocab_size": 41,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return Config(**(fields | overrides))


def tiny_model(
    family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any
) -> Qwen3:
    """Return a random model of `tiny_config`. The same seed gives the same model in every dtype."""
    return random_model(tiny_config(family, **overrides), seed, dtype)


def random_model(config: Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> Qwen3:
    """Return a model with random parameters.

    Matrices are about 1/sqrt(fan_in), gains 0.5 to 1.5, biases about 1.
    """
    model = Qwen3(config, name=f"{config.model_type}-{seed}").to(torch.float64)
    source = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=source, dtype=torch.float64)
        if name.endswith("norm.weight"):
            values = 0.5 + torch.rand(weight.shape, generator=source, dtype=torch.float64)
        elif weight.ndim == 2 and "embed" not in name:
            values /= weight.shape[1] ** 0.5
        weight.data.copy_(values)
    return model.to(dtype).eval()


def config_dict(config: Config) -> dict[str, Any]:
    """Return the config.json of a config, with the field names of Hugging Face."""
    raw = dataclasses.asdict(config)
    raw["eos_token_id"] = list(raw.pop("eos_token_ids")) or None
    return raw | {"hidden_act": "silu"}


def write_folder(path: Path, model: Qwen3, shards: int = 1, tokenizer: Path | None = None) -> Path:
    """Write a model folder in the format of Hugging Face.

    `tokenizer` is a folder whose tokenizer files are copied.
    """
    path.mkdir(parents=True, exist_ok=True)
    raw = config_dict(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(raw))
    write_tensors(
        path, {name: tensor.clone() for name, tensor in model.state_dict().items()}, shards
    )
    if tokenizer is not None:
        for source in [*tokenizer.glob("tokenizer*.json"), *tokenizer.glob("chat_template.jinja")]:
            shutil.copy(source, path)
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write model.safetensors, or the given number of shards and their index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


# -- inputs ----------------------------------------------------------------------------------------


def random_ids(model: Qwen3, rows: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids (rows, length). The same seed gives the same ids."""
    return torch.randint(
        model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def remember(
    model: Qwen3, ids: Tensor, lengths: Sequence[int] | None = None
) -> tuple[Tensor, KVCache]:
    """Return the hidden states and the KV cache of ids (B, T), starting from an empty cache.

    `lengths` has the number of valid ids in each right-padded row.
    """
    cache = model.new_cache(len(ids))
    counts = None if lengths is None else torch.tensor(lengths)
    return model(model.embed(ids), cache, counts), cache


def filled(cache: KVCache) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (row, keys, values) of the filled slots.

    Keys and values have the shape (layers, K, lengths[row], d).
    """
    for row, length in enumerate(map(int, cache.lengths)):
        pair = [
            torch.stack([store[row, :, :length] for store in stores])
            for stores in (cache.keys, cache.values)
        ]
        yield row, pair[0], pair[1]


def distance(a: KVCache, b: KVCache) -> float:
    """Return the largest difference between the filled slots of two caches.

    It is infinite if their lengths differ.
    """
    if list(map(int, a.lengths)) != list(map(int, b.lengths)):
        return float("inf")
    pairs = [
        (mine, theirs)
        for left, right in zip(filled(a), filled(b), strict=True)
        for mine, theirs in zip(left[1:], right[1:], strict=True)
    ]
    return max(
        (float((mine - theirs).abs().max()) for mine, theirs in pairs if mine.numel()), default=0.0
    )


@st.composite
def models(draw: st.DrawFn, layers: int | None = None) -> Qwen3:
    """Draw a float64 model: any family, tied or not, any number of heads, one to three layers.

    `layers` sets the number of layers.
    """
    heads, kv_heads, head_dim = draw(st.sampled_from(LAYOUTS))
    config = tiny_config(
        draw(st.sampled_from(FAMILIES)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_hidden_layers=layers or draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
    )
    return random_model(config, draw(st.integers(0, 99)))


# -- a second implementation -----------------------------------------------------------------------


def reference(
    model: Qwen3, x: Tensor, positions: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """Return the hidden states of one row x (T, D), from an independent implementation.

    It is written from the papers, with complex rotations and a dense softmax. `positions` (T,) and
    `visible` (T, T) can be given to test block masks and shifted positions.
    """
    c, weights, length = model.config, model.state_dict(), len(x)
    positions = torch.arange(length) if positions is None else positions
    visible = torch.ones(length, length, dtype=torch.bool).tril() if visible is None else visible
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    rotation = torch.exp(1j * positions[:, None] * frequency)  # (T, d/2)

    def norm(y: Tensor, name: str) -> Tensor:
        return (
            y
            / (y.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()
            * weights[f"{name}.weight"]
        )

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def heads(y: Tensor, name: str, rotated: bool) -> Tensor:
        z = linear(y, f"{name}_proj").view(length, -1, c.head_dim).transpose(0, 1)  # (heads, T, d)
        if rotated:
            z = norm(z, f"{name}_norm") if c.model_type == "qwen3" else z
            half = torch.complex(*z.chunk(2, -1)) * rotation
            z = torch.cat([half.real, half.imag], -1)
        return z.repeat_interleave(c.num_attention_heads // len(z), 0)  # (H, T, d)

    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        y = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (heads(y, f"{prefix}.self_attn.{name}", name != "v") for name in "qkv")
        scores = (q @ k.transpose(1, 2) / c.head_dim**0.5).masked_fill(
            ~visible, -torch.inf
        )  # (H, T, T)
        x = x + linear(
            (scores.softmax(-1) @ v).transpose(0, 1).flatten(1), f"{prefix}.self_attn.o_proj"
        )
        y = norm(x, f"{prefix}.post_attention_layernorm")
        gate = linear(y, f"{prefix}.mlp.gate_proj")
        x = x + linear(
            gate * gate.sigmoid() * linear(y, f"{prefix}.mlp.up_proj"), f"{prefix}.mlp.down_proj"
        )
    return norm(x, "model.norm")


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between two tensors, relative to the largest entry of `b`."""
    return float((a - b).abs().max() / b.abs().max())


def apart_by_norm(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference between two tensors, relative to the norm of `b`."""
    return float(torch.dist(a.double(), b.double()) / b.double().norm())
