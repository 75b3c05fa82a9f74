"""The order in which kernels read 4- and 8-bit values, and where matrices are unpacked. Does not know: formats, layers.

N outputs, rows of W   K inputs   G = K / 32 groups of inputs
"""

import threading
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

GROUP = 32
TILE = 64  # rows that the CPU's kernel takes together


def pack4(values: Tensor) -> Tensor:
    """Values uint8 (N, K), N a multiple of 64, in the order of the device's kernel."""
    if values.device.type == "cpu":
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)
        return packed
    pairs = (values[:, ::2] << 4 | values[:, 1::2]).contiguous()  # the even input in the high bits
    tiles = next(t for t in (8, 4, 2) if values.shape[1] % (16 * t) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    return packed


def unpack4(packed: Tensor, scales: Tensor) -> Tensor:
    """W (N, K) in bf16 from what `pack4` makes on a CPU with AVX-512, and scales and zeros (G, N, 2).

    Rows d and d + 32 of a tile share a byte. The result is gone at the next call: it lies in the same memory each time,
    for fresh pages for every matrix would cost three times the arithmetic.
    """
    G, N, _ = scales.shape
    columns, half, byte = scratch.take(G, N)  # bf16 (K, N), bf16 (G, 32, N / 64, 32), uint8 (N / 64, K, 32)
    into = columns.view(G, GROUP, -1, 2, TILE // 2)  # (G, 32, N / 64, 2, 32)
    # Side by side as they are stored, they would be read at half the speed, for every group's 32 inputs anew.
    scale, zero = (t.contiguous() for t in scales.view(G, 1, -1, 2, TILE // 2, 2).unbind(-1))  # (G, 1, N / 64, 2, 32)
    pairs = packed.view(byte.shape)
    for part in range(2):
        torch.bitwise_right_shift(pairs, 4, out=byte) if part else torch.bitwise_and(pairs, 15, out=byte)
        half.copy_(byte.view(-1, G, GROUP, TILE // 2).permute(1, 2, 0, 3)).sub_(8)  # (G, 32, N / 64, 32)
        torch.addcmul(zero[..., part, :], half, scale[..., part, :], out=into[..., part, :])
    return columns.T


@cache
def order_is_known() -> bool:
    """Whether this CPU's kernel takes its values in the order that `unpack4` undoes."""
    values = (torch.arange(2 * TILE * GROUP) % 31 % 16).to(torch.uint8).view(-1, GROUP)  # (128, 32)
    plain = torch.tensor([1, 8], dtype=torch.bfloat16).expand(1, len(values), 2)  # W = values
    return torch.equal(unpack4(pack4(values), plain).to(torch.uint8), values)


def pack8(values: Tensor, scale: Tensor) -> Any:
    """Values int8 (N, K) and scale (N,) in the order of the CPU's integer product."""
    zero = torch.zeros(len(values), dtype=torch.int64)
    with warnings.catch_warnings():  # torch means to replace its quantized tensors, but the operator still takes one
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch._make_per_channel_quantized_tensor(values, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)


@cache
def sums_are_wide() -> bool:
    """Whether this CPU adds products of two 8-bit values in 32 bits, as VNNI does; without it pairs overflow 16."""
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    x = torch.tensor([[-128.0], [127.0]]).expand(2, 64)  # the range as `linear_dynamic` finds it: steps of 1
    found: Tensor = torch.ops.quantized.linear_dynamic(x, pack8(largest, torch.ones(64)), False)
    return torch.equal(found, (x.double() @ largest.double()).float())


class Scratch(threading.local):
    """Where matrices are unpacked, one at a time in each thread; the largest so far stays allocated."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, G: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for W in columns, bf16 (K, N), for half of it, and for its values in bytes (N / 64, K, 32)."""
        K = G * GROUP
        if len(self.memory) < 4 * K * N:
            self.memory = torch.empty(4 * K * N, dtype=torch.uint8)
        columns, half, byte, _ = self.memory[: 4 * K * N].split([2 * K * N, K * N, K * N // 2, K * N // 2])
        half = half.view(torch.bfloat16).view(G, GROUP, -1, TILE // 2)
        return columns.view(torch.bfloat16).view(K, N), half, byte.view(-1, K, TILE // 2)


scratch = Scratch()
