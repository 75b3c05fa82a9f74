"""Positions are rotations: R(Δ) R(p) = R(p + Δ). All operations on a KV cache depend on this."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minimas.core.rotary import angles, rotate

positions = st.integers(0, 40_000)
seeds = st.integers(0, 99)
heads = st.sampled_from((2, 6, 64))
bases = st.sampled_from((1e4, 1e6))


def keys(
    rows: int, slots: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(
        rows, 2, slots, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def at(x: Tensor, position: int, theta: float) -> Tensor:
    """Return x with every slot rotated to one position."""
    return rotate(x, *angles(torch.full((1, 1), position), x.shape[-1], theta, x.dtype))


def move(x: Tensor, delta: Tensor, theta: float) -> Tensor:
    """Return x (B, K, S, d) moved by delta (B,) positions."""
    return rotate(x, *angles(delta[:, None], x.shape[-1], theta, x.dtype))


@given(positions, heads, bases, seeds)
def test_a_rotation_is_a_complex_multiplication(
    position: int, d: int, theta: float, seed: int
) -> None:
    """Pairs are (i, i + d/2) as in Hugging Face's files.

    They are not (2i, 2i + 1) as in the paper and in GGUF's llama.
    """
    x = keys(1, 3, d, seed)
    frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    rotated = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * position * frequency)
    torch.testing.assert_close(
        at(x, position, theta), torch.cat([rotated.real, rotated.imag], -1), rtol=0, atol=1e-10
    )


@given(st.lists(st.tuples(positions, positions), min_size=1, max_size=3), heads, bases, seeds)
def test_moving_a_key_equals_rotating_it_to_the_new_position(
    moves: list[tuple[int, int]], d: int, theta: float, seed: int
) -> None:
    """Each row moves by its own Δ, forwards or backwards."""
    x = keys(len(moves), 3, d, seed)
    old = torch.cat([at(row, p, theta) for row, (p, _) in zip(x.split(1), moves, strict=True)])
    new = torch.cat([at(row, q, theta) for row, (_, q) in zip(x.split(1), moves, strict=True)])
    delta = torch.tensor([q - p for p, q in moves])
    torch.testing.assert_close(move(old, delta, theta), new, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        move(move(old, delta, theta), -delta, theta), old, rtol=0, atol=1e-10
    )


@given(positions, positions, st.integers(-40_000, 40_000), bases, seeds)
def test_scores_depend_on_the_distance_only(
    p: int, q: int, shift: int, theta: float, seed: int
) -> None:
    """Shifting every position therefore changes nothing.

    A negative control must shift only the new tokens.
    """
    x, y = keys(2, 1, 8, seed).split(1)
    scores = (at(x, p, theta) * at(y, q, theta)).sum(-1)
    shifted = (at(x, p + shift, theta) * at(y, q + shift, theta)).sum(-1)
    torch.testing.assert_close(scores, shifted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_angles_are_rounded_once(dtype: torch.dtype) -> None:
    """In float32, angles are off by 1e-3 at position 10,000.

    A bf16 table of positions cannot even represent 257.
    """
    places = torch.tensor([[0, 1, 257, 10_001, 40_000]])
    frequency = 1e4 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    exact = (places.double()[0, :, None] * frequency).repeat(1, 2)[None, None]
    for found, expected in zip(
        angles(places, 128, 1e4, dtype), (exact.cos(), exact.sin()), strict=True
    ):
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(
            found.double(), expected, rtol=0, atol=1e-11 if dtype == torch.float64 else 6e-8
        )
    narrow = (places.float()[0, :, None] * frequency.float()).repeat(1, 2)[None, None].cos()
    assert float((narrow - exact.cos()).abs().max()) > 1e-4, (
        "the negative control: this is what float32 gives"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rotation_keeps_the_dtype(dtype: torch.dtype) -> None:
    """If the angles promoted keys to float32, a bf16 cache would take twice the memory."""
    assert move(keys(1, 2, 4, dtype=dtype), torch.tensor([3]), 1e4).dtype == dtype
