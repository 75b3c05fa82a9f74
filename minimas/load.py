"""Load a model by name: a folder or hub id in Hugging Face's layout, or a GGUF file.

Every file is checked before the first tensor is read, and every tensor goes straight to its final
dtype and device. `load` returns a complete model or raises an exception. Nothing is ever unpickled,
and no code from a model folder is run. Tokenizer, sampling defaults and teams are read on first
access. This file does not depend on prompts, agents or the forward pass.
"""

import logging
import re
import sys
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from tqdm import tqdm

from .core.checkpoint import WEIGHTS, Folder, empty_model, fill, read_index
from .core.config import DTYPES, read_json, token_ids
from .core.errors import ParameterError
from .core.latent import Aligner
from .core.model import Qwen3
from .fast.compiled import check_compiler, compile_steps
from .fast.packed import pack
from .fast.parallel import Part, add_shares, device_mesh
from .fast.quantize import check, complete, has_kernels, replacement
from .formats.gguf import GGUF
from .formats.gguf_file import read_header
from .hub import download
from .teams import Team
from .text.generate import Sampling
from .text.tokenizer import Tokenizer

TINY = "weights/tiny"
log = logging.getLogger("minimas")


class LM:
    """A model with the tokenizer and the settings in its folder.

    The attributes are `model`, `tokenizer`, `sampling`, `end_ids`, `teams` and `default_steps`.
    `tokenizer` is None for a folder without tokenizer.json, and `no_tokenizer` says why. Such a
    model can still be given embeddings and token ids.
    """

    def __init__(
        self,
        model: Qwen3,
        folder: Path,
        files: dict[str, Any] | None = None,
        no_tokenizer: str | None = None,
    ) -> None:
        """`folder` may be a .gguf file. Then `files` are the JSON files that it holds, by name."""
        self.model = model
        self.folder = folder
        self.files = files or {}
        self.no_tokenizer = no_tokenizer or f"{folder}: tokenizer.json is missing, expected one"
        self._aligners: dict[Any, Aligner] = {}

    def __repr__(self) -> str:
        layer = type(self.model.get_submodule("model.layers.0.mlp.up_proj"))
        return f"LM({self.model.name}: {layer.__name__}, {self.model.dtype}, {self.model.device})"

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, or None if there is none.

        Raises ValueError if its file is broken or has ids without an embedding in the model.
        """
        if not self.files.get("tokenizer.json", (self.folder / "tokenizer.json").exists()):
            return None
        tokenizer = Tokenizer(self.folder, self.files)
        most = self.model.config.vocab_size
        if tokenizer.size > most:
            raise ValueError(
                f"{tokenizer.path}: found {tokenizer.size:,} ids, "
                f"expected at most vocab_size, {most:,}"
            )
        return tokenizer

    @cached_property
    def sampling(self) -> Sampling:
        """Return the model's sampling defaults from generation_config.json; greedy without it."""
        return Sampling.from_dict(*self._settings("generation_config.json"))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Return every token id that ends a turn according to any of the folder's files."""
        raw, path = self._settings("generation_config.json")
        ids = token_ids(raw.get("eos_token_id"), f"{path}: eos_token_id")
        ids += self.model.config.eos_token_ids
        return frozenset(ids).union(self.tokenizer.end_ids if self.tokenizer else ())

    @cached_property
    def teams(self) -> dict[str, Team]:
        """Return the folder's own teams by name from teams.json; {} without it."""
        raw, path = self._settings("teams.json")
        return {
            name: Team.from_dict(team, f"{path}: {name}")
            for name, team in raw.items()
            if name != "latent_steps"
        }

    @cached_property
    def default_steps(self) -> int:
        """Return the number of latent steps in teams.json, or 40 (paper: best at 40 to 80)."""
        raw, path = self._settings("teams.json")
        steps: int = raw.get("latent_steps", 40)
        if type(steps) is not int or steps < 0:
            raise ValueError(f"{path}: latent_steps: found {steps!r}, expected an integer >= 0")
        return steps

    def _settings(self, name: str) -> tuple[dict[str, Any], str]:
        """Return one of the model's JSON files, {} if it is missing, and its path."""
        path = self.folder / name
        return self.files.get(name) or read_json(path, needed=False), str(path)

    def aligner(self, kind: str, receiver: "LM | None" = None) -> Aligner:
        """Return the model's map of one kind, a name of `latent.ALIGNMENTS` or a FILE.safetensors.

        With a `receiver`, it maps to the embeddings of that model, which has the same tokenizer.
        It is computed or read once, and again only if its file or the tokenizer has changed. Raises
        the errors of `Aligner.from_model` and `Aligner.load`.
        """
        # Embedding rows without a token (padding to a round number) would change W_a and its norm.
        rows = self.tokenizer.size if self.tokenizer else None
        file = Path(str(kind))
        key = file, rows, file.is_file() and file.stat().st_mtime_ns, receiver and ref(receiver)
        if key not in self._aligners:
            if file.suffix == ".safetensors":
                self._aligners[key] = Aligner.load(kind, self.model)
            else:
                other = receiver.model if receiver else None
                self._aligners[key] = Aligner.from_model(self.model, kind, rows, other)
        return self._aligners[key]


