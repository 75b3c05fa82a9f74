"""What can be fed in the place of the paper's thought: the relatives of W_a that answer "is it the latent, or only more
slots?", and the candidates for what helps. All are callables (B, 1, D) -> (B, 1, D), as `think` takes them.

    python tools/feeders.py --model FOLDER --kind fitted --out fitted.safetensors

This writes a file for --align, and so does `--kind mean`.

The library knows the five kinds of `minimas.Aligner`, and files of one. Here are more:

    gain:P       rescale((h ÷ gᴾ) W_a), g the final norm's gain: 0 is the paper's map, 1 is prenorm (see `latent`)
    mean         (h − μ_h) s + μ_e: mean and spread of hidden states on plain text moved to those of the embeddings
    fitted       rescale(h W): the ridge map from the state at a token of plain text to the next token's embedding
    soft:T:K     Σ p_v e_v, p = softmax(logits(h) / T) over the K likeliest tokens (default: T 1, K 0: all of them)
    gumbel:T     the same with p = softmax((logits(h) + Gumbel noise) / T), drawn from the question's own generator
    token        the embedding of the likeliest token: thinking in words that nobody reads
    pause:TEXT   the embedding of one token, the first of TEXT (default: a full stop): slots without any thought

`mean` and `fitted` are measured on `plain_text.txt`, or on a text of one's own. That file is the
beginning of `pydoc_data.topics` of Python 3.11.7, as `help()` shows it. It is under the licence in
`plain_text.LICENSE.txt`: Copyright © 2001-2023 Python Software Foundation; All Rights Reserved.
Does not know: agents, prompts, how a rollout works.

    B rows   D hidden   V vocabulary   N tokens of text
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # minimas from the checkout

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from minimas import LM, Aligner, Qwen3, Tokenizer, alignment_matrix, load  # noqa: E402
from minimas.core.latent import ALIGNMENTS  # noqa: E402

Feeder = Callable[[Tensor], Tensor]
FILE = ".safetensors"  # how the name of a saved Aligner ends
FORMS = (
    *ALIGNMENTS, "gain:P", "mean", "fitted", "soft[:T[:K]]", "gumbel[:T]", "token", "pause[:TEXT]",
    f"FILE{FILE}",
)  # fmt: skip
DEFAULTS = {
    "gain": (),
    "mean": (),
    "fitted": (),
    "soft": ("1", "0"),
    "gumbel": ("1",),
    "token": (),
    "pause": (".",),
}
TOKENS, WINDOW, ROWS = 10_000, 256, 8  # of plain text; read in windows, so many at once
PLAIN_TEXT = ROOT / "tools" / "plain_text.txt"
SHA256 = "e2dde11bd3b1edecc32ffe66c513c520efb6dd430ae927090e0309ab7f08bfd4"  # of it
SHRINK = 1e-3  # the fitted map's λ, as a share of the mean square of a state's entry, summed over the text


def parse(kind: str) -> tuple[str, tuple[str, ...]]:
    """A kind's name and its values, defaults filled in; raises ValueError with the list of kinds."""
    if kind in ALIGNMENTS or str(kind).endswith(FILE):
        return kind, ()
    name, *given = str(kind).split(":", 1 if str(kind).startswith("pause") else -1)
    defaults = DEFAULTS.get(name, ())
    values = (*given, *defaults[len(given) :])
    good = name in DEFAULTS and len(values) == len(defaults) and all(values)
    if name == "gain":
        values = tuple(given)
        good = len(given) == 1 and re.fullmatch(r"\d*\.?\d+", given[0]) is not None
    elif name in ("soft", "gumbel"):
        number = re.fullmatch(r"\d*\.?\d+", values[0])
        good = (
            good
            and number is not None
            and float(values[0]) > 0
            and all(v.isdecimal() for v in values[1:])
        )
    if not good:
        raise ValueError(f"align (--align): found {kind!r}, expected one of {', '.join(FORMS)}")
    return name, values


