"""Files of a memory and of an aligner: safetensors with the fingerprint of the model they were made by.

A file is written whole or not at all, and refused by every other model, because the same shapes mean something else to
it. It holds, beside the format's and the model's name:

    memory     lengths (B,) int64; keys.i and values.i (B, K, S, d) of layer i, the filled slots only
    aligner    matrix (D, D), scale (D,), shift (D,), norm (): those that the map has

Nothing here is unpickled. Does not know: what memories and maps are for; `KVCache` and `Aligner` call this room.

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
    """Write the filled slots of a `KVCache` and its model's fingerprint, whole or not at all.

    Raises ValueError when no model has written to this memory, OSError naming a file that cannot be written.
    """
    if cache.owner is None:
        raise ValueError(
            f"{path}: no model has written to this memory, so there is nothing to save"
        )
    tensors, filled = {"lengths": cache.lengths}, int(cache.lengths.max())
    for kind, stores in (("keys", cache.keys), ("values", cache.values)):
        tensors |= {
            f"{kind}.{i}": store[:, :, :filled].contiguous().cpu() for i, store in enumerate(stores)
        }
    write_file(path, "memory", tensors, (cache.owner.name, cache.owner.fingerprint()))


def read_memory(path: str | Path, model: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Read lengths (B,) and, onto the device and into the dtype of `model`, each layer's keys and values (B, K, S, d).

    Raises FileNotFoundError, or ValueError naming a file that is damaged, foreign, or made by another model.
    """
    tensors = read_file(path, "memory", model)
    lengths, c = tensors.get("lengths", torch.empty(0)), model.config
    if (
        lengths.dtype != torch.int64
        or lengths.ndim != 1
        or not len(lengths)
        or int(lengths.min()) < 0
    ):
        raise ValueError(
            f"{path}: lengths: found {lengths.tolist()}, expected one count for each row"
        )
    shape = (len(lengths), c.num_key_value_heads, int(lengths.max()), c.head_dim)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for kind, stores in (("keys", keys), ("values", values)):
        for layer in range(c.num_hidden_layers):
            found = tensors.get(f"{kind}.{layer}", torch.empty(0))
            if found.shape != shape or not found.is_floating_point():
                raise ValueError(
                    f"{path}: {kind}.{layer}: found {tuple(found.shape)}, expected floats {shape}"
                )
            stores.append(found.to(model.device, model.dtype))
    return lengths, keys, values


def write_aligner(path: str | Path, align: Any) -> None:
    """Write the parts of an `Aligner` and its model's fingerprint, whole or not at all.

    Raises ValueError if the map was made without `model`, OSError naming a file that cannot be written.
    """
    if align.made_for is None:
        raise ValueError(f"{path}: found an Aligner of no model, expected one made with model=")
    parts = {"matrix": align.matrix, "scale": align.scale, "shift": align.shift}
    tensors = {name: x.contiguous().cpu() for name, x in parts.items() if x is not None}
    if align.norm is not None:
        tensors["norm"] = torch.tensor(align.norm, dtype=torch.float64)
    write_file(path, "aligner", tensors, align.made_for)


def read_aligner(path: str | Path, model: Any) -> dict[str, Any]:
    """Read the parts of a map by name, tensors onto the device of `model` and in at least float32.

    Raises FileNotFoundError, or ValueError naming a file that is damaged, of another format, or made for another model.
    """
    D = model.config.hidden_size
    shapes = {"matrix": (D, D), "scale": (D,), "shift": (D,), "norm": ()}
    parts: dict[str, Any] = {}
    for name, read in read_file(path, "aligner", model).items():
        if read.shape != shapes.get(name) or not read.is_floating_point():
            found = f"{read.dtype} of shape {tuple(read.shape)}"
            raise ValueError(f"{path}: {name}: found {found}, expected floats among {shapes}")
        x = read.to(model.device, torch.promote_types(model.dtype, torch.float32))
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{path}: {name}: found NaN or infinity, expected finite values")
        parts[name] = read.item() if name == "norm" else x
    return parts


def write_file(
    path: str | Path, what: str, tensors: dict[str, Tensor], made_by: tuple[str, str]
) -> None:
    """Write contiguous CPU tensors to a safetensors file, whole or not at all.

    `what` they are ("memory", "aligner") names the format, `made_by` is a model's name and
    fingerprint. Raises OSError naming a file that cannot be written.
    """
    metadata = {"format": f"minimas-{what}-1", "model": made_by[0], "fingerprint": made_by[1]}
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)  # a full disk leaves an older file as it was
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot write the {what} ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def read_file(path: str | Path, what: str, model: Any) -> dict[str, Tensor]:
    """Read the tensors that `write_file` wrote for `model`, by name, on the CPU, unchecked.

    Raises FileNotFoundError, or ValueError naming a file that is damaged, of another format, or
    made by another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()  # the file itself is no dict
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such {what} file") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    found, expected = metadata.get("format"), f"minimas-{what}-1"
    if found != expected:
        raise ValueError(f"{path}: format: found {found!r}, expected {expected!r}")
    made_by = metadata.get("model"), metadata.get("fingerprint")
    article = "an" if what == "aligner" else "a"
    reader = model.name, model.fingerprint()
    if made_by[1] != reader[1]:
        raise ValueError(
            f"{path}: model: found {article} {what} of {made_by}, expected one of {reader}"
        )
    return tensors
