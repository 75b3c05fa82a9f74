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


def unpack_tiles(packed: Tensor, K: int) -> Tensor:
    """What `pack4` makes on a CPU with AVX-512, as uint8 (N / 64, K, 64): rows d and d + 32 of a tile share a byte."""
    pairs = packed.view(-1, K, TILE // 2)
    return torch.cat([pairs & 15, pairs >> 4], dim=-1)


@cache
def tiles_are_known() -> bool:
    values = (torch.arange(2 * TILE * GROUP) % 31 % 16).to(torch.uint8).view(-1, GROUP)  # (128, 32)
    return torch.equal(unpack_tiles(pack4(values), GROUP).transpose(1, 2).reshape(-1, GROUP), values)


def pack8(values: Tensor, scale: Tensor) -> Any:
    """Values int8 (N, K) and scale (N,) in the order of the CPU's integer product."""
    zero = torch.zeros(len(values), dtype=torch.int64)
    with warnings.catch_warnings():  # torch means to replace its quantized tensors, but the operator still takes one
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch._make_per_channel_quantized_tensor(values, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)


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
