"""Describe a model and what it will need, from its config.json alone.

Does not know: its weights, devices.
"""

from pathlib import Path

import torch
from torch import nn

from .core.cache import KVCache
from .core.config import Config
from .core.model import Qwen3
from .fast.quantize import FORMATS
from .load import open_source, read_settings, resolve

# Bytes besides the weights and the KV cache: torch's own, W_a, the activations of a prompt.
RESERVED = 1.5e9
TEAM_TOKENS = 4 * (200 + 40)  # 4 agents of 200 prompt tokens and 40 latent steps


def describe(name: str | Path) -> dict[str, str]:
    """Return lines about the model `name`, label -> text.

    Raises FileNotFoundError or ValueError as `load` does.
    """
    folder = resolve(name, only_config=True)
    files = None if folder.is_dir() else open_source(folder).files
    c = Config.from_dict(*read_settings(folder, files, "config.json", needed=True))
    with torch.device("meta"):
        model = Qwen3(c)
        slot = KVCache(c, 1, getattr(torch, c.dtype)).slot_nbytes
    count = sum(weight.numel() for weight in model.parameters())
    share = c.vocab_size * c.hidden_size / count
    team = TEAM_TOKENS * slot
    sizes = weight_bytes(model)
    fits = []
    for gigabytes in (8, 12, 16, 24):
        most = gigabytes * 1e9 - RESERVED - team
        formats = [form for form, size in sizes.items() if size < most]
        fits.append(f"{gigabytes} GB: {', '.join(formats) or 'none'}")
    with_teams = ", with teams.json" if (folder / "teams.json").is_file() else ""
    tied = "tied: W_a is the identity up to λ, only the rescaling is left"
    width = c.hidden_size
    untied = f"untied: W_a is a {width} × {width} map, {width**2 * 4 / 1e6:,.0f} MB in float32"
    return {
        "model": f"{name} in {folder}, {c.dtype}{with_teams}",
        "architecture": f"{c.model_type}, {c.num_hidden_layers} layers, "
        f"hidden size {c.hidden_size:,}, {c.num_attention_heads} query and "
        f"{c.num_key_value_heads} key-value heads of {c.head_dim}",
        "vocabulary": f"{c.vocab_size:,} tokens, context {c.max_position_embeddings:,}",
        "parameters": f"{count:,} ({share:.0%} in the token embedding)",
        "weights": ", ".join(f"{form} {size / 1e6:,.1f} MB" for form, size in sizes.items()),
        "memory": f"{slot / 1024:,.1f} KiB a token; {team / 1e6:,.1f} MB for 4 agents of 200 "
        "prompt tokens and 40 latent steps",
        "fits": "; ".join(fits),
        "alignment": tied if c.tie_word_embeddings else untied,
    }


def weight_bytes(model: Qwen3) -> dict[str, float]:
    """Return the bytes of a model's weights in each format; the model may be on "meta"."""
    count = sum(weight.numel() for weight in model.parameters())
    linear = [module for module in model.model.modules() if type(module) is nn.Linear]
    matrices = sum(module.weight.numel() for module in linear)
    sizes = {"bfloat16": 2.0 * count, "float32": 4.0 * count}
    for name, form in FORMATS.items():
        sizes[name] = 2 * (count - matrices) + matrices * form.bits / 8
        if model.config.tie_word_embeddings and not form.package:
            sizes[name] += model.model.embed_tokens.weight.numel()  # q4 and q8: an 8-bit LM head
    return sizes
