"""The order in which a device's kernel reads 4-bit values: packing, and unpacking on a CPU.

torch multiplies a few rows by packed 4-bit values directly. That kernel unpacks the matrix again
for every few rows of x, so a prefill is faster when the matrix is unpacked once and multiplied in
16 or 32 bits. torch has no operator that unpacks, and each instruction set has its own order of
values. Two orders are known, and `tile_of_this_cpu` finds by trial whether this CPU has one of
them. On any other device the kernel multiplies all rows. The gain in q4 (three layers of
Qwen2.5-0.5B's shapes, one thread of a 2-core AMD EPYC with AVX2, 2026-11-29): a prefill of 512 rows
takes 890 ms, and 1,430 ms through the kernel: 1.6 times as fast.

    N outputs, rows of W   K inputs   G = K / 32 groups of inputs, each with a scale and a zero
"""

from functools import cache

import torch
from torch import Tensor

aten = torch.ops.aten
GROUP = 32
ROW_MULTIPLE = 64  # every CPU's kernel takes a multiple of this number of rows of W
# A tile of T rows of W: its byte i holds a value of row i in the low four bits, and of row i + T/2
# in the high ones. T is 64 with AVX-512 and 32 with AVX2, both measured.
KNOWN_TILES = (64, 32)


def pack4(values: Tensor) -> Tensor:
    """Return uint8 values (N, K), 0 … 15, packed in the device's order; N is a multiple of 64."""
    if values.is_cpu:
        return aten._convert_weight_to_int4pack_for_cpu(  # type: ignore[no-any-return]
            values.int(), 1
        )
    pairs = (values[:, ::2] << 4 | values[:, 1::2]).contiguous()  # even inputs in the high bits
    inner_tiles = 8 if values.shape[1] % 128 == 0 else 2  # of 16 inputs, which are read together
    return aten._convert_weight_to_int4pack(pairs, inner_tiles)  # type: ignore[no-any-return]


def multiply4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Return x Wᵀ in bf16 through the device's kernel, (R, K) -> (R, N); see `unpack4` for W."""
    kernel = aten._weight_int4pack_mm_for_cpu if x.is_cpu else aten._weight_int4pack_mm
    return kernel(x.bfloat16().contiguous(), packed, GROUP, scales)  # type: ignore[no-any-return]


def unpack4(packed: Tensor, scales: Tensor, tile: int) -> Tensor:
    """Return W = (values − 8) · scale + zero, (N, K) in bf16.

    `packed` is the result of `pack4` on a CPU with this `tile`, and `scales` (G, N, 2) has scales
    and zeros. All steps keep the inputs first, as the kernel stores them, so nothing is transposed.
    """
    G, N, _ = scales.shape
    pairs = packed.view(-1, G * GROUP, tile // 2).transpose(0, 1)  # (K, N / tile, tile / 2)
    halves = torch.stack([pairs & 15, pairs >> 4], -2)  # (K, N / tile, 2, tile / 2)
    values = halves.view(G, GROUP, N).bfloat16().sub_(8)  # (G, 32, N)
    scale, zero = (part.contiguous() for part in scales[:, None].unbind(-1))  # (G, 1, N)
    return torch.addcmul(zero, values, scale).view(-1, N).T  # (N, K)


@cache
def tile_of_this_cpu() -> int | None:
    """Return the tile of this CPU's kernel, found by trial, or None if it is not known."""
    with torch.device("cpu"):
        values = (torch.arange(2 * ROW_MULTIPLE * GROUP) % 31 % 16).to(torch.uint8).view(-1, GROUP)
        scales = torch.tensor([1, 8], dtype=torch.bfloat16).expand(1, len(values), 2)  # W = values
    packed = pack4(values)
    for tile in KNOWN_TILES:
        if torch.equal(unpack4(packed, scales, tile).to(torch.uint8), values):
            return tile
    return None
