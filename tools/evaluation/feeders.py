"""Feeders: maps that replace the paper's alignment W_a in a latent step.

A feeder maps a hidden state h to the next input embedding, (B, 1, D) -> (B, 1, D), and can be given
to `think`. Feeders show whether an effect comes from the latent state or only from more slots, and
may be better maps. The library has the five kinds of `minimas.Aligner` and files of saved ones.
This module adds:

    gain:P       rescale((h ÷ gᴾ) W_a), where g is the gain of the final norm; P = 0 is the paper's
                 map, and P = 1 is prenorm
    mean         (h − μ_h) s + μ_e, which gives hidden states the mean and spread of embeddings
    fitted       rescale(h W), where W is the ridge regression from the state at a token to the
                 embedding of the next token
    soft:T:K     Σ p_v e_v, p = softmax(logits(h) / T) over the K likeliest tokens
                 (default: T = 1, K = 0 for all tokens)
    gumbel:T     as soft, with Gumbel noise added to the logits, from the generator of the question
    token        the embedding of the likeliest token, as if the agent generated text
    pause:TEXT   the embedding of the first token of TEXT (default: a full stop), independent of h

`mean` and `fitted` are fitted on `plain_text.txt` or on another text. That file is the beginning of
`pydoc_data.topics` of Python 3.11.7, as `help()` shows it. It is under the licence in
`plain_text.LICENSE.txt`: Copyright © 2001-2023 Python Software Foundation; All Rights Reserved.
This module does not use agents or prompts, and does not run the latent loop.

    B rows   D hidden   V vocabulary   N tokens of text
"""

import argparse
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimas import LM, Aligner, Qwen3, Tokenizer, alignment_matrix, load
from minimas.core.errors import ParameterError
from minimas.core.latent import ALIGNMENTS
from tools.shared.arguments import FAILURES, Parser, print_error

Feeder = Callable[[Tensor], Tensor]
SUFFIX = ".safetensors"  # of a file with a saved Aligner
FORMS = (
    *ALIGNMENTS, "gain:P", "mean", "fitted", "soft[:T[:K]]", "gumbel[:T]", "token", "pause[:TEXT]",
    f"FILE{SUFFIX}",
)  # fmt: skip
DEFAULTS = {
    "gain": (), "mean": (), "fitted": (), "soft": ("1", "0"), "gumbel": ("1",), "token": (),
    "pause": (".",),
}  # fmt: skip
TOKENS, WINDOW = 10_000, 256  # tokens of plain text that are used, and tokens per window
WINDOWS = 8  # windows that are computed together
PLAIN_TEXT = Path(__file__).resolve().parents[1] / "plain_text.txt"
SHA256 = "e2dde11bd3b1edecc32ffe66c513c520efb6dd430ae927090e0309ab7f08bfd4"  # of PLAIN_TEXT
RIDGE = 1e-3  # λ of `fitted` divided by the mean square of a state's entry, summed over the text


def parse(kind: str) -> tuple[str, tuple[str, ...]]:
    """Return the name of a kind and its values, with defaults for missing values.

    Raises ValueError with the list of kinds if `kind` is not one of them.
    """
    if kind in ALIGNMENTS or str(kind).endswith(SUFFIX):
        return kind, ()
    name, *given = str(kind).split(":", 1 if str(kind).startswith("pause") else -1)
    defaults = DEFAULTS.get(name, ())
    values = (*given, *defaults[len(given) :])
    if name == "gain":
        good = len(given) == 1 and is_number(given[0])
    else:
        good = name in DEFAULTS and len(values) == len(defaults) and all(values)
    if good and name in ("soft", "gumbel"):
        temperature, *top_k = values
        good = is_number(temperature) and float(temperature) > 0
        good = good and all(value.isdecimal() for value in top_k)
    if not good:
        raise ParameterError("align", f"found {kind!r}, expected one of {', '.join(FORMS)}")
    return name, values


def is_number(text: str) -> bool:
    """Return True if a text is a number without a sign or an exponent."""
    return re.fullmatch(r"\d*\.?\d+", text) is not None


def kind_of_map(text: str) -> str:
    """Return a value of --align if it is valid. Raises ArgumentTypeError otherwise."""
    try:
        parse(text)
    except ParameterError as error:
        raise argparse.ArgumentTypeError(error.problem) from error
    return text


