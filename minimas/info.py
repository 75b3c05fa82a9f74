"""Describe a model and the memory that it needs, from its config.json or its GGUF file's header.

This file does not depend on the values of the weights.
"""

import os
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .core import files
from .core.cache import KVCache
from .core.checkpoint import EMBEDDING
from .core.config import Config, read_json
from .core.model import Qwen3
from .fast.quantize import FORMATS, TORCH_FORMATS
from .formats.gguf import GGUF
from .load import resolve

OVERHEAD = 0.5e9  # bytes that CUDA, or Python and torch, take in addition to all tensors
CHUNK = 512  # prompt tokens that are prefilled at a time
TEAM_TOKENS = 960  # 4 agents of 200 prompt tokens and 40 latent steps
AS_IN_FILE = "as in the file"
KEPT = {"q4": "kept as q4", "q8": "rounded to q8"}  # by the result of `GGUF.low_bits`
in_words = partial(tqdm.format_sizeof, suffix="B")  # bytes, in the unit that makes it 1 or more


def describe(
    name: str | Path, batch_size: int = 1, context: int = TEAM_TOKENS, max_new_tokens: int = 256
) -> dict[str, str]:
    """Return lines about the model `name`, label -> text.

    The KV cache has `batch_size` rows, each with `context` prompt tokens and latent steps and with
    `max_new_tokens` generated tokens. Raises FileNotFoundError or ValueError as `load` does.
    """
    if str(name).endswith(".safetensors"):
        return describe_memory(Path(name))
    path = resolve(name, only_config=True)
    gguf = None if path.is_dir() else GGUF(path)
    file = path / "config.json"
    c = gguf.config if gguf else Config.from_dict(read_json(file), str(file))
    with torch.device("meta"):
        model = Qwen3(c)
        slot = KVCache(c, 1, getattr(torch, c.dtype)).slot_nbytes
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    count = sum(weights.values())
    width = c.hidden_size
    sizes = weight_bytes(weights, c, gguf)
    peaks = peak_bytes(sizes, c, slot, batch_size, context, max_new_tokens)
    lines = {
        "model": f"{name} in {path}, {c.dtype}"
        f"{', with teams.json' * (path / 'teams.json').is_file()}",
        "architecture": f"{c.model_type}, {c.num_hidden_layers} layers, "
        f"hidden size {width:,}, {c.num_attention_heads} query and "
        f"{c.num_key_value_heads} key-value heads of {c.head_dim}",
        "vocabulary": f"{c.vocab_size:,} tokens, context {c.max_position_embeddings:,}",
        "parameters": f"{count:,} ({c.vocab_size * width / count:.0%} in the token embedding)",
        "weights": ", ".join(f"{form} {in_words(size)}" for form, size in sizes.items()),
        "memory": f"{slot / 1024:,.1f} KiB per token; "
        f"{in_words(slot * batch_size * (context + max_new_tokens))} for {batch_size} × "
        f"({context:,} prompt tokens and latent steps + {max_new_tokens:,} generated tokens)",
        "peak": ", ".join(f"{form} {in_words(peak)}" for form, peak in peaks.items()),
        "fits": places(peaks),
        "alignment": "tied: W_a is the identity up to λ, only the rescaling is left"
        if c.tie_word_embeddings
        else f"untied: W_a is a {width} × {width} map, {in_words(width**2 * 4)} in float32",
    }
    if gguf:
        kinds = {
            f"{tensor.kind} {KEPT.get(gguf.low_bits(key), f'as {c.dtype}')}"
            for key, tensor in gguf.tensors.items()
            if tensor.rows > 1
        }
        lines["as loaded"] = (
            f"{in_words(sizes[AS_IN_FILE])}: {', '.join(sorted(kinds))}{gguf.needs}"
        )
    return lines


