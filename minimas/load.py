"""A name → a model on its device, tensor by tensor: a folder or hub id in Hugging Face's layout, or a GGUF file.

Every file is checked before the first tensor is read, every tensor goes straight to its final dtype and device, every
tensor is claimed and none is missing: `load` ends with a whole model or an exception. Nothing is ever unpickled, and
no code from a model folder is run. Tokenizer, sampling defaults and teams are read on first access, so that config,
rotary, cache, model and load work alone. Does not know: prompts, agents, the arithmetic of a forward pass.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .core.checkpoint import INDEX, WEIGHTS, Folder, empty_model, fill
from .core.config import DTYPES, Config, read_json, token_ids
from .core.latent import Aligner
from .core.model import Qwen3
from .fast.packed import pack
from .formats.gguf import GGUF
from .teams import Team
from .text.generate import Sampling
from .text.tokenizer import Tokenizer

Files = dict[
    str, dict[str, Any]
]  # a folder's JSON files by name, as a GGUF file holds them in itself
TINY = "weights/tiny"


class LM:
    """A model with what its folder says about using it: `model`, `tokenizer`, `sampling`, `end_ids`, `teams`.

    `tokenizer` is None for a folder without tokenizer.json: the model can still be fed embeddings and token ids.
    """

    def __init__(
        self,
        model: Qwen3,
        folder: Path,
        files: Files | None = None,
        no_tokenizer: str | None = None,
    ) -> None:
        """`folder` is a .gguf file if `files` is what it holds of a folder's; `no_tokenizer` says why it has none."""
        self.model, self.folder, self.files = model, folder, files
        self.no_tokenizer = no_tokenizer or f"{folder}: tokenizer.json is missing, expected one"
        self._aligners: dict[str, Aligner] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Raises ValueError for a broken file, or one with ids that the model has no embedding for."""
        name = "tokenizer.json"
        if not ((self.folder / name).is_file() if self.files is None else name in self.files):
            return None
        tokenizer, most = Tokenizer(self.folder, self.files), self.model.config.vocab_size
        if tokenizer.size > most:
            raise ValueError(
                f"{tokenizer.path}: found {tokenizer.size:,} ids, expected at most {most:,}, vocab_size"
            )
        return tokenizer

    @cached_property
    def sampling(self) -> Sampling:
        """The model's own sampling defaults, from generation_config.json; greedy without one."""
        return Sampling.from_dict(*settings(self.folder, self.files, "generation_config.json"))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends a turn, as any of the folder's files says."""
        raw, path = settings(self.folder, self.files, "generation_config.json")
        ids = token_ids(raw.get("eos_token_id"), f"{path}: eos_token_id")
        return frozenset(ids).union(
            self.model.config.eos_token_ids, self.tokenizer.end_ids if self.tokenizer else ()
        )

    @cached_property
    def teams(self) -> dict[str, Team]:
        """The folder's own teams by name (teams.json), {} without one."""
        raw, path = settings(self.folder, self.files, "teams.json")
        return {
            name: Team.from_dict(raw[name], f"{path}: {name}")
            for name in raw.keys() - {"latent_steps"}
        }

    @cached_property
    def default_steps(self) -> int:
        """How many thoughts an agent thinks if nobody says: teams.json's number, or 40 (paper: best at 40 to 80)."""
        raw, path = settings(self.folder, self.files, "teams.json")
        steps: int = raw.get("latent_steps", 40)
        if type(steps) is not int or steps < 0:
            raise ValueError(
                f"{path}: latent_steps: found {steps!r}, expected a whole number, 0 or more"
            )
        return steps

    def aligner(self, kind: str) -> Aligner:
        """The model's map of one kind, a name of `latent.ALIGNMENTS` or a FILE.safetensors.

        It is computed or read once. Errors as in `Aligner.from_model` and `Aligner.load`.
        """
        if kind not in self._aligners:
            if str(kind).endswith(".safetensors"):
                self._aligners[kind] = Aligner.load(kind, self.model)
            else:
                # Rows that no token has, padding to a round number, would move W_a and its norm.
                rows = self.tokenizer.size if self.tokenizer else None
                self._aligners[kind] = Aligner.from_model(self.model, kind, rows)
        return self._aligners[kind]


