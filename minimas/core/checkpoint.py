"""Load a model from a Hugging Face folder: config.json and safetensors, and nothing else.

Tensors are read one at a time, straight into the model, so there is never a second copy of it.
Nothing is ever unpickled. All names and shapes are checked before the first tensor is read: a
tensor that is missing, unexpected or of another shape raises an error. This file does not depend
on tokenizers, the hub, other formats or quantization.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config, read_json
from .files import opened
from .model import Qwen3

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED = "BF16 F16 F32 F64".split()
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Qwen3:
    """Load the model in `folder`, from config.json and safetensors, for inference.

    `dtype=None` means the checkpoint's own. Raises FileNotFoundError or ValueError naming the file,
    the field or tensor, what was found and what was expected.
    """
    source = Folder(Path(folder))
    model = empty_model(str(folder), source)
    fill(model, source, torch.device(device), dtype or getattr(torch, source.config.dtype))
    return model.eval()


def empty_model(name: str, source: Any) -> Qwen3:
    """Return a model on the meta device, after checking that `source` has all of its weights.

    `source` is a `Folder` or an object with the same `path`, `config`, `shapes` and `read`. Raises
    ValueError for a tensor that is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = Qwen3(source.config, name)
    wanted = model.state_dict()
    shapes = source.shapes
    # A file may store tied embeddings as the LM head, in addition to or in place of the embedding.
    if source.config.tie_word_embeddings and HEAD in shapes:
        wanted[HEAD] = wanted[EMBEDDING]
        shapes.setdefault(EMBEDDING, shapes[HEAD])
    for key, weight in wanted.items():
        shape = tuple(weight.shape)
        if shapes.get(key) != shape:
            raise ValueError(
                f"{source.path}: tensor {key}: found {'shape ' * (key in shapes)}"
                f"{shapes.get(key, 'nothing')}, expected shape {shape} by config.json"
            )
    for key in shapes.keys() - wanted.keys():
        if not key.endswith(".rotary_emb.inv_freq"):  # in old Llama checkpoints
            raise ValueError(
                f"{source.path}: tensor {key}: unexpected in a model with this config.json"
            )
    return model


def fill(
    model: Qwen3,
    source: Any,
    device: torch.device,
    dtype: torch.dtype,
    replace: Any = lambda *_: None,
    watch: Any = iter,
) -> None:
    """Read every parameter of `model` from `source` onto `device` in `dtype`.

    `replace` is called with each module's name and the module. It may return another module to put
    in its place, such as a quantized layer. `watch` wraps the list of modules, for a progress bar.
    Raises ValueError if the embeddings are tied, but the file has an LM head that differs.
    """
    for name, module in watch(list(model.named_modules())):
        new = replace(name, module)
        if new is not None:
            model.set_submodule(name, new)
            continue
        for leaf, _ in module.named_parameters(recurse=False):
            weight = source.read(f"{name}.{leaf}", dtype).to(device)
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
    if (
        model.config.tie_word_embeddings
        and HEAD in source.shapes
        and not torch.equal(source.read(HEAD, dtype).to(device), model.model.embed_tokens.weight)
    ):
        raise ValueError(
            f"{source.path}: tie_word_embeddings: found true in config.json, but "
            "lm_head.weight is different"
        )


class Folder:
    """A model folder in Hugging Face's layout: its config, and its tensors by name.

    `shapes` maps the tensors' names to their shapes. `formats.gguf.GGUF` has the same
    attributes and methods.
    """

    files = no_tokenizer = None  # set in `GGUF`, because a GGUF file includes the JSON files

    def __init__(self, path: Path) -> None:
        """Read the config and the shapes of all tensors.

        Raises FileNotFoundError or ValueError for files that are missing or damaged.
        """
        self.path = path
        source = path / "config.json"
        self.config = Config.from_dict(read_json(source), str(source))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, str] = {}
        index = read_index(path)
        for name in sorted(set(index.values())) or [WEIGHTS]:
            with opened(path / name) as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    if part.get_dtype() not in STORED:
                        raise ValueError(
                            f"{path / name}: tensor {key}: found {part.get_dtype()}, "
                            f"expected one of {', '.join(STORED)}"
                        )
                    self.shapes[key] = tuple(part.get_shape())
                    self._files[key] = name
        if index and index != self._files:
            logging.getLogger(__name__).warning(
                "%s: tensor %s, file %s: index and files disagree; using the files",
                path / INDEX,
                *min(index.items() ^ self._files.items()),
            )

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return the tensor `key` in `dtype`, on the CPU."""
        key = key if key in self._files else HEAD  # an embedding that is stored as LM head
        # Opened for each tensor: a mapping that stays open would keep the whole file in memory.
        with opened(self.path / self._files[key]) as file:
            return file.get_tensor(key).to(dtype, copy=True)  # type: ignore[no-any-return]

    def low_bits(self, key: str) -> str:
        """Return "", because safetensors files hold no 4-bit or 8-bit matrices."""
        return ""


def read_index(folder: Path) -> dict[str, str]:
    """Return {tensor name: file name}, or {} if all tensors are in model.safetensors.

    Raises FileNotFoundError if a file is missing, ValueError for a damaged index.
    """
    if (folder / WEIGHTS).is_file():
        return {}
    path = folder / INDEX
    if not path.is_file():
        others = ", ".join(sorted(file.name for file in folder.iterdir())[:6])
        raise FileNotFoundError(
            f"{folder}: found {others}, expected {WEIGHTS} or {INDEX} (nothing is ever unpickled)"
        )
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(
            f"{path}: weight_map: found {index!r:.80}, expected tensor names -> file names"
        )
    missing = set(map(str, index.values())) - {file.name for file in folder.glob("*.safetensors")}
    if missing:
        raise FileNotFoundError(
            f"{path}: weight_map: found {min(missing)!r}, expected a .safetensors file in this "
            "folder, which has none of that name"
        )
    return index