class Feeders:
    """The feeders of a model, made once per kind. `mean` and `fitted` are fitted on `text`."""

    def __init__(self, lm: LM, text: str | None = None) -> None:
        self.lm, self.text = lm, text
        self._made: dict[Any, Feeder] = {}

    def __call__(self, kind: str) -> Feeder:
        """Return the feeder of one kind. Raises the errors of `feeder` and `Aligner.load`."""
        if parse(kind)[0] not in DEFAULTS:
            return self.lm.aligner(kind)
        key = kind, self.text
        if key not in self._made:
            self._made[key] = feeder(self.lm.model, kind, self.lm.tokenizer, self.text)
        return self._made[key]


def feeder(
    model: Qwen3, kind: str, tokenizer: Tokenizer | None = None, text: str | None = None
) -> Feeder:
    """Return the feeder of one kind of `DEFAULTS`, (B, 1, D) -> (B, 1, D), in the input's dtype.

    Only embedding rows of tokens that the tokenizer can produce are used. `mean` and `fitted` are
    fitted on `text` (None: `plain_text()`). Raises ValueError for an unknown kind, and for a kind
    that needs a tokenizer if there is none.
    """
    name, values = parse(kind)
    rows = tokenizer.size if tokenizer is not None else None
    if name == "gain":
        return divide_gain(model, float(values[0]), rows)
    if name == "soft":
        return Mixture(model, float(values[0]), int(values[1]), rows)
    if name == "gumbel":
        return Mixture(model, float(values[0]), 0, rows, noisy=True)
    if name == "token":
        return lambda hidden: model.embed(model.logits(hidden)[..., :rows].argmax(-1))
    if tokenizer is None:
        problem = f"found {kind!r}, which needs a model with tokenizer.json"
        raise ParameterError("align", problem)
    if name == "pause":
        ids = torch.tensor(tokenizer.encode(values[0])[:1], device=model.device)
        return lambda hidden: model.embed(ids).expand_as(hidden)
    measured = tokenizer.encode(plain_text() if text is None else text)[:TOKENS]
    return match_means(model, measured, rows) if name == "mean" else fit(model, measured, rows)


def divide_gain(model: Qwen3, power: float, rows: int | None = None) -> Aligner:
    """Return the map rescale((h ÷ gᴾ) W_a), which is ridge for P = 0 and prenorm for P = 1.

    If P is not a whole number, gᴾ is |g|ᴾ with the sign of g.
    """
    prenorm = Aligner.from_model(model, "prenorm", rows)
    inverse: Any = prenorm.scale  # 1 ÷ g, and 0 where g is 0
    scale = inverse**power if power.is_integer() else inverse.sign() * inverse.abs() ** power
    return Aligner(prenorm.matrix, prenorm.norm, scale, model=model)


def match_means(model: Qwen3, ids: Sequence[int], rows: int | None = None) -> Aligner:
    """Return the map (h − μ_h) s + μ_e.

    The scalar s makes the mean square distance of states from μ_h equal to that of embeddings from
    μ_e.
    """
    states, _ = observe(model, ids)
    w_in = model.model.embed_tokens.weight[:rows].to(states.dtype)
    from_mean, to_mean = states.mean(0), w_in.mean(0)  # (D,)
    from_square = (states - from_mean).square().sum(-1).mean()
    to_square = (w_in - to_mean).square().sum(-1).mean()
    spread = (to_square / from_square).sqrt()
    scale = spread.expand_as(from_mean)  # (D,)
    return Aligner(scale=scale, shift=to_mean - from_mean * spread, model=model)


def fit(model: Qwen3, ids: Sequence[int], rows: int | None = None) -> Aligner:
    """Return the map rescale(h W) with W = argmin Σ_t ‖h_t W − e_(t+1)‖² + λ‖W‖² over a text.

    The result is rescaled to the mean norm of the embeddings. λ is `RIDGE` times the sum of all
    squared entries of the states, divided by D. Without it the map would memorize a short text.
    """
    states, following = observe(model, ids)
    ridge = RIDGE * states.double().square().sum().item() / states.shape[1]
    matrix = alignment_matrix(states, model.embed(following).to(states.dtype), ridge)
    norm = Aligner.from_model(model, "identity", rows).norm
    return Aligner(matrix.to(states.dtype), norm, model=model)


