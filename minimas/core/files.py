"""Files of a KV cache and of an aligner: safetensors with the fingerprint of the model.

A file is written completely or not at all. It can be read only for the model that it was made for,
because tensors of the same shape mean something else in another model. Besides the format and the
identity of the model, a file holds:

    memory     lengths (B,) int64; keys.i and values.i (B, K, S, d) of layer i, filled slots only;
               in 8 bits, int8 to be multiplied by scale.keys.i and scale.values.i (B, K, S, 1)
    aligner    matrix (D, D), scale (D,), shift (D,) and norm (), each only if the map has it

Nothing here is unpickled.

    B rows   K key-value heads   S slots   d head size   D hidden
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def identity(model: Any) -> dict[str, str]:
    """Return the metadata that identify a model. Raises ValueError for any other object."""
    if not hasattr(model, "fingerprint"):
        raise ValueError(f"model: found {type(model).__name__}, expected a Qwen3, like lm.model")
    return {"model": model.name, "fingerprint": model.fingerprint()}


def write(
    path: str | Path,
    what: str,
    tensors: Mapping[str, Tensor | None],
    made_by: dict[str, str] | None,
) -> None:
    """Write the tensors that are not None to a file of kind `what`, "memory" or "aligner".

    `made_by` is the `identity` of the model. A link stays a link. Raises ValueError if `made_by` is
    None, OSError if the file cannot be written, or if `path` is a folder or a device.
    """
    if made_by is None:
        raise ValueError(f"{path}: found {what} without a model, expected one made by a model")
    stored = {name: part.contiguous().cpu() for name, part in tensors.items() if part is not None}
    target = Path(path).resolve()
    partial = Path(f"{target}.{os.getpid()}.partial")
    try:
        if target.exists() and not target.is_file():
            raise OSError("found a folder or a device, expected a file")
        partial.touch()
        mode = (target if target.exists() else partial).stat().st_mode
        save_file(stored, partial, {"format": f"minimas-{what}-1"} | made_by)
        partial.chmod(mode)  # save_file makes a file that only its owner can read
        partial.replace(target)  # a full disk leaves an older file intact
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot write the {what} ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path, what: str, model: Any) -> dict[str, Tensor]:
    """Return the tensors that `write` has saved for `model`, by name, on the CPU.

    Raises FileNotFoundError, or ValueError if the file is damaged, has another format or belongs
    to another model.
    """
    reader = identity(model)
    tensors, metadata = contents(path, what)
    if metadata.get("fingerprint") != reader["fingerprint"]:
        raise ValueError(f"{path}: model: found {what} of {metadata}, expected {reader}")
    return tensors


def contents(path: str | Path, *kinds: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, on the CPU, and the metadata of a file of one of the `kinds`.

    Raises FileNotFoundError, or ValueError if the file is damaged or has another format.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        formats = [f"minimas-{kind}-1" for kind in kinds]
        found = metadata.get("format")
        if found not in formats:
            raise ValueError(f"{path}: format: found {found!r}, expected {' or '.join(formats)}")
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def opened(path: str | Path) -> Any:
    """Return an open safetensors file, for use in a `with` statement.

    Raises FileNotFoundError, or ValueError if the file is damaged or has another format.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file, or not allowed to open it") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: found a damaged file or another format, expected safetensors ({error})"
        ) from error


def floats(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    model: Any,
    dtype: torch.dtype,
) -> Tensor:
    """Return tensor `name` on the model's device in `dtype`; int8 is multiplied by its scale.

    Raises ValueError naming `path` and `name` unless the tensor has the shape `shapes[name]` and
    holds finite floating-point numbers, or int8 values with a valid scale.
    """
    part = tensors.get(name, torch.empty(0))
    rounded = part.dtype == torch.int8
    if part.shape != shapes.get(name) or not (part.is_floating_point() or rounded):
        raise ValueError(
            f"{path}: {name}: found {part.dtype} of shape {tuple(part.shape)}, "
            f"expected floats: {shapes}"
        )
    if rounded:
        part = part * floats(path, tensors, f"scale.{name}", shapes, model, torch.float32).cpu()
    part = part.to(dtype).to(model.device)  # in this order: an Apple GPU has no float64
    if not part.isfinite().all():
        raise ValueError(f"{path}: {name}: found NaN or infinity, expected finite values")
    return part


def in_8_bits(part: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (…, d), −127 … 127, and a float32 scale (…, 1) for each vector."""
    scale = part.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (part / scale).round().to(torch.int8), scale