def load(
    name: str | Path = TINY,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    compile: bool = False,
) -> LM:
    """Load the model `name`, a folder, a .gguf file or a hub id, onto `device` ("auto": a CUDA GPU if there is one).

    `dtype` "auto" is the checkpoint's own. `quantize` is a format of quantize.FORMATS; None leaves a folder in 16 or 32
    bits, and a GGUF file's Q4_0, Q4_1 and Q8_0 as they are. `compile` makes steps of one position faster, after a
    warm-up. Peak memory is the weights plus the largest tensor. Raises FileNotFoundError, ImportError or ValueError
    naming the file or flag, the field, what was found and what was expected.
    """
    where, kind = _device(device), _dtype(dtype)
    if quantize is not None:
        from .fast.quantize import check

        check(quantize, where, kind)
    if compile:
        from .fast.compiled import check_compiler

        check_compiler()
    path = resolve(name)
    source = open_source(path)
    raw, config_path = settings(path, source.files, "config.json", needed=True)
    config = Config.from_dict(raw, config_path)
    model = empty_model(config, str(name), source, config_path)
    replace = None
    if quantize is not None or not isinstance(source, Folder):
        from .fast.quantize import Replacer

        replace = Replacer(source, where, kind or getattr(torch, config.dtype), quantize)
    fill(model, source, where, kind or getattr(torch, config.dtype), replace)
    if replace is not None:
        replace.finish(model)
    pack(model)
    if compile:
        from .fast.compiled import compile_steps

        compile_steps(model)
    return LM(model.eval(), path, source.files, source.no_tokenizer)


def open_source(path: Path) -> Folder | GGUF:
    """The tensors and small files at `path`, a folder or a .gguf file; nothing large is read yet."""
    if path.is_dir():
        return Folder(path)
    return GGUF(path)


def settings(
    path: Path, files: Files | None, name: str, needed: bool = False
) -> tuple[dict[str, Any], str]:
    """One of a model's JSON files and what to call it in an error; {} for one that is missing and not `needed`."""
    if files is None:
        return read_json(path / name, needed), str(path / name)
    return files.get(name, {}), f"{path}: {name}"


def resolve(name: str | Path, only_config: bool = False) -> Path:
    """The folder or .gguf file of model `name`: a path, the embedded model, the hub's cache, the hub (repo:FILE.gguf).

    `only_config` leaves a folder's weights on the hub.
    """
    path = Path(name).expanduser()
    if str(name) and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if path.is_file():
        raise ValueError(
            f"{name}: found a file, expected a folder with config.json and {WEIGHTS}, .gguf or hub id"
        )
    if str(name) == TINY:  # inside the wheel, or beside the package in a checkout
        here = Path(__file__).parent / TINY
        for home in (here, here.parents[2] / TINY):
            if home.is_dir():
                return home
        raise FileNotFoundError(
            f"{TINY}: not found at {here}; pass a model, such as --model Qwen/Qwen3-0.6B"
        )
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+\.gguf))?", str(name))
    if hub_id is None:
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id such as Qwen/Qwen3-0.6B")
    from .hub import download

    repo, gguf = hub_id[1], hub_id[2]
    if gguf:  # of a file in shards, all of them
        wanted = [re.sub(r"\d{5}-of-(\d{5})", r"*-of-\1", gguf)]
        path = download(repo, wanted, lambda folder: (folder / gguf).is_file(), gguf) / gguf
        if not path.is_file():
            raise FileNotFoundError(f"{name}: found no file {gguf} in the repository, expected one")
        return path
    weights = [] if only_config else ["*.safetensors", INDEX]
    wanted = [
        *weights,
        "config.json",
        "generation_config.json",
        "tokenizer*.json",
        "chat_template.jinja",
        "teams.json",
    ]

    def complete(folder: Path) -> bool:
        return only_config or (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()

    return download(repo, wanted, complete, f"config.json and {WEIGHTS}")


def _device(name: str | torch.device) -> torch.device:
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if gpus else "cpu") if str(name) == "auto" else name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cpu" and not (device.type == "cuda" and (device.index or 0) < gpus):
        raise ValueError(
            f"device (--device): found {str(name)!r}, expected auto, cpu, or cuda ({gpus} devices here)"
        )
    return device


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    text = str(name).removeprefix("torch.").replace("bf16", "bfloat16").replace("fp", "float")
    if text not in ("auto", *DTYPES):
        raise ValueError(
            f"dtype (--dtype): found {name!r}, expected auto or one of {', '.join(DTYPES)}"
        )
    return getattr(torch, text, None)
