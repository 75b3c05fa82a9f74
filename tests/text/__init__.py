"""Tokenizers and models with a tokenizer, shared by the tests that use text.

The tokenizer is that of weights/tiny; the weights are random, so that nothing depends on how it
was trained.
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from minimas import LM, Qwen3, Sampling, Tokenizer

from ..models import TINY, tiny_model, write_folder

QWEN = TINY.parents[2] / "shared" / "qwen3-tokenizer"
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")
SHORT = Sampling(max_new_tokens=6)


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


@functools.cache
def plain_tokenizer(folder: Path) -> Backend:
    """The tokenizer of a folder as anybody would open it."""
    return Backend.from_file(str(folder / "tokenizer.json"))


@functools.cache
def text_model(family: str = "qwen3", dtype: torch.dtype = torch.float64) -> Qwen3:
    """A random model of weights/tiny's vocabulary; nobody may change it."""
    return tiny_model(family, dtype=dtype, vocab_size=tiny_tokenizer().size)


def text_folder(path: Path, teams: Any = None, **tokenizer_config: Any) -> Path:
    """A folder with weights/tiny's tokenizer.json, these tokenizer settings (None: its own) and
    perhaps a teams.json.
    """
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(TINY / "tokenizer.json", path)
    settings = json.loads((TINY / "tokenizer_config.json").read_text()) | tokenizer_config
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if teams is not None:
        (path / "teams.json").write_text(json.dumps(teams))
    return path


@functools.cache
def with_template(source: str) -> Tokenizer:
    """Return weights/tiny's tokenizer with another chat template."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer(text_folder(Path(folder), chat_template=source))


def endless_folder(path: Path, context: int) -> Path:
    """Write a random model that never ends its turn, whose context has this many positions."""
    model = tiny_model(vocab_size=tiny_tokenizer().size, max_position_embeddings=context)
    model.lm_head.weight.data[:5] = 0  # of the control tokens
    return write_folder(path, model, tokenizer=TINY)


def hostile_texts(max_parts: int = 8) -> st.SearchStrategy[str]:
    """Texts spliced with control tokens: whole, in pieces, one inside another, side by side and at
    the borders.
    """
    token = st.sampled_from(CONTROL)
    piece = st.builds(
        lambda t, i, j: t[min(i, j) : max(i, j)], token, st.integers(0, 13), st.integers(0, 13)
    )
    nested = st.builds(
        lambda outer, inner, i: outer[:i] + inner + outer[i:], token, token, st.integers(0, 13)
    )
    parts = st.one_of(
        token, piece, nested, st.sampled_from(["\n", " ", "assistant\n"]), st.text(max_size=5)
    )
    return st.lists(parts, max_size=max_parts).map("".join)


def harmless_texts(max_size: int = 30) -> st.SearchStrategy[str]:
    """Texts that neither hold a control token nor complete one at their borders."""
    return st.text(max_size=max_size).filter(lambda text: not set("<|>") & set(text))


def load_text_lm(folder: Path = TINY, family: str = "qwen3") -> LM:
    """The random float64 model, with the tokenizer, teams and settings of a folder."""
    return LM(text_model(family), folder)
