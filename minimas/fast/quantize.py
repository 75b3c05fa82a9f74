"""Linear layers in 4 and 8 bits: what each format stores, where it runs, how weights are rounded.

A step of one row reads every weight once and computes little, so fewer bytes take less time. A few
rows go through torch's kernels, which read the packed values. For more rows the matrix is unpacked
and multiplied in 16 or 32 bits (see order.py for the gain).

The README's latent step of one row is 1.7 times as fast in q4 as in bf16, both not compiled (2-core
AMD EPYC with AVX-512, 2026-11-30), and 1.19 times with AVX2 (2-core AMD EPYC, 2026-11-28). The
products of eight rows (a layer of Qwen2.5-0.5B, one thread) take 53 ms in bf16, 26 ms in q4 and 20
ms in q8, 2.0 and 2.6 times as fast. The products of one row take 8 ms in bf16, and 7 in q4 and q8
(2-core AMD EPYC with AVX2, 2026-11-29).

Embedding and LM head are not quantized, because the alignment W_a is computed from them. In q4 and
q8, a tied model gets a separate 8-bit copy of the embedding as its head. In a GGUF file both may
have few bits already, and keep them. Packing depends on the device, so a quantized model cannot be
moved. This file does not depend on models, files or the order in which tensors are read.

    N outputs   K inputs   R rows   G = K / 32 groups of inputs, each with a scale and a zero

A group's zero is a float, the weight that the value 8 stands for, as in torch's kernels.
"""

import logging
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ParameterError
from . import bnb
from .order import GROUP, ROW_MULTIPLE, aten, multiply4, pack4, tile_of_this_cpu, unpack4
from .packed import linear, packing_is_faster

FORMATS = {  # average bits of a weight, with its scales
    "q4": 5,  # 4-bit values, a bf16 scale and zero for every 32 inputs of a row, see `fit`
    "q8": 8,  # 8-bit values, a bf16 scale for every row
    "nf4": 4.127,  # 4-bit normal floats, an 8-bit scale for every 64 values
    "int8": 8,  # 8-bit values, a float32 scale for every row
}
TORCH_FORMATS = ("q4", "q8")  # multiplied by torch's kernels, the others by those of bitsandbytes


