"""Files of a KV cache and of an aligner: safetensors with the fingerprint of the model.

A file is written whole or not at all. Another model refuses it, because the same shapes have
another meaning there. It holds, beside the names of the format and the model:

    memory     lengths (B,) int64; keys.i and values.i (B, K, S, d) of layer i, filled slots only
    aligner    matrix (D, D), scale (D,), shift (D,), norm (): those that the map has

Nothing here is unpickled. Does not know: what caches and maps are for.

    B rows   K key-value heads   S slots   d head size   D hidden
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_memory(path: str | Path, cache: Any) -> None:
    """Write the filled slots of a `KVCache` and the fingerprint of its model.

    Raises ValueError if no model has written to the cache, OSError if the file cannot be written.
    """
    if cache.owner is None:
        raise ValueError(f"{path}: no model has written to this memory: nothing to save")
    filled, tensors = max(cache.lengths), {"lengths": torch.tensor(cache.lengths)}
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        tensors[f"keys.{layer}"] = keys[:, :, :filled]
        tensors[f"values.{layer}"] = values[:, :, :filled]
    _write(path, "memory", tensors, (cache.owner.name, cache.owner.fingerprint()))


def read_memory(path: str | Path, model: Any) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Read the lengths of the rows, and each layer's keys and values (B, K, S, d).

    Tensors are on the device and in the dtype of `model`. Raises FileNotFoundError, or ValueError
    if the file is damaged, of another format or of another model.
    """
    tensors, c = _read(path, "memory", model), model.config
    lengths = tensors.get("lengths", torch.empty(0))
    countable = lengths.dtype == torch.int64 and lengths.ndim == 1 and len(lengths) > 0
    if not countable or lengths.min() < 0:
        raise ValueError(f"{path}: lengths: found {lengths}, expected one count for each row")
    shape = (len(lengths), c.num_key_value_heads, int(lengths.max()), c.head_dim)

    def stored(name: str) -> Tensor:
        found = tensors.get(name, torch.empty(0))
        if found.shape != shape or not found.is_floating_point():
            raise ValueError(f"{path}: {name}: found {tuple(found.shape)}, expected floats {shape}")
        return found.to(model.device, model.dtype)

    keys = [stored(f"keys.{layer}") for layer in range(c.num_hidden_layers)]
    values = [stored(f"values.{layer}") for layer in range(c.num_hidden_layers)]
    return lengths.tolist(), keys, values


def write_aligner(path: str | Path, align: Any) -> None:
    """Write the parts of an `Aligner` and the fingerprint of its model.

    Raises ValueError if the map was made without `model`, OSError if the file cannot be written.
    """
    if align.made_for is None:
        raise ValueError(f"{path}: found an Aligner of no model, expected one made with model=")
    parts = {"matrix": align.matrix, "scale": align.scale, "shift": align.shift}
    if align.norm is not None:
        parts["norm"] = torch.tensor(align.norm, dtype=torch.float64)
    tensors = {name: part for name, part in parts.items() if part is not None}
    _write(path, "aligner", tensors, align.made_for)


def read_aligner(path: str | Path, model: Any) -> dict[str, Any]:
    """Read the parts of a map by name, on the device of `model` and in at least float32.

    Raises FileNotFoundError, or ValueError if the file is damaged, of another format or of another
    model.
    """
    D = model.config.hidden_size
    shapes = {"matrix": (D, D), "scale": (D,), "shift": (D,), "norm": ()}
    parts: dict[str, Any] = {}
    for name, part in _read(path, "aligner", model).items():
        if part.shape != shapes.get(name) or not part.is_floating_point():
            found = f"{part.dtype} of shape {tuple(part.shape)}"
            raise ValueError(f"{path}: {name}: found {found}, expected floats among {shapes}")
        wide = part.to(model.device, torch.promote_types(model.dtype, torch.float32))
        if not bool(torch.isfinite(wide).all()):
            raise ValueError(f"{path}: {name}: found NaN or infinity, expected finite values")
        parts[name] = part.item() if name == "norm" else wide
    return parts


def _write(
    path: str | Path, what: str, tensors: dict[str, Tensor], made_by: tuple[str, str]
) -> None:
    """Write tensors whole or not at all; `made_by` is the name and the fingerprint of a model."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {"format": f"minimas-{what}-1", "model": made_by[0], "fingerprint": made_by[1]}
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)  # a full disk leaves an older file as it was
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot write the {what} ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _read(path: str | Path, what: str, model: Any) -> dict[str, Tensor]:
    """Read the tensors that `_write` wrote for `model`, by name, on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such {what} file") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    found, expected = metadata.get("format"), f"minimas-{what}-1"
    if found != expected:
        raise ValueError(f"{path}: format: found {found!r}, expected {expected!r}")
    made_by = metadata.get("model"), metadata.get("fingerprint")
    reader = model.name, model.fingerprint()
    if made_by[1] != reader[1]:
        found = f"found {'an' if what == 'aligner' else 'a'} {what} of {made_by}"
        raise ValueError(f"{path}: model: {found}, expected one of {reader}")
    return tensors
