"""A name → a model on its device: a folder or a hub repository in Hugging Face's layout, tensor by tensor.

Every file is checked before the first tensor is read, every tensor goes straight to its final dtype and device, every
tensor is claimed and none is missing: `load` ends with a whole model or an exception. Nothing is ever unpickled, and
no code from a model folder is run. Tokenizer, sampling defaults and teams are read on first access, so that config,
rotary, cache, model and load work alone. Does not know: prompts, agents, the arithmetic of a forward pass.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import DTYPES, Config, read_json, token_ids
from .model import Qwen3

if TYPE_CHECKING:  # read on first access, see LM
    from .generate import Sampling
    from .latent import Aligner
    from .teams import Team
    from .tokenizer import Tokenizer

TINY = "weights/tiny"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = ("BF16", "F16", "F32", "F64")
CAN_PACK = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()


class LM:
    """A model with what its folder says about using it: `model`, `tokenizer`, `sampling`, `end_ids`, `teams`.

    `tokenizer` is None for a folder without tokenizer.json: the model can still be fed embeddings and token ids.
    """

    def __init__(self, model: Qwen3, folder: Path) -> None:
        self.model, self.folder = model, folder
        self._aligners: dict[str, Aligner] = {}

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """Raises ValueError for a broken file, or one with ids that the model has no embedding for."""
        if not (self.folder / "tokenizer.json").is_file():
            return None
        from .tokenizer import Tokenizer

        tokenizer, most = Tokenizer(self.folder), self.model.config.vocab_size
        if tokenizer.size > most:
            raise ValueError(f"{tokenizer.path}: found {tokenizer.size:,} ids, expected at most {most:,}, vocab_size")
        return tokenizer

    @cached_property
    def sampling(self) -> "Sampling":
        """The model's own sampling defaults, from generation_config.json; greedy without one."""
        from .generate import Sampling

        return Sampling.from_dict(*self._settings("generation_config.json"))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends a turn, as any of the folder's files says."""
        raw, path = self._settings("generation_config.json")
        ids = token_ids(raw.get("eos_token_id"), f"{path}: eos_token_id")
        return frozenset(ids).union(self.model.config.eos_token_ids, self.tokenizer.end_ids if self.tokenizer else ())

    @cached_property
    def teams(self) -> "dict[str, Team]":
        """The folder's own teams by name (teams.json), {} without one."""
        from .teams import Team

        raw, path = self._settings("teams.json")
        return {name: Team.from_dict(raw[name], f"{path}: {name}") for name in raw.keys() - {"latent_steps"}}

    @cached_property
    def default_steps(self) -> int:
        """How many thoughts an agent thinks if nobody says: teams.json's number, or 40 (paper: best at 40 to 80)."""
        raw, path = self._settings("teams.json")
        steps: int = raw.get("latent_steps", 40)
        if type(steps) is not int or steps < 0:
            raise ValueError(f"{path}: latent_steps: found {steps!r}, expected a whole number, 0 or more")
        return steps

    def _settings(self, name: str) -> tuple[dict[str, Any], str]:
        return read_json(self.folder / name, needed=False), str(self.folder / name)

    def aligner(self, kind: str) -> "Aligner":
        """The model's alignment of one kind, over the rows that the tokenizer can produce; computed once."""
        from .latent import Aligner

        if kind not in self._aligners:  # rows that no token has, padding to a round number, would move W_a and its norm
            rows = self.tokenizer.size if self.tokenizer is not None else None
            self._aligners[kind] = Aligner.from_model(self.model, kind, rows)
        return self._aligners[kind]


def load(name: str | Path = TINY, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> LM:
    """Load the model `name`, a local folder or a hub id, onto `device` ("auto": a CUDA GPU if there is one).

    `dtype` "auto" is the checkpoint's own. Peak memory is the weights plus the largest tensor. Raises FileNotFoundError
    or ValueError naming the file, the field, what was found and what was expected.
    """
    where, kind = _device(device), _dtype(dtype)
    folder = resolve(name)
    config = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    found = _checkpoint(folder)
    with torch.device("meta"):
        model = Qwen3(config, name=str(name))
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, shape in wanted.items():
        if key not in found or found[key][1] != shape:
            seen = f"shape {found[key][1]}" if key in found else "nothing"
            raise ValueError(f"{folder}: tensor {key}: found {seen}, expected shape {shape} by config.json")
    # Old Llama checkpoints carry the rotary frequencies, and Qwen3-0.6B a second copy of its tied embedding.
    twin = "lm_head.weight" if config.tie_word_embeddings else None
    for key, (path, _) in found.items():
        if key not in wanted and key != twin and not key.endswith(".rotary_emb.inv_freq"):
            raise ValueError(f"{path}: tensor {key} belongs to nothing in a model of this config.json")

    def read(key: str, copy: bool = True) -> Tensor:
        # Opened anew for every tensor: its mapping goes with it, else the whole file would be resident twice.
        with _opened(found[key][0]) as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor.to(device=where, dtype=kind or getattr(torch, config.dtype), copy=copy)

    for key in [key for key in found if key in wanted]:
        owner, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(read(key), requires_grad=False))
    if twin in found and not torch.equal(read("lm_head.weight", copy=False), model.model.embed_tokens.weight):
        raise ValueError(f"{folder / 'config.json'}: tie_word_embeddings: found true, but lm_head.weight is different")
    pack(model)
    return LM(model.eval(), folder)