def check(name: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Check, before anything is read, that format `name` is known and runs on `device`.

    Raises ValueError or ImportError naming the flag, what was found and what was expected.
    """
    problem = ""
    if name not in FORMATS:
        problem = f", expected one of {', '.join(FORMATS)}"
    elif dtype == torch.float64:
        problem = " with float64, expected 16 or 32 bits: the quantized kernels compute in 16"
    elif name not in TORCH_FORMATS:
        bnb.require(f"quantize: found {name!r}", device)
    elif not has_kernels(device):
        problem = (
            f" on a GPU of compute capability {torch.cuda.get_device_capability(device)}, "
            "expected a CPU, 8.0 or newer, or nf4"
        )
    if problem:
        raise ParameterError("quantize", f"found {name!r}{problem}")


def has_kernels(device: torch.device) -> bool:
    """Return whether torch's kernels of 4 and 8 bits run on `device`."""
    cuda = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return cuda or device.type == "cpu"


def quantized(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """Return the layer of format `name` for a matrix (N, K), on its device.

    Returns None if the sizes do not divide into the format's blocks.
    """
    N, K = weight.shape
    if name == "q8":
        return Q8Linear(weight, bias)
    if name == "q4":
        if K % GROUP:
            return None
        values, scale, zero = in_chunks(fit, weight)
        return Q4Linear(values, scale, zero, bias)
    if name == "nf4" and (K % 64 or N % 32):  # its blocks, and the tiles of its CPU kernel
        return None
    made = bnb.layer(name, weight, bias)
    made._apply = made._load_from_state_dict = refuse_to_change
    return made  # type: ignore[no-any-return]


def replacement(
    source: Any,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
    name: str,
    module: Any,
) -> nn.Module | None:
    """Return the layer to put in place of a model's `module`; None keeps it in 16 or 32 bits.

    `source` is a `Folder`, `GGUF` or `Part`. If the model has 16 bits and the kernels run on the
    device, the matrices of a GGUF file stay in 4 or 8 bits. Matrices in 4 bits become q4 with the
    file's own values, also if `quantize` is q8. Others become 8-bit layers, unless
    `quantize` is q4.
    """
    key = f"{name}.weight"
    stays = quantize in (None, *TORCH_FORMATS) and dtype.itemsize == 2 and has_kernels(device)
    target = in_file = source.low_bits(key) if stays else ""
    # Only projections: embedding and LM head keep what the file has, because W_a needs them.
    if name.endswith("_proj") and in_file != "q4":
        target = quantize or in_file
    if not target:
        return None

    bias = getattr(module, "bias", None)
    if bias is not None:
        bias = source.read(f"{name}.bias", dtype).to(device)
    if in_file == "q4":
        values, scale, minimum = (part.to(device) for part in source.blocks(key))
        return Q4Linear(values, scale, minimum + 8 * scale, bias)
    return quantized(target, source.read(key, dtype).to(device), bias)


def complete(model: Any, quantize: str | None) -> None:
    """Complete a model whose layers were replaced. Moving it raises an error from now on.

    In q4 and q8, a tied LM head becomes the 8-bit embedding itself, or else an 8-bit copy of it.
    Warns of matrices that were not quantized.
    """
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    plain = sum(type(layer) is nn.Linear for layer in layers)
    low_bits = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if quantize and plain:
        logging.getLogger("minimas").warning(
            "%s: %d matrices are not quantized: their sizes do not fit the blocks of %s",
            model.name,
            plain,
            quantize,
        )
    if model.lm_head is None and low_bits:
        table = model.model.embed_tokens
        model.lm_head = table if isinstance(table, Q8Linear) else Q8Linear(table.weight, None)
    if low_bits or plain < len(layers):
        model._apply = refuse_to_change


# -- from weights to values ---------------------------------------------------------------


def in_chunks(function: Any, weight: Tensor) -> Any:
    """Return the result of `fit` or `round_rows`, computed in chunks of rows.

    The chunks stay in the cache of a CPU, which makes fitting 3.4 times as fast (AVX2). A GPU gets
    fewer and larger chunks.
    """
    size = 2**18 if weight.is_cpu else 2**24
    parts = map(function, weight.split(size // weight.shape[1]))
    return map(torch.cat, zip(*parts, strict=True))


def fit(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values uint8 (N, K) in 0 … 15, scale and zero bf16 (N, G).

    (values − 8) · scale + zero is near `weight`. A grid from a group's minimum to its maximum would
    serve these extremes only. Instead, as in llama.cpp's quantizer, scale and zero minimize the
    squared error, in which larger weights count more. Rounding and weighted least squares
    alternate, beginning with the full range and with a narrower range. Of all candidates, the one
    with the smallest error, after scale and zero are rounded to bf16, is kept.
    """
    x = weight.float().view(-1, GROUP)  # (N · G, 32)
    low, high = x.aminmax(dim=-1, keepdim=True)
    importance = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    importance /= importance.sum(-1, keepdim=True).clamp_min(1e-30)

    def mean(y: Tensor) -> Tensor:
        return (importance * y).sum(-1, keepdim=True)

    def nearest(scale: Tensor, zero: Tensor) -> Tensor:  # values −8 … 7, as float32
        return ((x - zero) / scale).round_().clamp_(-8, 7)

    grids = []
    for share in (1.0, 0.92):
        scale = ((high - low) * share / 15).clamp_min(1e-30)
        zero = (low + high + scale) / 2  # the middle of the range is half a step below value 0
        grids.append((scale, zero))
        for _ in range(2):
            values = nearest(scale, zero)
            centre = mean(values)
            values -= centre
            slope = mean(values * (x - mean(x))) / mean(values.square()).clamp_min(1e-30)
            scale = torch.where(slope > 1e-30, slope, scale)
            zero = mean(x) - scale * centre
        grids.append((scale, zero))
    # Scale and zero as they are stored, (4, N · G, 1).
    scale, zero = (torch.stack(parts).bfloat16() for parts in zip(*grids, strict=True))
    error = nearest(scale, zero) * scale + zero - x
    best = mean(error.square()).argmin(0, keepdim=True)
    scale, zero = (grid.gather(0, best)[0] for grid in (scale, zero))  # (N · G, 1)
    values = (nearest(scale, zero) + 8).to(torch.uint8).view(weight.shape)  # (N, K)
    return values, scale.view(len(weight), -1), zero.view(len(weight), -1)  # (N, G)


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (N, K) and a bf16 scale (N,); values · scale is near `weight`."""
    x = weight.float()
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30).bfloat16()
    # |x / scale| is below 127.5: rounding to bf16 makes the scale smaller by less than 1 / 256.
    return (x / scale).round_().to(torch.int8), scale[:, 0]


# -- the layers ---------------------------------------------------------------------------


def refuse_to_change(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise ValueError, in place of the methods that move a quantized model or load its weights."""
    raise ValueError(
        "to() or load_state_dict(): found a quantized model, packed for its device; "
        "expected load() with device=, dtype="
    )


class QuantizedLinear(nn.Module):
    """x Wᵀ + b with W (N, K) in fewer bits; `.weight` and `state_dict()` return W in bf16.

    `multiply` is faster than unpacking for at most `max_kernel_rows` rows of x.
    """

    bias: Tensor | None
    max_kernel_rows: float = 0
    multiply: Callable[[Tensor], Tensor]  # x Wᵀ through the kernel, (R, K) -> (R, N)
    unpack: Callable[[], Tensor]  # W (N, K) in bf16

    def __init__(self, shape: torch.Size, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (R, K)
        if len(rows) <= self.max_kernel_rows and not rows.requires_grad:  # kernels: no gradient
            y = self.multiply(rows)  # (R, N)
        else:
            y = linear(rows, self.unpack().to(x.dtype))
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)  # (…, N)

    @property
    def weight(self) -> Tensor:
        return self.unpack().contiguous()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    _apply = _load_from_state_dict = refuse_to_change


class Q4Linear(QuantizedLinear):
    """Values 0 … 15 (N, K), scale and zero (N, G): W = (values − 8) · scale + zero by group."""

    def __init__(self, values: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> None:
        super().__init__(values.shape, bias)
        pad = (0, 0, 0, -len(values) % ROW_MULTIPLE)  # rows of zeros up to a whole tile
        self.packed = pack4(F.pad(values, pad))
        scales = F.pad(torch.stack([scale, zero]), pad).bfloat16()  # (2, N, G)
        self.scales = scales.permute(2, 1, 0).contiguous()  # (G, N, 2)
        self.tile = tile_of_this_cpu() if values.is_cpu else None
        self.max_kernel_rows = 64 if self.tile else torch.inf  # measured on AVX2

    def multiply(self, rows: Tensor) -> Tensor:
        return multiply4(rows, self.packed, self.scales)[:, : self.out_features]

    def unpack(self) -> Tensor:
        if self.tile:
            weight = unpack4(self.packed, self.scales, self.tile)
        else:  # only the kernel knows the order: multiply W by the unit vectors
            units = self.scales.new_ones(self.in_features).diag()  # the identity, on the device
            weight = multiply4(units, self.packed, self.scales).T
        return weight[: self.out_features]


class Q8Linear(QuantizedLinear):
    """Values −127 … 127 (N, K) and scale (N,): W = values · scale, row by row.

    As an embedding it takes token ids (…,) and returns their rows (…, K) in the model's dtype. The
    kernel computes in 16 bits, not in 8-bit integers: see docs/quantization.md. A compiled step of
    one row is 1.4 times as fast with the sum in `multiply` (AVX-512, 2026-11-30).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self.dtype = weight.dtype
        self.values, scale = in_chunks(round_rows, weight)
        # CUDA's kernel would convert a bf16 scale in every call.
        self.scale = scale if weight.is_cpu else scale.float()
        # The loop in `multiply` is for AVX-512 with bf16 instructions. With AVX2 it takes 5 times
        # as long as the kernel, and with AVX-512 alone 1.1 times.
        self.has_loop = weight.is_cpu and packing_is_faster()
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
            "aten::_weight_int8pack_mm", weight.device.type.upper()
        )
        # The CPU's kernel reads beyond rows whose length is not a multiple of its vectors.
        if has_kernel and self.in_features % 16 == 0:
            # CUDA's kernel computes 16 rows in the time of one.
            self.max_kernel_rows = 64 if weight.is_cpu else 16

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():  # token ids
            return self.unpack(x).to(self.dtype)
        return super().forward(x)

    def multiply(self, rows: Tensor) -> Tensor:
        if self.has_loop and len(rows) == 1 and torch.compiler.is_compiling():
            # The compiler makes one loop of it, see few_rows.py. as_strided keeps the computation
            # of the inputs out of the loop: torch 2.13 made wrong code when it fused the two.
            rows = rows.float()
            rows = rows.as_strided(rows.shape, rows.stride())
            sums = [(half.float() * rows).sum(-1) for half in self.values.tensor_split(2)]
            return torch.cat(sums)[None] * self.scale  # type: ignore[no-any-return]
        return aten._weight_int8pack_mm(  # type: ignore[no-any-return]
            rows.bfloat16(), self.values, self.scale
        )

    def unpack(self, ids: Any = slice(None)) -> Tensor:
        scale = self.scale[ids][..., None].bfloat16()
        return self.values[ids] * scale  # type: ignore[no-any-return]
