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
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
        from .tokenizer import Tokenizer

        if not (self.folder / "tokenizer.json").is_file():
            return None
        tokenizer = Tokenizer(self.folder)
        if tokenizer.size > self.model.config.vocab_size:
            raise ValueError(
                f"{self.folder / 'tokenizer.json'}: found ids up to {tokenizer.size - 1}, expected fewer than "
                f"vocab_size, {self.model.config.vocab_size}, of config.json"
            )
        return tokenizer

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        raw = read_json(path) if path.is_file() else {}
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: found {type(raw).__name__}, expected a JSON object")
        return raw

    @cached_property
    def sampling(self) -> "Sampling":
        """The model's own sampling defaults, from generation_config.json; greedy without one."""
        from .generate import Sampling

        return Sampling.from_dict(self._generation_config, str(self.folder / "generation_config.json"))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends a turn, as any of the folder's files says."""
        where = f"{self.folder / 'generation_config.json'}: eos_token_id"
        ids = set(token_ids(self._generation_config.get("eos_token_id"), where))
        ids.update(self.model.config.eos_token_ids)
        if self.tokenizer is not None:
            ids.update(self.tokenizer.end_ids)
        return frozenset(ids)

    @cached_property
    def _teams(self) -> "tuple[dict[str, Team], int | None]":
        from .teams import read_teams

        path = self.folder / "teams.json"
        return read_teams(path) if path.is_file() else ({}, None)

    @property
    def teams(self) -> "dict[str, Team]":
        """The folder's own teams by name (teams.json), {} without one."""
        return self._teams[0]

    @property
    def default_steps(self) -> int:
        """How many thoughts an agent thinks if nobody says: the folder's number, or 40 (paper: best at 40 … 80)."""
        return 40 if self._teams[1] is None else self._teams[1]

    def aligner(self, kind: str) -> "Aligner":
        """The model's alignment of one kind, over the rows that the tokenizer can produce; computed once."""
        from .latent import Aligner

        if kind not in self._aligners:
            # A GPU's matrix is padded to a round vocabulary; rows that no token has would move W_a and its norm.
            rows = self.tokenizer.size if self.tokenizer is not None else None
            self._aligners[kind] = Aligner.from_model(self.model, kind, rows)
        return self._aligners[kind]


