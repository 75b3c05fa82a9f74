"""Latent thoughts: the alignment W_a from hidden states to input embeddings, and the latent loop.

An agent who hands over does not decode after its prompt. Its last hidden state h (last layer, after
the final norm) becomes the next input embedding e, `steps` times (LatentMAS, arXiv 2511.20639,
section 3.1):

    e = rescale(h W_a)
    W_a = argmin_W ‖W_out W − W_in‖² + λ‖W‖² = (W_outᵀ W_out + λI)⁻¹ W_outᵀ W_in

W_in (V, D) is the token embedding and W_out (V, D) the LM head. With tied embeddings W_out = W_in,
so W_a is the identity up to λ, and only the rescaling is left.

This file does not know tokens, prompts, agents or sampling.

    B rows   D hidden   V vocabulary
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .cache import KVCache
from .errors import ParameterError
from .model import Qwen3, finite_on_cpu
from .rotary import for_float64

LAMBDA = 1e-5  # the paper's
ALIGNMENTS = ("ridge", "identity", "prenorm", "random", "none")
EXPECTED = f"expected one of {', '.join(ALIGNMENTS)} or FILE.safetensors"  # of --align


def alignment_matrix(
    w_out: Tensor, w_in: Tensor, ridge: float = LAMBDA, chunk: int = 16384
) -> Tensor:
    """Return the ridge map W_a (D, D), float64, for w_out and w_in (V, D) (paper, equation 3).

    Setting the gradient of ‖W_out W − W_in‖² + λ‖W‖² to zero gives equations whose matrix is
    symmetric and positive definite, hence Cholesky:

        2 W_outᵀ (W_out W − W_in) + 2 λ W = 0   ⇔   (W_outᵀ W_out + λI) W = W_outᵀ W_in

    The sums over V are made in chunks of rows, without a whole copy: in float32, or in float64 for
    float64 weights and for V ≤ D. On an Apple GPU's weights everything is done on the CPU, where
    the map then is. Raises ValueError for unequal shapes or weights that are not
    finite.
    """
    if w_out.ndim != 2 or w_out.shape != w_in.shape:
        raise ValueError(
            f"w_out, w_in: found {tuple(w_out.shape)} and {tuple(w_in.shape)}, "
            "expected two equal (V, D)"
        )
    V, D = w_out.shape
    # With V < D only λ makes the matrix invertible, and float32 loses λ.
    wide = torch.promote_types(w_out.dtype, torch.float32) if V > D else torch.float64
    # W_outᵀ W_out and W_outᵀ W_in.
    gram, cross = torch.zeros(2, D, D, dtype=wide, device=for_float64(w_out[:0]).device)
    for out, into in zip(w_out.split(chunk), w_in.split(chunk), strict=True):
        out = for_float64(out).to(wide)
        gram += out.T @ out
        cross += out.T @ for_float64(into).to(wide)
    gram, cross = gram.double(), cross.double()
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    matrix = torch.cholesky_solve(cross, factor)
    if failed or not matrix.isfinite().all():
        raise ValueError(
            "w_out, w_in: found NaN, infinity or numerical singularity, expected finite embeddings"
        )
    return matrix


class Aligner:
    """The map from a hidden state to an input embedding, (…, D) -> (…, D).

        e = rescale((h · scale) W) + shift

    `matrix` is W (D, D), `scale` (D,), `norm` the length of rescaled vectors, `shift` (D,). None
    leaves out its step. `model` is the model that the map is for: `save` needs it.
    """

    def __init__(
        self,
        matrix: Tensor | None = None,
        norm: float | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        model: Qwen3 | None = None,
    ) -> None:
        self.matrix, self.norm, self.scale, self.shift = matrix, norm, scale, shift
        # Not the model itself: a map that is kept must not keep the weights in memory.
        self.made_for = None if model is None else files.identity(model)

    @classmethod
    def from_model(cls, model: Qwen3, kind: str = "ridge", rows: int | None = None) -> "Aligner":
        """Compute one kind of map from the unquantized embeddings of a model.

        "ridge" is the paper's W_a. "identity" only rescales h. "prenorm" is (h ÷ g) W_a, the
        state before the gain g of the final norm. "random" has W_a's singular values and random
        directions: a control. All are rescaled to the mean norm of the embeddings. "none" feeds h
        back unchanged. `rows` is the number of embedding rows to use (None: all); the rows after
        the tokenizer's last id are padding. Raises ValueError for another kind, or rows out of
        range.
        """
        if kind not in ALIGNMENTS:
            raise ParameterError("align", f"found {kind!r}, {EXPECTED}")
        made = cls(model=model)
        w_in = model.model.embed_tokens.weight
        w_out = w_in if model.config.tie_word_embeddings else model.lm_head.weight
        if rows is not None and not 1 <= rows <= len(w_in):
            raise ValueError(f"rows: found {rows}, expected 1 … {len(w_in)}, of the embedding")
        if kind == "none":
            return made
        w_in, w_out = w_in[:rows], w_out[:rows]
        wide = torch.promote_types(w_in.dtype, torch.float32)
        norms = [part.to(wide).norm(dim=-1) for part in w_in.split(16384)]  # without a whole copy
        made.norm = for_float64(torch.cat(norms)).double().mean().item()
        if kind == "identity":
            return made
        matrix = alignment_matrix(w_out, w_in)
        if kind == "random":  # between two random orthogonal bases, the same at every call
            seed = torch.Generator().manual_seed(0)
            bases = torch.randn(2, *matrix.shape, generator=seed, dtype=torch.float64)  # (2, D, D)
            left, right = torch.linalg.qr(bases.to(matrix.device)).Q
            matrix = left * torch.linalg.svdvals(matrix) @ right.T
        made.matrix = matrix.to(wide).to(w_in.device)
        if kind == "prenorm":
            gain = model.model.norm.weight.to(wide)
            made.scale = torch.where(gain == 0, 0, 1 / gain)  # where the gain is 0, h is 0 too
        return made

    def save(self, path: str | Path) -> None:
        """Write the map to a file, with the fingerprint of its model: see `files`.

        Raises ValueError if the map was made without `model`, OSError if the file cannot be
        written.
        """
        norm = None if self.norm is None else torch.tensor(self.norm, dtype=torch.float64)
        parts = {"matrix": self.matrix, "scale": self.scale, "shift": self.shift, "norm": norm}
        files.write(path, "aligner", parts, self.made_for)

    @classmethod
    def load(cls, path: str | Path, model: Qwen3) -> "Aligner":
        """Read a map that `save` wrote for `model`, onto its device and in at least float32.

        Raises FileNotFoundError, or ValueError if the file is damaged, of another format or of
        another model.
        """
        tensors = files.read(path, "aligner", model)
        D = model.config.hidden_size
        shapes = {"matrix": (D, D), "scale": (D,), "shift": (D,), "norm": ()}
        wide = torch.promote_types(model.dtype, torch.float32)
        parts: dict[str, Any] = {}
        for name, part in tensors.items():
            parts[name] = files.floats(path, part, name, shapes, model, wide)
            if name == "norm":
                parts[name] = part.item()  # in float64, as it was
        return cls(**parts, model=model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map hidden states (…, D) to embeddings (…, D), in at least float32, then cast back."""
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        x = x if self.scale is None else x * self.scale
        x = x if self.matrix is None else x @ self.matrix
        if self.norm is not None:
            x = self.norm * torch.nn.functional.normalize(x, dim=-1)
        x = x if self.shift is None else x + self.shift
        return x.to(hidden.dtype)


