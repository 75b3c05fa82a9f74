"""A few rows times a matrix, as sums of which a compiler makes one loop over the matrix's bytes. Does not know: layers.

A step of few rows is over when its weights are read, and torch's own kernels read them at half the memory's speed. Here
each 32-bit word is read once, its two or four weights are taken out of it, and the outputs come from two places of the
matrix at a time, for a core reads two faster than one. Called without a compiler it computes the same, slowly.

    R rows   K inputs   N outputs   n weights in a word of four bytes
"""

import torch
from torch import Tensor

MOST = {
    torch.bfloat16: 12,
    torch.int8: 1,
}  # rows up to which it is the fastest way, on two cores with AVX2


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is what a compiler should see: for few rows, of whole words, on a CPU."""
    whole = weight.dtype in MOST and weight.shape[1] * weight.itemsize % 4 == 0
    return whole and weight.device.type == "cpu" and x.shape[:-1].numel() <= MOST[weight.dtype]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, (…, K) and (N, K) in bf16 or int8 -> (…, N) in float32."""
    n, sums = 4 // weight.itemsize, []
    places = (
        x.float().view(-1, weight.shape[1] // n, n).transpose(1, 2).contiguous()
    )  # (R, n, K / n), place by place
    places = places.as_strided(
        places.shape, places.stride()
    )  # in memory, else computed anew for every output
    for words in weight.view(torch.float32).tensor_split(
        2
    ):  # (N / 2, K / n); code for AVX2 loads integers piecemeal
        word = words.view(torch.int32)[:, None]  # (N / 2, 1, K / n)
        if n == 2:  # bf16 is the upper half of float32
            values = [(word << 16).view(torch.float32), (word & -(1 << 16)).view(torch.float32)]
        else:
            values = [
                ((word << 24 - 8 * i) >> 24).float() for i in range(n)
            ]  # the sign is the byte's highest bit
        total = values[0] * places[:, 0]  # (N / 2, R, K / n)
        for value, place in zip(values[1:], places.unbind(1)[1:], strict=True):
            total = total + value * place
        sums.append(total.sum(-1))
    return (
        torch.cat(sums).T.contiguous().view(*x.shape[:-1], -1)
    )  # (N, R) before; one layout, or layers compile anew
