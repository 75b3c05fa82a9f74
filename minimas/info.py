"""What a model is and what it will need, from its config.json alone. Does not know: its weights, devices."""

from pathlib import Path

import torch
from torch import nn

from .core.cache import KVCache
from .core.config import Config
from .core.model import Qwen3
from .fast.quantize import FORMATS
from .load import open_source, resolve, settings

SPARE = 1.5e9  # bytes beside weights and memory: torch's own, W_a, the activations of a prompt


def describe(name: str | Path) -> dict[str, str]:
    """Lines about model `name`, label -> text; raises FileNotFoundError or ValueError as `load` does."""
    folder = resolve(name, only_config=True)
    files = None if folder.is_dir() else open_source(folder).files
    c = Config.from_dict(*settings(folder, files, "config.json", needed=True))
    with torch.device("meta"):
        model = Qwen3(c)
        slot = KVCache(c, 1, getattr(torch, c.dtype)).slot_nbytes
    embedding, count = (
        c.vocab_size * c.hidden_size,
        sum(weight.numel() for weight in model.state_dict().values()),
    )
    matrices = sum(m.weight.numel() for m in model.model.modules() if type(m) is nn.Linear)
    head = embedding if c.tie_word_embeddings else 0  # q4 and q8 keep an 8-bit copy of a tied one
    sizes = {"bfloat16": 2.0 * count, "float32": 4.0 * count}
    for form, stored in FORMATS.items():
        sizes[form] = (
            2 * (count - matrices) + matrices * stored.bits / 8 + (0 if stored.package else head)
        )
    team = 4 * (200 + 40)  # agents × (prompt + thoughts), a typical question

    def fitting(room: int) -> str:
        return (
            ", ".join(n for n, size in sizes.items() if size + team * slot + SPARE < room * 1e9)
            or "none"
        )

    tied = "tied: W_a is the identity up to λ, only the rescaling is left"
    untied = f"untied: W_a is a {c.hidden_size} × {c.hidden_size} map, {c.hidden_size**2 * 4 / 1e6:,.0f} MB in float32"
    return {
        "model": f"{name} in {folder}, {c.dtype}{', with teams.json' if (folder / 'teams.json').is_file() else ''}",
        "architecture": f"{c.model_type}, {c.num_hidden_layers} layers, hidden size {c.hidden_size:,}, "
        f"{c.num_attention_heads} query and {c.num_key_value_heads} key-value heads of {c.head_dim}",
        "vocabulary": f"{c.vocab_size:,} tokens, context {c.max_position_embeddings:,}",
        "parameters": f"{count:,} ({embedding / count:.0%} in the token embedding)",
        "weights": ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items()),
        "memory": f"{slot / 1024:,.1f} KiB a token; {team * slot / 1e6:,.1f} MB for 4 agents who read 200, think 40",
        "fits": "; ".join(f"{room} GB: {fitting(room)}" for room in (8, 12, 16, 24)),
        "alignment": tied if c.tie_word_embeddings else untied,
    }