def think(
    model: Qwen3, align: Callable[[Tensor], Tensor], hidden: Tensor, cache: KVCache, steps: int
) -> tuple[Tensor, Tensor]:
    """Think `steps` latent thoughts from `hidden` (B, 1, D), the last valid state of each row.

    Each step maps the last hidden state to an embedding by `align`, any callable from (B, 1, D) to
    (B, 1, D) in the same dtype, and feeds it: `cache` grows by one slot. Returns the embeddings,
    (B, steps, D), and the last hidden state, (B, 1, D), which has not been fed. With 0 steps
    nothing changes. Raises ValueError for negative steps, a map to another shape or dtype, or, on
    a CPU, a state that is not finite.
    """
    if steps < 0:
        raise ParameterError("latent_steps", f"found {steps}, expected 0 or more")
    thoughts = [hidden[:, :0]]  # (B, 0, D)
    finite_on_cpu(hidden, model.name)
    for _ in range(steps):
        embedding = align(hidden)
        found, expected = (
            f"{getattr(x, 'dtype', type(x))} of shape {tuple(getattr(x, 'shape', ()))}"
            for x in (embedding, hidden)
        )
        if found != expected:
            raise ParameterError("align", f"found a map to {found}, expected {expected}")
        thoughts.append(finite_on_cpu(embedding, "align", "the map has returned it"))
        hidden = finite_on_cpu(model(embedding, cache), model.name)
    return torch.cat(thoughts, 1), hidden
