"""The order in which kernels read 4- and 8-bit values, and where matrices are unpacked. Does not know: formats, layers.

N outputs, rows of W   K inputs   G = K / 32 groups of inputs   L rows whose values are half a byte each of L bytes
"""

import threading
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

GROUP = 32
TILE = 64  # rows that every CPU's kernel takes together


class Order(NamedTuple):
    """How rows of W share bytes: in tiles of `tile` rows, whose two halves lie one after the other or alternate.

    `few` is up to how many rows of x the kernel that reads this order beats unpacking, on two cores.
    """

    tile: int
    alternate: bool
    few: int


# With AVX-512; with AVX2; other x86; ARM and Windows' builds, whose `few` was not measured.
ORDERS = (
    Order(64, False, 144),
    Order(32, False, 144),
    Order(32, True, 2),
    Order(16, True, 2),
    Order(64, True, 2),
)


def pack4(values: Tensor) -> Tensor:
    """Values uint8 (N, K), N a multiple of 64, in the order of the device's kernel."""
    if values.device.type == "cpu":
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)
        return packed
    pairs = (values[:, ::2] << 4 | values[:, 1::2]).contiguous()  # the even input in the high bits
    tiles = next(t for t in (8, 4, 2) if values.shape[1] % (16 * t) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    return packed


def unpack4(packed: Tensor, scales: Tensor, order: Order) -> Tensor:
    """W (N, K) in bf16 from what `pack4` makes on a CPU of that `order`, and scales and zeros (G, N, 2).

    The result is gone at the next call: it lies in the same memory each time, for fresh pages for every matrix would
    cost three times the arithmetic.
    """
    G, N, _ = scales.shape
    L = order.tile // 2
    columns, half, byte = scratch.take(
        G, N, L
    )  # bf16 (K, N), bf16 (G, 32, N / 2L, L), uint8 (N / 2L, K, L)
    shape, part_of = ((L, 2), -1) if order.alternate else ((2, L), -2)
    into = columns.view(G, GROUP, -1, *shape)  # (G, 32, N / 2L, 2, L), or L, 2
    # Side by side as they are stored, they would be read at half the speed, for every group's 32 inputs anew.
    scale, zero = (
        t.contiguous() for t in scales.view(G, 1, -1, *shape, 2).unbind(-1)
    )  # (G, 1, N / 2L, 2, L), or L, 2
    pairs = packed.view(byte.shape)
    for part in range(2):
        torch.bitwise_right_shift(pairs, 4, out=byte) if part else torch.bitwise_and(
            pairs, 15, out=byte
        )
        half.copy_(byte.view(-1, G, GROUP, L).permute(1, 2, 0, 3)).sub_(8)  # (G, 32, N / 2L, L)
        of_zero, of_scale, of_into = (t.select(part_of, part) for t in (zero, scale, into))
        torch.addcmul(of_zero, half, of_scale, out=of_into)
    return columns.T


@cache
def order_of_this_cpu() -> Order | None:
    """The order in which this CPU's kernel takes its values; None: one that `unpack4` does not undo."""
    with torch.device("cpu"):
        values = (
            (torch.arange(2 * TILE * GROUP) % 31 % 16).to(torch.uint8).view(-1, GROUP)
        )  # (128, 32)
        plain = torch.tensor([1, 8], dtype=torch.bfloat16).expand(1, len(values), 2)  # W = values
    packed = pack4(values)
    fits = (
        order
        for order in ORDERS
        if torch.equal(unpack4(packed, plain, order).to(torch.uint8), values)
    )
    return next(fits, None)


def pack8(values: Tensor, scale: Tensor) -> Any:
    """Values int8 (N, K) and scale (N,) in the order of the CPU's integer product."""
    zero = torch.zeros(len(values), dtype=torch.int64)
    with (
        warnings.catch_warnings()
    ):  # torch means to replace its quantized tensors, but the operator still takes one
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch._make_per_channel_quantized_tensor(values, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(tensor, None)


@cache
def sums_are_wide() -> bool:
    """Whether this CPU adds products of two 8-bit values in 32 bits, as VNNI does; without it pairs overflow 16."""
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    x = torch.tensor([[-128.0], [127.0]]).expand(
        2, 64
    )  # the range as `linear_dynamic` finds it: steps of 1
    found: Tensor = torch.ops.quantized.linear_dynamic(x, pack8(largest, torch.ones(64)), False)
    return torch.equal(found, (x.double() @ largest.double()).float())


class Scratch(threading.local):
    """Where matrices are unpacked, one at a time in each thread; the largest so far stays allocated."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, G: int, N: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for W in columns, bf16 (K, N), for half of it, and for its values in bytes (N / 2L, K, L)."""
        K = G * GROUP
        if len(self.memory) < 4 * K * N:
            self.memory = torch.empty(4 * K * N, dtype=torch.uint8)
        columns, half, byte, _ = self.memory[: 4 * K * N].split(
            [2 * K * N, K * N, K * N // 2, K * N // 2]
        )
        half = half.view(torch.bfloat16).view(G, GROUP, -1, L)
        return columns.view(torch.bfloat16).view(K, N), half, byte.view(-1, K, L)


scratch = Scratch()