class Feeders:
    """A model's feeders by kind, each made once; mean and fitted are measured on `text`."""

    def __init__(self, lm: LM, text: str | None = None) -> None:
        self.lm, self.text = lm, text
        self._made: dict[str, Feeder] = {}

    def __call__(self, kind: str) -> Feeder:
        """The feeder of one kind. Errors as in `feeder`, and for a file as in `Aligner.load`."""
        if parse(kind)[0] not in DEFAULTS:
            return self.lm.aligner(kind)
        if kind not in self._made:
            self._made[kind] = feeder(self.lm.model, kind, self.lm.tokenizer, self.text)
        return self._made[kind]


def feeder(
    model: Qwen3, kind: str, tokenizer: Tokenizer | None = None, text: str | None = None
) -> Feeder:
    """The map of one kind of `DEFAULTS`, (B, 1, D) -> (B, 1, D), in the dtype that it gets.

    Only rows of the embedding that the tokenizer can produce count.
    `text` is the plain text that mean and fitted are measured on (None: `plain_text()`). Raises ValueError for a kind
    that is not among `FORMS`, or one that needs a tokenizer where there is none.
    """
    name, values = parse(kind)
    rows = tokenizer.size if tokenizer is not None else None
    if name == "gain":
        return divide_gain(model, float(values[0]), rows)
    if name in ("soft", "gumbel"):
        return Mixture(
            model,
            float(values[0]),
            int(values[1]) if name == "soft" else 0,
            rows,
            noisy=name == "gumbel",
        )
    if name == "token":
        return lambda hidden: model.embed(model.logits(hidden)[..., :rows].argmax(-1))
    if tokenizer is None:
        raise ValueError(
            f"align (--align): found {kind!r} with a model without tokenizer.json, which it needs"
        )
    if name == "pause":
        ids = tokenizer.encode(values[0])
        return lambda hidden: model.embed(torch.tensor(ids[:1], device=hidden.device)).expand_as(
            hidden
        )
    ids = tokenizer.encode(plain_text() if text is None else text)[:TOKENS]
    return (match_means if name == "mean" else fit)(model, ids, rows)


def divide_gain(model: Qwen3, power: float, rows: int | None = None) -> Aligner:
    """rescale((h ÷ gᴾ) W_a): ridge for P = 0, prenorm for 1; where P is not whole, gᴾ is |g|ᴾ with the sign of g."""
    prenorm = Aligner.from_model(model, "prenorm", rows)
    inverse: Any = prenorm.scale  # 1 ÷ g, and 0 where g is 0: nothing to divide
    scale = inverse**power if power.is_integer() else inverse.sign() * inverse.abs() ** power
    return Aligner(prenorm.matrix, prenorm.norm, scale, model=model)


def match_means(model: Qwen3, ids: Sequence[int], rows: int | None = None) -> Aligner:
    """(h − μ_h) s + μ_e, where s makes the mean square distance from the mean the same on both sides."""
    states, _ = observe(model, ids)
    w_in = model.model.embed_tokens.weight[:rows].to(states.dtype)
    from_mean, to_mean = states.mean(0), w_in.mean(0)  # (D,)
    spread = (
        (w_in - to_mean).square().sum(-1).mean() / (states - from_mean).square().sum(-1).mean()
    ).sqrt()
    scale = spread.expand_as(from_mean)  # (D,)
    return Aligner(scale=scale, shift=to_mean - from_mean * spread, model=model)


def fit(model: Qwen3, ids: Sequence[int], rows: int | None = None) -> Aligner:
    """argmin_W Σ_t ‖h_t W − e_(t+1)‖² + λ‖W‖² over a text's tokens, its results rescaled to the embeddings' mean norm.

    λ is `SHRINK` of the sum of the states' squares over D: without it a text of few tokens is learned by heart.
    """
    states, following = observe(model, ids)
    ridge = SHRINK * states.double().square().sum().item() / states.shape[1]
    matrix = alignment_matrix(states, model.embed(following).to(states.dtype), ridge)
    norm = Aligner.from_model(model, "identity", rows).norm
    return Aligner(matrix.to(states.dtype), norm, model=model)