def peak_bytes(
    sizes: dict[str, float], c: Config, slot: int, rows: int, context: int, new: int
) -> dict[str, float]:
    """Return the bytes of all tensors at their peak, for weights of `sizes` in each format.

    The peak is reached in solving for W_a, in the last chunk of a prompt (in an MLP or in a
    rotation of the queries), or at the end, with the KV cache as it is allocated. tests/rehearsal
    compares this with the sum of all tensors of a call.
    """
    D = c.hidden_size
    queries = c.num_attention_heads * c.head_dim
    each = 8 * D + max(6 * c.intermediate_size, 16 * queries)  # bytes of a token's activations
    prefilling = min(context, CHUNK) * each + context * slot
    slots = max(context + new, context * 3 // 2 + 64)  # see `with_capacity`
    solving = 12 * D * D + 2**17 * D
    working = max(solving, rows * max(prefilling, slots * slot) + 4 * D * D)
    # The 8-bit copy of a tied embedding is unpacked once, for the fingerprint.
    head = 2 * c.vocab_size * D * c.tie_word_embeddings
    return {
        form: size + max(working, head * (form in TORCH_FORMATS)) for form, size in sizes.items()
    }


def places(peaks: dict[str, float]) -> str:
    """Return the formats that fit on each common GPU and on this machine, in words."""
    fits = []
    for place, total in memories().items():
        formats = [form for form, peak in peaks.items() if peak + OVERHEAD < total]
        fits.append(f"{place}: {', '.join(formats) or 'none'}")
    return "; ".join(fits)


def memories() -> dict[str, float]:
    """Return the memory of common GPUs, of this machine and of its GPUs, by name."""
    found = {f"{size} GB": size * 1e9 for size in (8, 12, 16, 24)}
    if hasattr(os, "sysconf"):  # Windows does not have it
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found[f"this machine's {in_words(size)}"] = size
    for i in range(torch.cuda.device_count()):
        size = torch.cuda.get_device_properties(i).total_memory
        found[f"its cuda:{i} of {in_words(size)}"] = size
    return found


def describe_memory(path: Path) -> dict[str, str]:
    """Return lines about the file of a KV cache or a map. Raises ValueError for another file."""
    tensors, metadata = files.contents(path, "memory", "aligner")
    kind = metadata["format"].split("-")[1]
    lines = {
        "file": f"{path}, {kind}, {in_words(path.stat().st_size)}",
        "model": f"{metadata.get('model')}, fingerprint {metadata.get('fingerprint')}",
    }
    if kind == "memory":
        lines["memory"] = (
            f"{len(tensors['lengths'])} rows of {tensors['lengths'].tolist()} slots, "
            f"{sum(name.startswith('keys.') for name in tensors)} layers, {tensors['keys.0'].dtype}"
        )
    else:
        lines["map"] = ", ".join(f"{name} {tuple(part.shape)}" for name, part in tensors.items())
    return lines


def weight_bytes(weights: dict[str, int], c: Config, gguf: GGUF | None) -> dict[str, float]:
    """Return the bytes of `weights`, name -> number of weights, in each format.

    See `replacement` and `complete` in fast/quantize.py for what becomes of each weight.
    """
    count = sum(weights.values())
    sizes = {"bfloat16": 2.0 * count, "float32": 4.0 * count}
    plain = sizes.get(c.dtype, 2.0 * count) / count
    for form in (*FORMATS, AS_IN_FILE) if gguf else FORMATS:
        kept = {}  # the low-bit formats of the file
        if gguf and form in (*TORCH_FORMATS, AS_IN_FILE):
            kept = {key: gguf.low_bits(key) for key in weights}
        size = 0.0
        for key, number in weights.items():
            used = kept.get(key)
            if key.endswith("_proj.weight") and used != "q4" and form in FORMATS:
                used = form
            size += number * (FORMATS[used] / 8 if used else plain)
        quantized = form in TORCH_FORMATS or any(kept.values())
        if quantized and c.tie_word_embeddings and not kept.get(EMBEDDING):
            size += weights[EMBEDDING]  # the 8-bit LM head
        sizes[form] = size
    return sizes
