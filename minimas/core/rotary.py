"""Rotary position embeddings (RoPE, Su et al., arXiv 2104.09864): angles and rotation.

A key rotated for position p and rotated again by Δ is the key for position p + Δ, because
R(Δ) R(p) = R(p + Δ). Therefore a cache can be cut, moved and joined without running the model.
This file does not depend on models, caches or attention.
"""

import torch
from torch import Tensor


def angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine for integer `positions` (B, T), each (B, 1, T, d), for `rotate`.

    To move a key, rotate it by the difference of the two positions, which may be negative. Angles
    are computed in float64, because in float32 they are off by 1e-3 at position 10,000. The result
    is rounded once, to float32, unless the model's `dtype` is float64.
    """
    device = positions.device
    positions = for_float64(positions)
    even = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)  # (d/2,)
    rates = theta ** -(even / head_dim).repeat(2)  # (d,), radians per position
    phase = positions[:, None, :, None] * rates  # (B, 1, T, d)
    keep = torch.promote_types(dtype, torch.float32)
    return phase.cos().to(keep).to(device), phase.sin().to(keep).to(device)


def for_float64(x: Tensor) -> Tensor:
    """Return `x`, moved to the CPU if it is on an Apple GPU, which has no float64."""
    return x.cpu() if x.is_mps else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of x (B, H, T, d) by its angle: R(position) x, in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)  # (B, H, T, d)
    return (x * cos + turned * sin).to(x.dtype)
