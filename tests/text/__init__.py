"""Tokenizers and models with a tokenizer, shared by the tests that use text.

The tokenizer is that of weights/tiny. The weights are random, so that nothing depends on its
training.
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
    """Return the tokenizer of a folder as the tokenizers library opens it."""
    return Backend.from_file(str(folder / "tokenizer.json"))


@functools.cache
def text_model(family: str = "qwen3", dtype: torch.dtype = torch.float64) -> Qwen3:
    """Return a random model with the vocabulary of weights/tiny. Tests must not change it."""
    return tiny_model(family, dtype=dtype, vocab_size=tiny_tokenizer().size)


def text_folder(path: Path, teams: Any = None, **tokenizer_config: Any) -> Path:
    """Write a folder with weights/tiny's tokenizer.json and the given tokenizer settings.

    Settings that are not given are those of weights/tiny. `teams` is the content of a teams.json.
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
    """Write a random model with this context length that never ends its turn."""
    model = tiny_model(vocab_size=tiny_tokenizer().size, max_position_embeddings=context)
    model.lm_head.weight.data[:5] = 0  # the control tokens
    return write_folder(path, model, tokenizer=TINY)


def hostile_texts(max_parts: int = 8) -> st.SearchStrategy[str]:
    """Draw texts with control tokens: whole, in pieces, nested, adjacent and at the borders."""
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
    """Draw texts that neither contain a control token nor complete one at their borders."""
    return st.text(max_size=max_size).filter(lambda text: not set("<|>") & set(text))


def load_text_lm(folder: Path = TINY, family: str = "qwen3") -> LM:
    """Return the random float64 model with the tokenizer, teams and settings of a folder."""
    return LM(text_model(family), folder)