def text_tokenizer(lm: Any) -> Tokenizer:
    """Return the tokenizer of an `LM`.

    Raises ValueError for another object, for a model without a tokenizer, or for wrong end tokens.
    """
    if not isinstance(lm, LM):
        raise ParameterError("lm", f"found {lm!r:.80}, expected what `load` returns")
    if lm.tokenizer is None:
        raise ValueError(f"{lm.no_tokenizer}: questions and memories need a tokenizer")
    _ = lm.end_ids  # raises for a wrong file
    return lm.tokenizer


def load(
    name: str | Path = TINY,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    compile: bool = False,
    quiet: bool = False,
    parallel: Any = False,
) -> LM:
    """Load the model `name`: a folder, a .gguf file or a hub id.

    `device="auto"` is a CUDA GPU if there is one, else the CPU, never an Apple GPU ("mps").
    `dtype="auto"` is the checkpoint's own, or if the device cannot compute it, another one with a
    warning.
    `quantize` is a format of quantize.FORMATS. None keeps the weights of a folder in 16 or 32 bits,
    and the low-bit types of a GGUF file in 4 or 8. `compile` makes steps of one position faster,
    after a warm-up. On a terminal, a progress bar is shown on stderr, unless `quiet`. With
    `parallel=True` the model is divided among all ranks of torchrun, and with a DeviceMesh among
    its own ranks (see fast/parallel.py). Peak memory is the weights plus the largest tensor. Raises
    FileNotFoundError, ImportError or ValueError naming the file or flag, the field, what was found
    and what was expected.
    """
    target = _device(device)
    asked = _dtype(dtype)
    _check(target, asked, quantize, compile, parallel)
    mesh = device_mesh(target, parallel)
    if quantize is not None:  # after the mesh has set each rank's GPU, because this starts CUDA
        check(quantize, target, asked)
    path = resolve(name)
    source: Any = Folder(path) if path.is_dir() else GGUF(path)
    model = empty_model(str(name), source)
    if mesh:
        source = Part(source, mesh)
        with torch.device("meta"):
            model = Qwen3(source.config, str(name))
    used = asked or _default_dtype(source.config.dtype, target)
    replace = partial(replacement, source, target, used, quantize)
    # None: hidden unless stderr is a terminal.
    bar = partial(
        tqdm, desc=f"loading {name}", leave=False, disable=quiet or not sys.stderr or None
    )
    fill(model, source, target, used, replace, bar)
    complete(model, quantize)
    pack(model)
    if compile:
        compile_steps(model)
    if mesh:
        add_shares(model, mesh)
    return LM(model.eval(), path, source.files, source.no_tokenizer)