def resolve(name: str | Path, only_config: bool = False) -> Path:
    """The folder of model `name`: a path, the embedded model, the hub's cache, the hub (`only_config`: no weights)."""
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{name}: found a file, expected a folder with config.json and {WEIGHTS}, or a hub id")
    if str(name) == TINY:  # inside the wheel, or beside the package in a checkout
        here = Path(__file__).parent / TINY
        for home in (here, here.parents[2] / TINY):
            if home.is_dir():
                return home
        raise FileNotFoundError(f"{TINY}: not found at {here}; pass a model, such as --model Qwen/Qwen3-0.6B")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id such as Qwen/Qwen3-0.6B")
    return _from_hub(str(name), only_config)


def _from_hub(repo: str, only_config: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    weights = [] if only_config else ["*.safetensors", INDEX]
    wanted = [*weights, "config.json", "generation_config.json", "tokenizer*.json", "chat_template.jinja", "teams.json"]
    try:
        cached = Path(snapshot_download(repo, allow_patterns=wanted, local_files_only=True))
        if only_config or (cached / WEIGHTS).is_file() or (cached / INDEX).is_file():
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:  # offline, gated (hf auth login), misspelt: what a hub raises has no common base
        missing = f"{repo}: no such folder here, config.json and {WEIGHTS} not in the cache {constants.HF_HUB_CACHE}"
        why = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{missing}; when online: hf download {repo} (the hub: {why})") from error


def _checkpoint(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every tensor's name -> its file and its shape, from one safetensors file or an index of several."""
    if (folder / WEIGHTS).is_file():
        return _contents(folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        others = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "an empty folder"
        raise FileNotFoundError(f"{folder}: found {others}, expected {WEIGHTS} or {INDEX} (nothing is ever unpickled)")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: found {weight_map!r:.80}, expected tensor names -> file names")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for shard in dict.fromkeys(map(str, weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map: found {shard!r}, expected a .safetensors file of this folder")
        found |= {key: place for key, place in _contents(folder / shard).items() if key not in found}
    for key in weight_map.keys() | found.keys():
        if key not in found or found[key][0].name != weight_map.get(key):
            seen = found[key][0].name if key in found else "no file"
            raise ValueError(f"{index}: tensor {key}: found in {seen}, expected in {weight_map.get(key)}")
    return found


def _contents(path: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    found = {}
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(key)
            if part.get_dtype() not in STORED:
                raise ValueError(f"{path}: tensor {key}: found {part.get_dtype()}, expected {', '.join(STORED)}")
            found[key] = (path, tuple(part.get_shape()))
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: found a truncated or foreign file, expected safetensors ({error})") from error


def _device(name: str | torch.device) -> torch.device:
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if gpus else "cpu") if str(name) == "auto" else name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cpu" and not (device.type == "cuda" and (device.index or 0) < gpus):
        raise ValueError(f"device (--device): found {str(name)!r}, expected auto, cpu, or cuda ({gpus} devices here)")
    return device


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    text = str(name).removeprefix("torch.").replace("bf16", "bfloat16").replace("fp", "float")
    if text not in ("auto", *DTYPES):
        raise ValueError(f"dtype (--dtype): found {name!r}, expected auto or one of {', '.join(DTYPES)}")
    return getattr(torch, text, None)


class PackedLinear(nn.Module):
    """A linear layer whose frozen bf16 weight is packed for the CPU's matrix units at its first use, in its place.

    This is the reordering that the compiler's freezing does: bit-equal results, eight rows for the price of one, where
    `F.linear` reads memory at half speed. `.weight` and `state_dict()` give copies; `.to()` brings the plain one back.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed: Tensor | None = None
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:  # the packed operator has no gradient
            return nn.functional.linear(x, self.weight, self.bias)
        if self.packed is None:
            weight = self.weight
            if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.requires_grad:  # changed since
                return nn.functional.linear(x, weight, self.bias)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.data, None)
            del self.weight, weight
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.packed is not None:
            return self.packed.to_dense()
        return super().__getattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        packed, self.packed = self.packed, None  # .to(), .float(), .cuda(): packing is for one dtype and device
        if packed is not None:
            self.weight = nn.Parameter(packed.to_dense(), requires_grad=False)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._apply(lambda weight: weight)
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.packed.to_dense()


def pack(model: Qwen3) -> None:
    """Let a frozen bf16 model on a CPU pack its matrices at its first forward; any other model stays as it is."""
    if not CAN_PACK or model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
