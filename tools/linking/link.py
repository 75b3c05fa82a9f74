"""What is trained: a map from hidden states to embeddings, and vectors that are fed in its place.

    e = rescale((h · scale) W)     W (D, D), or W₀ + A B with A (D, R) and B (R, D); scale fixed

The trained map is a `minimas.Aligner`, for --align FILE. The vectors (k, D) are fed in the first k
steps of every agent, whatever the agent has prefilled. An Aligner cannot hold them, so only this
tool feeds them. As a control, there can be as many vectors as steps (*gist slots*), and no map.

This module does not use losses, rollouts or questions.

    R rows of a turn (or rank)   D hidden   k vectors
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimas import Aligner, Qwen3
from minimas.core import files

Feeder = Callable[[Tensor], Tensor]  # (R, 1, D) -> (R, 1, D)
VECTORS = "vectors"  # the kind of a file with start vectors


class Link(nn.Module):
    """A map that starts as `start`, and k start vectors, all in at least float32."""

    def __init__(
        self,
        model: Qwen3,
        start: Aligner | None,
        rank: int | None = None,
        vectors: int = 0,
        seed: int = 0,
    ) -> None:
        """Make the parameters. `rank` None means all of W, and `start` None means no map.

        Raises ValueError for a wrong rank.
        """
        super().__init__()
        D = model.config.hidden_size
        wide = torch.promote_types(model.dtype, torch.float32)
        like: Any = {"dtype": wide, "device": model.device}
        source = torch.Generator().manual_seed(seed)
        self.start = start
        if start is not None:
            matrix = torch.eye(D, **like) if start.matrix is None else start.matrix.to(**like)
            if rank is None:
                self.matrix = nn.Parameter(matrix.clone())
            else:
                if not 1 <= rank <= D:
                    raise ValueError(f"--rank: found {rank}, expected 1 … {D}, the hidden size")
                self.fixed = matrix
                down = torch.randn(D, rank, generator=source, dtype=torch.float64) / D**0.5
                self.down = nn.Parameter(down.to(**like))
                self.up = nn.Parameter(torch.zeros(rank, D, **like))  # so W starts at W₀
        if vectors:
            rows = model.model.embed_tokens.weight
            drawn = torch.randint(len(rows), (vectors,), generator=source).to(rows.device)
            self.vectors = nn.Parameter(rows[drawn].to(**like, copy=True))  # (k, D)
        self.count = vectors

    def aligner(self, model: Qwen3 | None = None) -> Aligner:
        """Return the current map, through which gradients flow. Only `save` needs `model`."""
        assert self.start is not None, "there is no map"
        rank = "down" in self._parameters
        matrix = self.fixed + self.down @ self.up if rank else self.matrix
        return Aligner(matrix, self.start.norm, self.start.scale, self.start.shift, model)

    def feeder(self) -> "LinkFeeder":
        """Return what `latent_mas` takes as `align`, with W multiplied out once."""
        aligner = None if self.start is None else self.aligner()
        return LinkFeeder(aligner, self.vectors if self.count else None)

    @torch.no_grad()
    def save(self, path: Path, model: Qwen3) -> None:
        """Write the map for --align, and start vectors next to it, or to `path` without a map."""
        if self.start is not None:
            self.aligner(model).save(path)
        if self.count:
            name = vectors_path(path) if self.start is not None else path
            files.write(name, VECTORS, {"vectors": self.vectors}, files.identity(model))


class LinkFeeder:
    """Vectors in the first steps of each agent's turn, and the map in the steps after them."""

    def __init__(self, aligner: Aligner | None, vectors: Tensor | None) -> None:
        self.aligner, self.vectors = aligner, vectors

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map (R, 1, D) as in the steps after the vectors."""
        assert self.aligner is not None, "there are fewer vectors than steps"
        return self.aligner(hidden)

    def with_generators(self, generators: Any) -> Feeder:
        """Return the map of one turn, which counts its steps. A turn asks for it when it starts."""
        steps = itertools.count()

        def feed(hidden: Tensor) -> Tensor:
            step = next(steps)
            if self.vectors is None or step >= len(self.vectors):
                return self(hidden)
            return self.vectors[step].to(hidden.dtype).expand_as(hidden)

        return feed


def vectors_path(path: Path) -> Path:
    """Return the path of the start vectors that belong to the map in `path`."""
    return path.with_suffix(f".{VECTORS}{path.suffix}")