def load(name: str | Path = TINY, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> LM:
    """Load the model `name`, a local folder or a hub id, onto `device` ("auto": a CUDA GPU if there is one).

    `dtype` "auto" is the checkpoint's own. Peak memory is the weights plus the largest tensor. On a CPU a bf16 model
    packs its matrices at the first forward, see `pack`. Raises FileNotFoundError, ValueError or OSError naming the
    file, the field, what was found and what was expected.
    """
    where, kind = _device(device), _dtype(dtype)
    folder = resolve(name)
    config = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    kind = kind or getattr(torch, config.dtype)
    files = _tensor_files(folder)
    shapes = _headers(folder, files)
    last = f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"
    if last not in shapes:  # before a model of a billion layers is built to find out
        raise ValueError(f"{folder}: tensor {last} is missing (num_hidden_layers is {config.num_hidden_layers})")
    with torch.device("meta"):
        model = Qwen3(config, name=str(name))
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    claimed = _claim(folder, shapes, wanted, config.tie_word_embeddings)
    for key in claimed:
        owner, _, leaf = key.rpartition(".")
        tensor = _read(files[key], key).to(device=where, dtype=kind, copy=True)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings and "lm_head.weight" in shapes:
        head = _read(files["lm_head.weight"], "lm_head.weight").to(device=where, dtype=kind)
        if not torch.equal(head, model.model.embed_tokens.weight):
            raise ValueError(
                f"{folder / 'config.json'}: tie_word_embeddings: found true, but lm_head.weight in "
                f"{files['lm_head.weight'].name} differs from model.embed_tokens.weight"
            )
    pack(model)
    return LM(model.eval(), folder)


# -- where the files are -----------------------------------------------------------------------------------------------


def resolve(name: str | Path, only_config: bool = False) -> Path:
    """The folder of model `name`: a local path first, then the embedded default, then the hub's cache, then the hub.

    `only_config` fetches no weights from the hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{name}: found a file, expected a folder with config.json and {WEIGHTS}, or a hub id")
    if str(name) == TINY:  # inside the wheel, or beside the package in a checkout
        here = Path(__file__).parent
        for home in (here / TINY, here.parent / TINY):
            if home.is_dir():
                return home
        raise FileNotFoundError(
            f"{TINY}: the embedded model is not here ({here / TINY}); pass a folder or a hub id, such as "
            "--model Qwen/Qwen3-0.6B"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id such as Qwen/Qwen3-0.6B")
    return _from_hub(str(name), only_config)


def _from_hub(repo: str, only_config: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

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
    except GatedRepoError as error:
        raise FileNotFoundError(f"{repo}: gated: accept its terms on the hub, then run hf auth login") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{repo}: no such folder here, and no such repository on the hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{repo}: no such folder here, config.json and {WEIGHTS} not in the hub's cache {constants.HF_HUB_CACHE}, "
            f"and the hub cannot be reached; when online: hf download {repo}"
        ) from error


# -- what the files hold -----------------------------------------------------------------------------------------------


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Every tensor's name -> the safetensors file that holds it, from one file or an index with shards."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        others = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        )
        found = f"found {', '.join(others[:4])}" if others else "found no weights"
        raise FileNotFoundError(f"{folder}: {found}, expected {WEIGHTS} or {INDEX} (pickled weights are never loaded)")
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: found {type(weight_map).__name__}, expected tensor names -> file names")
    files: dict[str, Path] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map: found {shard!r}, expected a .safetensors file of this folder")
        for key in _names(folder / shard):
            if weight_map.get(key) != shard:
                raise ValueError(f"{folder / shard}: tensor {key}: the index has it in {weight_map.get(key)!r}")
            files[key] = folder / shard
    for key, shard in weight_map.items():
        if key not in files:
            raise ValueError(f"{folder / shard}: tensor {key} is missing (the index has it here)")
    return files


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable safetensors file, truncated or of another format ({error})"
        ) from error


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _headers(folder: Path, files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape; raises ValueError for one that is not floating point."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in dict.fromkeys(files.values()):
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(key)
                if part.get_dtype() not in STORED:
                    raise ValueError(f"{path}: tensor {key}: found {part.get_dtype()}, expected {', '.join(STORED)}")
                shapes[key] = tuple(part.get_shape())
    return shapes


def _claim(
    folder: Path, shapes: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], tied: bool
) -> list[str]:
    """The tensors to read, in the file's order; raises ValueError when one is missing, misshapen or nobody's."""
    for key, shape in wanted.items():
        if key not in shapes:
            raise ValueError(f"{folder}: tensor {key} is missing, expected shape {shape}")
        if shapes[key] != shape:
            raise ValueError(f"{folder}: tensor {key}: found shape {shapes[key]}, expected {shape} by config.json")
    for key in shapes:
        # Old Llama checkpoints carry the rotary frequencies, and Qwen3-0.6B a second copy of its tied embedding.
        spare = key.endswith(".rotary_emb.inv_freq") or (tied and key == "lm_head.weight")
        if key not in wanted and not spare:
            raise ValueError(f"{folder}: tensor {key} belongs to nothing in a model of this config.json")
    return [key for key in shapes if key in wanted]


def _read(path: Path, key: str) -> Tensor:
    # Opened anew for every tensor: the mapping is dropped with it, else the whole file counts as resident twice.
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def _device(name: str | torch.device) -> torch.device:
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device (--device): found {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device (--device): found {str(name)!r}, expected cpu or cuda (others are not tested)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device (--device): found {str(name)!r}, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    text = str(name).removeprefix("torch.")
    text = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(text, text)
    if text == "auto":
        return None
    if text not in DTYPES:
        raise ValueError(f"dtype (--dtype): found {name!r}, expected auto or one of {', '.join(DTYPES)}")
    return getattr(torch, text)  # type: ignore[no-any-return]


# -- bf16 on a CPU -----------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer whose frozen bf16 weight is packed for the CPU's matrix units at its first use.

    Packing is the reordering that the compiler's freezing does: bit-equal results, and eight rows for the price of
    one, where `F.linear` reads memory at half speed. The packed weight replaces the plain one, so there are never two;
    `.weight`, `state_dict()` and `.to()` bring the plain one back.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed: Tensor | None = None
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            if self.weight.dtype != torch.bfloat16 or self.weight.device.type != "cpu":  # moved by .to()
                return nn.functional.linear(x, self.weight, self.bias)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, None)
            del self.weight
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.packed is not None:
            return self.packed.to_dense()
        return super().__getattr__(name)

    def _unpack(self) -> None:
        packed, self.packed = self.packed, None
        if packed is not None:
            self.weight = nn.Parameter(packed.to_dense(), requires_grad=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._unpack()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
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