def observe(model: Qwen3, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A text's hidden states (N, D), in at least float32, and the token after each (N,), window by window.

    The first state of a window, which has seen one token only, is left out. Raises ValueError for too short a text.
    """
    width = min(WINDOW, len(ids) - 1, model.config.max_position_embeddings)
    if width < 2:
        raise ValueError(
            f"text (--fit-text): found {len(ids)} tokens, expected some hundred at least"
        )
    starts = range(0, len(ids) - width, width)
    windows = torch.tensor(
        [ids[start : start + width + 1] for start in starts], device=model.device
    )  # (n, width + 1)
    states = torch.cat([model(model.embed(part[:, :-1])) for part in windows.split(ROWS)])[
        :, 1:
    ]  # (n, width − 1, D)
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide.flatten(0, 1), windows[:, 2:].flatten()


def plain_text() -> str:
    """The English text of `PLAIN_TEXT`; raises ValueError naming the file if another text is in it.

    Python's own copy differs from version to version, and with it `mean` and `fitted` would.
    """
    # As text: a checkout on Windows may end lines with \r\n.
    text = PLAIN_TEXT.read_text(encoding="utf-8")
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{PLAIN_TEXT}: found sha256 {found}, expected {SHA256}")
    return text


class Mixture:
    """Σ p_v e_v with p = softmax(scores / T) over the `most` highest scores (0: all), the scores noisy or not."""

    def __init__(
        self, model: Qwen3, temperature: float, most: int, rows: int | None, noisy: bool
    ) -> None:
        self.model, self.temperature, self.most, self.rows, self.noisy = (
            model,
            temperature,
            most,
            rows,
            noisy,
        )

    def drawing(self, generators: Sequence[torch.Generator]) -> Feeder:
        """The map with one source of noise for each row, so that a thought does not depend on the batch."""

        def drawn(hidden: Tensor) -> Tensor:
            return self(hidden, generators)

        return drawn if self.noisy else self

    def __call__(
        self, hidden: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Map (B, 1, D) to (B, 1, D); noise without `generators` comes from PyTorch's global one."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scores = self.model.logits(hidden)[..., : self.rows].to(wide)  # (B, 1, V)
        if self.noisy:
            sources = [None] * len(scores) if generators is None else generators
            draws = [
                torch.rand(scores.shape[1:], dtype=torch.float64, generator=source)
                for source in sources
            ]
            noise = -(-torch.stack(draws).clamp_min(1e-300).log()).log()  # (B, 1, V), Gumbel(0, 1)
            scores = scores + noise.to(scores)
        if self.most and self.most < scores.shape[-1]:
            scores, tokens = scores.topk(self.most)
            shares = (scores / self.temperature).softmax(-1)[..., None]  # (B, 1, K, 1)
            mixed: Tensor = (shares * self.model.embed(tokens).to(wide)).sum(-2)
            return mixed.to(hidden.dtype)
        w_in: Tensor = self.model.model.embed_tokens.weight[: self.rows]
        # The table stays in its own dtype: a float32 copy of 151,936 rows would take longer than the step.
        return (scores / self.temperature).softmax(-1).to(w_in.dtype) @ w_in


def main(argv: Sequence[str] | None = None) -> int:
    """Write a map that is measured on plain text as a file for --align.

    Returns 0 done or 1 failed; raises SystemExit(2) for a wrong command line.
    """
    top = argparse.ArgumentParser(description="Write a map as a file for --align.")
    add = top.add_argument
    add("--model", "-m", default="weights/tiny", help="folder, hub id or .gguf file")
    add("--kind", choices=("fitted", "mean"), required=True)
    add("--text", type=Path, metavar="FILE", help=f"plain text (default: tools/{PLAIN_TEXT.name})")
    add("--out", type=Path, required=True, metavar=f"FILE{FILE}")
    args = top.parse_args(argv)
    if args.out.suffix != FILE:  # --align would take its name for a kind
        top.error(f"argument --out: found {str(args.out)!r}, expected FILE{FILE}")
    try:
        text = args.text.read_text(encoding="utf-8") if args.text else plain_text()
        lm = load(args.model)
        made: Any = feeder(lm.model, args.kind, lm.tokenizer, text)
        made.save(args.out)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"feeders: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
