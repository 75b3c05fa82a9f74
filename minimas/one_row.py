"""One row times a matrix, as a sum of which a compiler makes one loop over the matrix's bytes. Does not know: layers.

A step of one row is over when its weights are read, and torch's own kernels read them at half the memory's speed. Here
each 32-bit word is read once, its two or four weights are taken out of it, and the outputs come from two places of the
matrix at a time, for a core reads two faster than one. Called without a compiler it computes the same, slowly.

    K inputs   N outputs   n weights in a word of four bytes
"""

import torch
from torch import Tensor


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is what a compiler should see: for one row, of whole words, on a CPU."""
    whole = weight.dtype in (torch.bfloat16, torch.int8) and weight.shape[1] * weight.itemsize % 4 == 0
    return whole and weight.device.type == "cpu" and x.shape[:-1].numel() == 1


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, (…, K) of one row and (N, K) in bf16 or int8 -> (…, N) in float32."""
    n, sums = 4 // weight.itemsize, []
    places = x.float().view(-1, n).T.contiguous()  # (n, K / n), the inputs for each place in a word
    places = places.as_strided(places.shape, places.stride())  # in memory, else computed anew for every output
    for words in weight.view(torch.float32).tensor_split(2):  # (N / 2, K / n); code for AVX2 loads integers piecemeal
        word = words.view(torch.int32)
        if n == 2:  # bf16 is the upper half of float32
            values = [(word << 16).view(torch.float32), (word & -(1 << 16)).view(torch.float32)]
        else:
            values = [((word << 24 - 8 * i) >> 24).float() for i in range(n)]  # the sign is the byte's highest bit
        total = values[0] * places[0]
        for value, place in zip(values[1:], places[1:], strict=True):
            total = total + value * place
        sums.append(total.sum(-1))
    return torch.cat(sums).view(*x.shape[:-1], -1)