def observe(model: Qwen3, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the hidden states of a text (N, D), at least float32, and the token after each (N,).

    The text is cut into windows. The first state of each window is left out, because it depends on
    one token only. Raises ValueError if the text is too short.
    """
    width = min(WINDOW, len(ids) - 1, model.config.max_position_embeddings)
    if width < 2:
        expected = "expected at least a few hundred"
        raise ValueError(f"text (--fit-text): found {len(ids)} tokens, {expected}")
    windows = [ids[start : start + width + 1] for start in range(0, len(ids) - width, width)]
    fed = torch.tensor(windows, device=model.device)  # (windows, width + 1)
    parts = [model(model.embed(part[:, :-1]))[:, 1:] for part in fed.split(WINDOWS)]
    states = torch.cat(parts).flatten(0, 1)  # (N, D)
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide, fed[:, 2:].flatten()  # (N,)


def plain_text() -> str:
    """Return the English text in `PLAIN_TEXT`. Raises ValueError if the file was changed.

    The text is stored here because Python's own copy differs between versions, which would change
    `mean` and `fitted`.
    """
    # The file is read as text, because lines may end with \r\n in a checkout on Windows.
    text = PLAIN_TEXT.read_text(encoding="utf-8")
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{PLAIN_TEXT}: found sha256 {found}, expected {SHA256}")
    return text


class Mixture:
    """The map Σ p_v e_v with p = softmax(scores / T) over the `top_k` highest scores (0: all).

    The scores are logits, plus Gumbel noise if `noisy`. Only the first `rows` tokens are used.
    """

    def __init__(
        self, model: Qwen3, temperature: float, top_k: int, rows: int | None, noisy: bool = False
    ) -> None:
        self.model, self.temperature, self.top_k = model, temperature, top_k
        self.rows, self.noisy = rows, noisy

    def with_generators(self, generators: Sequence[torch.Generator]) -> Feeder:
        """Return the map with one noise generator per row, so that the batch has no effect."""
        if not self.noisy:
            return self
        return lambda hidden: self(hidden, generators)

    def __call__(
        self, hidden: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Map (B, 1, D) to (B, 1, D). Without `generators` the global generator makes the noise."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scores = self.model.logits(hidden)[..., : self.rows].to(dtype)  # (B, 1, V)
        if self.noisy:
            scores = scores + gumbel_noise(scores, generators)
        if self.top_k and self.top_k < scores.shape[-1]:
            scores, tokens = scores.topk(self.top_k)
            shares = (scores / self.temperature).softmax(-1)[..., None]  # (B, 1, K, 1)
            mixed: Tensor = (shares * self.model.embed(tokens).to(dtype)).sum(-2)
            return mixed.to(hidden.dtype)
        w_in: Tensor = self.model.model.embed_tokens.weight[: self.rows]
        # The embeddings keep their dtype: a float32 copy of 151,936 rows would take longer than the
        # step itself.
        return (scores / self.temperature).softmax(-1).to(w_in.dtype) @ w_in


def gumbel_noise(scores: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Return Gumbel(0, 1) noise for scores (B, 1, V). Each row has its own generator."""
    sources = [None] * len(scores) if generators is None else generators
    shape = scores.shape[1:]
    draws = [torch.rand(shape, dtype=torch.float64, generator=source) for source in sources]
    noise = -(-torch.stack(draws).clamp_min(1e-300).log()).log()  # (B, 1, V)
    return noise.to(scores)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of tools/feeders.py. Returns 0 if done, 1 if failed.

    Raises SystemExit(2) for a wrong command line.
    """
    about = "Fit a map from hidden states to embeddings on plain text, as a file for --align."
    top = Parser("feeders", description=about)
    add = top.add_argument
    add("--model", "-m", default="weights/tiny", help="folder, hub id or .gguf file")
    add("--kind", choices=("fitted", "mean"), required=True)
    add("--text", type=Path, metavar="FILE", help=f"plain text (default: tools/{PLAIN_TEXT.name})")
    add("--out", type=Path, required=True, metavar=f"FILE{SUFFIX}")
    args = top.parse_args(argv)
    if args.out.suffix != SUFFIX:  # --align would take the name for a kind of map
        top.error(f"argument --out: found {str(args.out)!r}, expected FILE{SUFFIX}")
    try:
        text = args.text.read_text(encoding="utf-8") if args.text else plain_text()
        lm = load(args.model)
        made: Any = feeder(lm.model, args.kind, lm.tokenizer, text)
        made.save(args.out)
    except FAILURES as error:
        print_error("feeders", error)
        return 1
    return 0
