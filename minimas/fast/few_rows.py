"""Multiply a few bf16 rows by a bf16 matrix, with sums that torch.compile turns into one loop.

A step of a few rows is limited by reading the weights, and torch's own kernel does not reach the
memory's speed on a CPU without matrix units. Here each 32-bit word is read once, and a shift and a
mask extract its two weights, because bf16 is the first 16 bits of float32. The top rows and the
bottom rows of the matrix are multiplied at the same time, because a core reads two streams faster
than one. Without a compiler the function returns the same result, slowly.

The gain (Qwen2.5-Coder-0.5B in bf16, one thread of a 2-core AMD EPYC with AVX2, 2026-11-29,
processor time, medians of 15 and of 7 interleaved rounds): a compiled latent step of one row takes
81 ms with this loop and 128 ms without it, so it is 1.6 times as fast. A step of eight rows is 1.8
times as fast compiled: 200 ms against 357. On a 2-core Intel Xeon with AVX-512, but without its
bf16 instructions, steps of 2, 4 and 8 rows are 1.6, 2.0 and 1.3 times as fast (2026-11-30). With
these instructions the loop is for one row: the README's latent step takes 43 ms with it, and 66 ms
with packed weights and no compilation.

    R rows   K inputs   N outputs
"""

import torch
from torch import Tensor

MAX_ROWS = 12  # widening the matrix is as fast at sixteen rows (docs/quantization.md)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x Wᵀ, bf16 (R, K) and (N, K) -> float32 (R, N). K is even: whole 32-bit words."""
    # The even inputs, then the odd inputs: (R, 2, K / 2).
    inputs = x.float().unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
    # as_strided makes the compiler store the inputs, or it would compute them for every output.
    inputs = inputs.as_strided(inputs.shape, inputs.stride())
    sums = []
    # The words are passed as float32: the compiler's AVX2 code loads integers one by one.
    for half in weight.view(torch.float32).tensor_split(2):  # (N / 2, K / 2)
        words = half.view(torch.int32)[:, None]  # (N / 2, 1, K / 2)
        even = (words << 16).view(torch.float32)
        odd = (words & -65536).view(torch.float32)
        sums.append((even * inputs[:, 0] + odd * inputs[:, 1]).sum(-1))  # (N / 2, R)
    # Contiguous: another layout would cause another compilation of the layers after this one.
    return torch.cat(sums).T.contiguous()
