"""Load a model from a Hugging Face folder: config.json and safetensors, and nothing else.

Tensors are read one at a time and go straight to their place, so there is never a second copy of
the model. Nothing is ever unpickled. A name is checked against the model before a tensor is read:
one that is missing, left over or of another shape is refused. Does not know: tokenizers, the hub,
other formats, quantization.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import Config, read_json
from .model import Qwen3

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = ("BF16", "F16", "F32", "F64")


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Qwen3:
    """Load the model in `folder`, from config.json and safetensors, for inference.

    `dtype` None is the checkpoint's own. Raises FileNotFoundError or ValueError naming the file,
    the field or tensor, what was found and what was expected.
    """
    source = Folder(Path(folder))
    path = Path(folder) / "config.json"
    config = Config.from_dict(read_json(path), str(path))
    model = empty_model(config, str(folder), source, str(path))
    fill(model, source, torch.device(device), dtype or getattr(torch, config.dtype))
    return model.eval()


def empty_model(config: Config, name: str, source: Any, config_path: str) -> Qwen3:
    """Return a model without memory for weights, after checking that `source` has all of them.

    `source` is a `Folder`, or what has `path`, `shapes` and `read` like one. Raises ValueError for
    a tensor that is missing, superfluous or of another shape.
    """
    with torch.device("meta"):
        model = Qwen3(config, name)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, shape in wanted.items():
        if source.shapes.get(key) != shape:
            found = f"shape {source.shapes[key]}" if key in source.shapes else "nothing"
            raise ValueError(
                f"{source.path}: tensor {key}: found {found}, expected shape {shape} by config.json"
            )
    # Old Llama checkpoints carry the rotary frequencies.
    ignored = {key for key in source.shapes if key.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings:  # Qwen3-0.6B has a second copy of its tied embedding
        ignored.add("lm_head.weight")
    for key in source.shapes.keys() - wanted.keys() - ignored:
        raise ValueError(
            f"{source.path}: tensor {key} belongs to nothing in a model of this config.json"
        )
    return model


def fill(
    model: Qwen3,
    source: Any,
    device: torch.device,
    dtype: torch.dtype,
    replace: Callable[[str, nn.Module], nn.Module | None] | None = None,
) -> None:
    """Read every parameter of `model` from `source` onto `device` in `dtype`.

    `replace` may return another module to put in place of one, such as a quantized layer. Raises
    ValueError if the model is tied and its LM head in the file is another matrix.
    """
    for name, module in list(model.named_modules()):
        new = replace(name, module) if replace is not None else None
        if new is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new)
            continue
        for leaf, _ in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}"
            weight = nn.Parameter(source.read(key, dtype).to(device), requires_grad=False)
            setattr(module, leaf, weight)
    if model.config.tie_word_embeddings and "lm_head.weight" in source.shapes:
        embedding = model.model.embed_tokens.weight
        if not torch.equal(source.read("lm_head.weight", dtype).to(device), embedding):
            raise ValueError(
                f"{source.path}: tie_word_embeddings: found true in config.json, but "
                "lm_head.weight is different"
            )


class Folder:
    """The tensors of a model folder in Hugging Face's layout; `shapes` maps their names to shapes.

    A `GGUF` has the same attributes and methods.
    """

    files = None  # a GGUF file holds its tokenizer's files itself
    no_tokenizer = None

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError or ValueError for files that are missing or damaged."""
        self.path = path
        self._found = _checkpoint(path)
        self.shapes = {key: shape for key, (_, shape) in self._found.items()}

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor onto the CPU."""
        # Opened for each tensor: a mapping that stays would keep the whole file in memory.
        with _opened(self._found[key][0]) as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor.to(dtype, copy=True)

    def blocks(self, key: str) -> None:
        """Return None: safetensors hold no blocks of four or eight bits."""


def _checkpoint(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Return the file and the shape of every tensor, by name, from one file or an index."""
    if (folder / WEIGHTS).is_file():
        return _contents(folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        others = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "an empty folder"
        raise FileNotFoundError(
            f"{folder}: found {others}, expected {WEIGHTS} or {INDEX} (nothing is ever unpickled)"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problem = f"found {weight_map!r:.80}"
        raise ValueError(f"{index}: weight_map: {problem}, expected tensor names -> file names")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for shard in dict.fromkeys(map(str, weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map: found {shard!r}, expected a .safetensors file of this folder"
            )
        found = _contents(folder / shard) | found
    for key in weight_map.keys() | found.keys():
        if key not in found or found[key][0].name != weight_map.get(key):
            seen = found[key][0].name if key in found else "no file"
            raise ValueError(
                f"{index}: tensor {key}: found in {seen}, expected in {weight_map.get(key)}"
            )
    return found


def _contents(path: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    found = {}
    with _opened(path) as file:
        for key in file.keys():
            part = file.get_slice(key)
            if part.get_dtype() not in STORED:
                raise ValueError(
                    f"{path}: tensor {key}: found {part.get_dtype()}, expected {', '.join(STORED)}"
                )
            found[key] = (path, tuple(part.get_shape()))
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: found a truncated or foreign file, expected safetensors ({error})"
        ) from error