def resolve(name: str | Path, only_config: bool = False) -> Path:
    """Return the folder or .gguf file of the model `name`.

    `name` is a path, the bundled model, or a hub id: repo, repo:FOLDER/FILE.gguf or repo:Q8_0. A
    hub id is looked up in the hub's cache first. `only_config` leaves out the weights.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{name}: found a file, expected a model folder, a .gguf file or a hub id")
    if str(name) and path.exists():
        return path
    if str(name) == TINY:
        for place in Path(__file__).parents[:2]:  # in a wheel, and in a checkout
            if (place / TINY).is_dir():
                return place / TINY
        raise FileNotFoundError(f"{TINY}: not found in {place}; pass --model Qwen/Qwen3-0.6B")
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::(\w[\w./-]*))?", str(name))
    if hub_id is None:
        raise FileNotFoundError(
            f"{name}: no such folder, and not a hub id such as Qwen/Qwen3-0.6B, "
            "ORG/REPO:FOLDER/FILE.gguf or ORG/REPO:Q8_0"
        )
    repo, gguf = hub_id.groups()
    needed = ["config.json"]
    optional = """generation_config.json tokenizer*.json special_tokens_map.json
        chat_template.jinja teams.json""".split()
    if gguf:
        needed = [f"*[-._]{kind}[-.]*gguf" for kind in sorted({gguf, gguf.lower(), gguf.upper()})]
        optional = []
        if gguf.endswith(".gguf"):
            needed = [re.sub(r"-\d{5}-of-", "-*-of-", gguf)]
    elif not only_config:
        needed.append(f"{WEIGHTS}*")
        optional.append("*.safetensors")

    def find(folder: Path) -> Path:
        if gguf:
            found = (path for pattern in needed for path in folder.rglob(pattern))
            first = min(found, default=folder / gguf)
            read_header(first)  # raises FileNotFoundError if it or another shard is missing
            return first
        (folder / "config.json").stat()
        if not only_config:
            read_index(folder)
        return folder

    return download(repo, needed, optional, find)


def _device(name: str | torch.device) -> torch.device:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    text = str(name)
    if text == "auto":
        text = "cuda" if gpus else "cpu"
    known = ["cuda"] * bool(gpus) + ["mps"] * torch.backends.mps.is_available() + gpus
    if not re.fullmatch(r"cpu(:\d+)?", text) and text not in known:
        expected = f"auto, cpu, or cuda ({len(gpus)} devices here), or mps on an Apple GPU"
        raise ParameterError("device", f"found {text!r}, expected {expected}")
    return torch.device(text)


def _check(
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: str | None,
    compile: bool,
    parallel: Any,
) -> None:
    """Raise ValueError for arguments that do not work together, before any file is read."""
    mps = device.type == "mps"
    if compile and (mps or parallel):
        raise ParameterError("compile", "found with --device mps or --parallel, expected neither")
    if mps and (quantize or parallel or dtype == torch.float64):
        raise ParameterError(
            "device", "found mps with --quantize, --parallel or float64, expected none of them"
        )
    if mps:
        log.warning("--device mps: the developers have no Apple GPU; nothing was tested on one")
    if compile:
        check_compiler(device.type)


def _default_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return a checkpoint's dtype, or another dtype for a device that handles it badly."""
    instead = {} if has_kernels(device) else {"bfloat16": "float16", "float64": "float32"}
    used = instead.get(name, name)
    if used != name:
        log.warning("--dtype auto: %s has no fast %s: using %s", device, name, used)
    return getattr(torch, used)  # type: ignore[no-any-return]


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    text = str(name).removeprefix("torch.").replace("bf16", "bfloat16").replace("fp", "float")
    if text not in ("auto", *DTYPES):
        raise ParameterError(
            "dtype", f"found {name!r}, expected auto or one of {', '.join(DTYPES)}"
        )
    return getattr(torch, text, None)
