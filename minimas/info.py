"""What a model is and what it will need, from its config.json alone. Does not know: its weights, devices."""

from pathlib import Path

import torch

from .cache import KVCache
from .config import Config, read_json
from .load import resolve
from .model import Qwen3


def describe(name: str | Path) -> dict[str, str]:
    """Lines about model `name`, label -> text; raises FileNotFoundError or ValueError as `load` does."""
    folder = resolve(name, only_config=True)
    c = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        model = Qwen3(c)
        slot = KVCache(c, 1, getattr(torch, c.dtype)).slot_nbytes
    embedding, count = c.vocab_size * c.hidden_size, sum(weight.numel() for weight in model.state_dict().values())
    team = 4 * (200 + 40)  # agents × (prompt + thoughts), a typical question
    tied = "tied: W_a is the identity up to λ, only the rescaling is left"
    untied = f"untied: W_a is a {c.hidden_size} × {c.hidden_size} map, {c.hidden_size**2 * 4 / 1e6:,.0f} MB in float32"
    return {
        "model": f"{name} in {folder}, {c.dtype}{', with teams.json' if (folder / 'teams.json').is_file() else ''}",
        "architecture": f"{c.model_type}, {c.num_hidden_layers} layers, hidden size {c.hidden_size:,}, "
        f"{c.num_attention_heads} query and {c.num_key_value_heads} key-value heads of {c.head_dim}",
        "vocabulary": f"{c.vocab_size:,} tokens, context {c.max_position_embeddings:,}",
        "parameters": f"{count:,} ({embedding / count:.0%} in the token embedding)",
        "weights": f"bfloat16 {count * 2 / 1e6:,.1f} MB, float32 {count * 4 / 1e6:,.1f} MB",
        "memory": f"{slot / 1024:,.1f} KiB a token; {team * slot / 1e6:,.1f} MB for 4 agents who read 200, think 40",
        "alignment": tied if c.tie_word_embeddings else untied,
    }
