"""The alignment W_a, which maps hidden states to latent thoughts; the loop is in rollout.py.

After its prompt, an agent thinks: instead of decoding tokens, the loop turns its last hidden state
h (last layer, after the final norm) into the next input embedding e (LatentMAS, arXiv 2511.20639,
section 3.1):

    e = rescale(h W_a)
    W_a = argmin_W ‖W_out W − W_in‖² + λ‖W‖² = (W_outᵀ W_out + λI)⁻¹ W_outᵀ W_in

W_in (V, D) is the token embedding and W_out (V, D) the LM head. `rescale` sets the norm of a vector
to the mean norm of the embeddings. With tied embeddings, W_out = W_in, so W_a is the identity up to
λ, and only the rescaling is left. If W_in belongs to another model with the same tokens, W_a maps
from one model to the other.

This file does not depend on tokens, prompts, agents or sampling.

    D hidden   V vocabulary
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import files
from .errors import ParameterError
from .model import Qwen3
from .rotary import for_float64

LAMBDA = 1e-5  # λ, the paper's value
ALIGNMENTS = ("ridge", "identity", "prenorm", "random", "none")
EXPECTED = f"expected one of {', '.join(ALIGNMENTS)} or FILE.safetensors"  # for --align


def alignment_matrix(
    w_out: Tensor, w_in: Tensor, ridge: float = LAMBDA, chunk: int = 16384
) -> Tensor:
    """Return the ridge map W_a (D, D'), float64, for w_out (V, D) and w_in (V, D') (equation 3).

    D' may differ from D if w_in belongs to another model with the same tokenizer. `ridge` is λ.
    Setting the gradient of ‖W_out W − W_in‖² + λ‖W‖² to zero gives linear equations. Their matrix
    is symmetric and positive definite, so they are solved with a Cholesky factorization:

        2 W_outᵀ (W_out W − W_in) + 2 λ W = 0   ⇔   (W_outᵀ W_out + λI) W = W_outᵀ W_in

    The sums over V are computed from `chunk` rows at a time, so that no whole matrix is converted.
    The sums are float32, or float64 if the weights are or if V ≤ D. For weights on an Apple GPU,
    the map is computed on the CPU and stays there. Raises ValueError for unequal V or weights that
    are not finite.
    """
    if w_out.ndim != 2 or w_out.shape[:-1] != w_in.shape[:-1]:
        raise ValueError(
            f"w_out, w_in: found {tuple(w_out.shape)} and {tuple(w_in.shape)}, "
            "expected (V, D) and (V, D') with one V"
        )
    V, D = w_out.shape
    # If V ≤ D, the matrix may be invertible only because of λ, which float32 would round away.
    wide = torch.promote_types(w_out.dtype, torch.float32) if V > D else torch.float64
    device = for_float64(w_out[:0]).device
    gram = torch.zeros(D, D, dtype=wide, device=device)  # W_outᵀ W_out
    cross = torch.zeros(D, w_in.shape[1], dtype=wide, device=device)  # W_outᵀ W_in
    for rows_out, rows_in in zip(w_out.split(chunk), w_in.split(chunk), strict=True):
        rows_out = for_float64(rows_out).to(wide)
        gram += rows_out.T @ rows_out
        cross += rows_out.T @ for_float64(rows_in).to(rows_out)
    gram = gram.double()
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    matrix = torch.cholesky_solve(cross.double(), factor)
    if failed or not matrix.isfinite().all():
        raise ValueError(
            "w_out, w_in: found NaN, infinity or numerical singularity, expected finite embeddings"
        )
    return matrix


class Aligner:
    """The map from a hidden state to an input embedding, (…, D) -> (…, D).

        e = rescale((h · scale) W) + shift

    `h` is multiplied by `scale` (D,), then by `matrix` W, which is (D, D), or (D, D') if the
    embedding is that of another model. `norm` is the norm that vectors are rescaled to. `shift`
    (D,) is added last; `from_model` never sets it, but a map that was made elsewhere may have it. A
    step whose parameter is None is left out. `model` is the model whose hidden states are mapped.
    Only `save` needs it.
    """

    def __init__(
        self,
        matrix: Tensor | None = None,
        norm: float | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        model: Qwen3 | None = None,
    ) -> None:
        self.matrix = matrix
        self.norm = norm
        self.scale = scale
        self.shift = shift
        # Not the model itself: a map must not keep the model's weights in memory.
        self.made_for = None if model is None else files.identity(model)

    @classmethod
    def from_model(
        cls,
        model: Qwen3,
        kind: str = "ridge",
        rows: int | None = None,
        receiver: Qwen3 | None = None,
    ) -> "Aligner":
        """Compute a map of `kind` from the unquantized embeddings of a model.

        "ridge" is the paper's W_a. "identity" only rescales h. "prenorm" is (h ÷ g) W_a, where g
        is the gain of the final norm, so it maps the state before the gain. "random" is a control
        with W_a's singular values and random directions. All of these rescale to the mean norm of
        the embeddings. "none" feeds h back unchanged. Only the first `rows` embeddings are used
        (None: all), because those after the tokenizer's last id belong to no token. `receiver` is
        the model that W_in belongs to (None: the same model). Raises ValueError for an unknown
        kind, or rows out of range.
        """
        if kind not in ALIGNMENTS:
            raise ParameterError("align", f"found {kind!r}, {EXPECTED}")
        made = cls(model=model)
        w_in = (receiver or model).model.embed_tokens.weight
        head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        if rows is not None and not 1 <= rows <= len(w_in):
            raise ValueError(f"rows: found {rows}, expected 1 … {len(w_in)} embedding rows")
        if kind == "none":
            return made
        w_in = w_in[:rows]
        wide = torch.promote_types(model.dtype, torch.float32)
        # In chunks, so that the embedding is not converted as a whole.
        norms = [part.to(wide).norm(dim=-1) for part in w_in.split(16384)]
        made.norm = float(for_float64(torch.cat(norms)).double().mean())
        if kind == "identity":
            return made
        matrix = alignment_matrix(head.weight[:rows], w_in)
        if kind == "random":  # orthogonal bases, the same in every call
            source = torch.Generator().manual_seed(0)
            left, right = (
                torch.linalg.qr(
                    torch.randn(n, min(matrix.shape), generator=source, dtype=torch.float64)
                ).Q.to(matrix.device)
                for n in matrix.shape
            )
            matrix = left * torch.linalg.svdvals(matrix) @ right.T  # (D, D')
        made.matrix = matrix.to(wide).to(model.device)
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
        """Read a map that `save` has written for `model`, onto its device, in at least float32.

        Raises FileNotFoundError, or ValueError if the file is damaged, has another format or
        belongs to another model.
        """
        tensors = files.read(path, "aligner", model)
        D = model.config.hidden_size
        shapes = {"matrix": (D, D), "scale": (D,), "shift": (D,), "norm": ()}
        parts = dict[str, Any]()
        for name, part in tensors.items():
            parts[name] = files.floats(
                path, tensors, name, shapes, model, torch.promote_types(model.dtype, torch.float32)
            )
            if name == "norm":
                parts[name] = float(part)
        return cls(**parts, model=model)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map hidden states (…, D) to embeddings (…, D), in at least float32, then cast back."""
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        x = x if self.scale is None else x * self.scale
        x = x if self.matrix is None else x @ self.matrix.to(x)
        if self.norm is not None:
            x = self.norm * F.normalize(x, dim=-1)
        x = x if self.shift is None else x + self.shift
        return x.to(hidden.dtype)
