"""Linear layers of four and eight bits: what each format stores, where it runs, how a matrix gets there.

A step of one row reads every weight once and computes little, so a quarter of the bytes is close to a quarter of the
time. Few rows go through kernels that read the packed values; more rows unpack one matrix at a time and multiply in 16
bits, but for q8 on x86, whose integer product takes them all. Packing belongs to a device, so a quantized layer stays
where it was made. The embedding is never quantized: W_a comes from it. Does not know: models, files, the order in which
tensors arrive.

    N outputs   K inputs   R rows   G = K / 32 groups of inputs, each with a scale and a zero
"""

import logging
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bnb, few_rows
from .order import GROUP, TILE, order_of_this_cpu, pack4, pack8, sums_are_wide, unpack4
from .packed import linear

FEW = 384  # rows up to which q8's kernel beats unpacking where it is not x86's
LOOSE = 64  # and where it would be, but steps are compiled
BOTH = 64  # rows up to which q8 on x86 always takes a second one of what rounding lost
COARSE = 0.055  # and of more rows those whose step is larger, as a share of their root mean square
PIECE = 128  # rows that q8 on x86 takes at a time


class Format(NamedTuple):
    """Bits for each weight, what is stored, where it runs, and the package it needs besides torch."""

    bits: float
    stores: str
    runs: str
    package: str = ""


FORMATS = {
    "q4": Format(
        5,
        "4-bit values, a bf16 scale and zero for every 32 inputs of a row, fitted",
        "CPU, CUDA from 8.0",
    ),
    "q8": Format(8, "8-bit values, a bf16 scale for every row", "CPU, CUDA from 8.0"),
    "nf4": Format(
        4.127, "4-bit normal floats, an 8-bit scale for every 64", "CPU, CUDA", "bitsandbytes"
    ),
    "int8": Format(8, "8-bit values, a float32 scale for every row", "CPU, CUDA", "bitsandbytes"),
}


def check(name: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raise ValueError or ImportError, before anything is read, for a format that is unknown or does not run here."""
    found = f"quantize (--quantize): found {name!r}"
    if name not in FORMATS:
        raise ValueError(f"{found}, expected one of {', '.join(FORMATS)}")
    if dtype == torch.float64:
        raise ValueError(
            f"{found} with float64, expected 16 or 32 bits: the quantized kernels compute in 16"
        )
    if FORMATS[name].package:
        bnb.require(found, device)
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        seen = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"{found} on a GPU of compute capability {seen}, expected {FORMATS[name].runs}; nf4 runs"
        )
    elif not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise ValueError(f"{found} with torch {torch.__version__}, expected torch 2.6 or newer")


def quantized(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """The layer of format `name` for a matrix (N, K) on its device; None where K does not divide into its groups."""
    if name == "q4":
        return None if weight.shape[1] % GROUP else Q4Linear(*fit(weight), bias, weight.dtype)
    if name == "q8":
        return Q8Linear(*round_rows(weight), bias, weight.dtype)
    fits = name == "int8" or (
        weight.shape[1] % 64 == 0 and weight.shape[0] % 32 == 0
    )  # nf4's blocks, the CPU's tiles
    return bnb.layer(name, weight, bias) if fits else None


def keeps(name: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GGUF file's own 4- and 8-bit blocks can stay as they are: in a 16-bit model where q4's kernels run."""
    if name not in (None, "q4", "q8") or dtype.itemsize != 2:
        return False
    try:
        check("q4", device, dtype)
    except ValueError:
        return False
    return True


def finish(model: Any) -> None:
    """Keep a model with quantized layers on its device; its tied LM head becomes an 8-bit copy of the embedding."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if layers and model.lm_head is None:
        model.lm_head = quantized("q8", model.model.embed_tokens.weight, None)
    if layers or any("bitsandbytes" in type(module).__module__ for module in model.modules()):
        model._apply = refuse_to_move


class Replacer:
    """Make the quantized layers of one model, one at a time, while its tensors are read."""

    def __init__(
        self, source: Any, device: torch.device, dtype: torch.dtype, quantize: str | None
    ) -> None:
        """`source` has `read` and `blocks` of tensors; `quantize` None keeps a GGUF file's blocks."""
        self.source, self.device, self.dtype, self.quantize = source, device, dtype, quantize
        self.keeps_blocks = keeps(quantize, device, dtype)
        self.not_divisible = 0

    def __call__(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return the layer to put in place of `module`; None keeps it in 16 or 32 bits."""
        if type(module) is not nn.Linear or name == "lm_head":  # W_a needs the LM head in 16 bits
            return None
        key = f"{name}.weight"
        bias = None if module.bias is None else self._read(f"{name}.bias")
        blocks = self.source.blocks(key) if self.keeps_blocks else None
        if blocks is not None and (self.quantize is None or blocks[2] is not None):
            values, scale, minimum = blocks
            minimum = None if minimum is None else minimum.to(self.device)
            on_device = values.to(self.device), scale.to(self.device)
            return kept(*on_device, minimum, bias, self.dtype)
        if self.quantize is None:
            return None
        new = quantized(self.quantize, self._read(key), bias)
        self.not_divisible += new is None
        return new

    def finish(self, model: Any) -> None:
        """Warn of matrices that stayed in 16 bits, and complete the model: see `finish`."""
        if self.not_divisible:
            text = (
                "%s: %d matrices stay in 16 bits, their sizes do not divide into the blocks of %s"
            )
            logger = logging.getLogger("minimas")
            logger.warning(text, model.name, self.not_divisible, self.quantize)
        finish(model)

    def _read(self, key: str) -> Tensor:
        tensor: Tensor = self.source.read(key, self.dtype)
        return tensor.to(self.device)


def kept(
    values: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> nn.Module:
    """The layer that keeps a GGUF matrix as it is: Q4_0 and Q4_1 (values · scale + minimum, scale and minimum (N, G)),
    or Q8_0 (minimum None). Only the scales are rounded, to bf16, as a 16-bit copy would round every weight.
    """
    if minimum is not None:
        return Q4Linear(values, scale, minimum + 8 * scale, bias, dtype)
    return Q8GroupLinear(values, scale, bias, dtype)


# -- from weights to values --------------------------------------------------------------------------------------------


def fit(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values uint8 (N, K) in 0 … 15, scale and zero bf16 (N, G), so that (values − 8) · scale + zero is near `weight`.

    Rounding between a group's extremes spends the grid on them. Instead, as llama.cpp's quantizer does, the squared
    error is minimized over scale and zero, larger weights counting more: rounding and weighted least squares in turn,
    from the full range and from narrower ones, the best of all by the error of what is stored.
    """
    parts = [
        _fit(part) for part in weight.split(max(1, 2**18 // weight.shape[1]))
    ]  # what stays in the cache is fast
    values, scale, zero = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(scale), torch.cat(zero)


def _fit(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = weight.float().view(-1, GROUP)  # (N · G, 32)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    importance = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    total = importance.sum(-1, keepdim=True)
    mean = (importance * x).sum(-1, keepdim=True) / total.clamp_min(1e-30)
    slope = importance * (x - mean)
    best = torch.full_like(low, torch.inf)
    kept = [torch.zeros_like(x), torch.zeros_like(low), torch.zeros_like(low)]

    def consider(scale: Tensor, zero: Tensor) -> None:
        scale, zero = scale.bfloat16().float(), zero.bfloat16().float()  # what is stored
        values = ((x - zero) / scale).round_().add_(8).clamp_(0, 15)
        error = (importance * ((values - 8) * scale + zero - x).square()).sum(-1, keepdim=True)
        better = error < best
        for i, new in enumerate((values, scale, zero)):
            kept[i] = torch.where(better, new, kept[i])
        best.copy_(torch.where(better, error, best))

    for part in (1.0, 0.92):
        scale = ((high - low) * part / 15).clamp_min(1e-30)
        zero = (low + high + scale) / 2  # the middle of the range is between the values 7 and 8
        consider(scale, zero)
        for _ in range(2):
            values = ((x - zero) / scale).round_().add_(8).clamp_(0, 15) - 8
            centre = (importance * values).sum(-1, keepdim=True) / total.clamp_min(1e-30)
            values -= centre
            fitted = (slope * values).sum(-1, keepdim=True)
            fitted /= (importance * values.square()).sum(-1, keepdim=True).clamp_min(1e-30)
            scale = torch.where(fitted > 1e-30, fitted, scale)
            zero = mean - scale * centre
        consider(scale, zero)
    groups = weight.shape[1] // GROUP
    values, scale, zero = kept
    scale, zero = scale.bfloat16().view(-1, groups), zero.bfloat16().view(-1, groups)
    return values.to(torch.uint8).view(weight.shape), scale, zero


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values int8 (N, K) and scale bf16 (N,), so that values · scale is nearest to `weight`."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = (weight.abs().amax(1).float() / 127).clamp_min(1e-30).bfloat16()
    for into, part, by in zip(
        values.split(4096), weight.split(4096), scale.split(4096), strict=True
    ):
        into.copy_((part.float() / by.float()[:, None]).round_().clamp_(-127, 127))
    return values, scale


# -- the layers --------------------------------------------------------------------------------------------------------


def refuse_to_move(*args: Any, **kwargs: Any) -> NoReturn:
    """A quantized model's `_apply`, which `.to()`, `.cuda()`, `.float()` … call before anything is moved."""
    raise ValueError(
        "to(): found a quantized model, packed for its device; expected load() with device=, dtype="
    )


class QuantizedLinear(nn.Module):
    """x Wᵀ + b with W (N, K) in fewer bits; `.weight` and `state_dict()` give W unpacked, in the model's dtype."""

    few: float  # rows up to which `multiply` is the faster way

    def __init__(self, shape: torch.Size, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        (self.out_features, self.in_features), self.bias, self.dtype = shape, bias, dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (R, K)
        if len(rows) <= self.few and not rows.requires_grad:  # the kernels have no gradient
            y = self.multiply(rows)  # (R, N)
            y = (y if self.bias is None else y + self.bias).to(x.dtype)
        else:
            weight = (
                self.unpack()
            )  # a gradient keeps it, and the next layer unpacks to the same place
            y = linear(
                rows, (weight.clone() if rows.requires_grad else weight).to(x.dtype), self.bias
            )
        return y.view(*x.shape[:-1], -1)

    def multiply(self, rows: Tensor) -> Tensor:  # (R, K) -> (R, N), through the kernel
        raise NotImplementedError

    def unpack(self) -> Tensor:  # W (N, K), in bf16, until the next call
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        return self.unpack().clone().to(self.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> NoReturn:
        raise ValueError(
            f"{prefix}weight: found a quantized layer, expected one in 16 or 32 bits: load it anew"
        )

    _apply = refuse_to_move


class Q4Linear(QuantizedLinear):
    """Values 0 … 15 (N, K), scale and zero (N, G): W = (values − 8) · scale + zero, group by group of a row."""

    def __init__(
        self, values: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(values.shape, bias, dtype)
        N, K = values.shape
        pad = (0, 0, 0, -N % TILE)  # rows of zeros up to a whole tile
        self.packed = torch.cat(
            [pack4(F.pad(part, pad)) for part in values.split(2**22 // K // TILE * TILE or TILE)]
        )
        self.scales = torch.stack(
            [F.pad(t.bfloat16(), pad).T for t in (scale, zero)], dim=-1
        ).contiguous()  # (G, N, 2)
        on_cpu = values.device.type == "cpu"
        self.order = order_of_this_cpu() if on_cpu else None
        self.few = self.order.few if self.order else torch.inf
        self.kernel = (
            torch.ops.aten._weight_int4pack_mm_for_cpu
            if on_cpu
            else torch.ops.aten._weight_int4pack_mm
        )

    def multiply(self, rows: Tensor) -> Tensor:
        product: Tensor = self.kernel(rows.bfloat16(), self.packed, GROUP, self.scales)
        return product[:, : self.out_features]

    def unpack(self) -> Tensor:
        if self.order is None:  # only the kernel knows it: W times the unit vectors
            units = torch.eye(self.in_features, dtype=torch.bfloat16, device=self.packed.device)
            return torch.cat([self.multiply(part) for part in units.split(512)]).T
        return unpack4(self.packed, self.scales, self.order)[: self.out_features]


class Q8GroupLinear(QuantizedLinear):
    """Values −128 … 127 (N, K) and scale (N, G), GGUF's Q8_0, as two planes of four bits: 16 · high + low."""

    def __init__(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(values.shape, bias, dtype)
        high, low = (values >> 4) + 8, values & 15  # both 0 … 15
        none = torch.zeros_like(scale)
        self.planes = (  # a tuple, for this is one layer, not two
            Q4Linear(high.to(torch.uint8), 16 * scale, none, None, dtype),
            Q4Linear(low.to(torch.uint8), scale, 8 * scale, None, dtype),
        )
        self.few = self.planes[0].few

    def multiply(self, rows: Tensor) -> Tensor:
        return self.planes[0].multiply(rows) + self.planes[1].multiply(rows)

    def unpack(self) -> Tensor:
        return self.planes[0].unpack().clone() + self.planes[1].unpack()


class Q8Linear(QuantizedLinear):
    """Values −127 … 127 (N, K) and scale (N,): W = values · scale, row by row.

    On x86 the activations become integers too: of each row x, scaled to its largest element, a rounded copy and what
    rounding lost are two rows of one integer product. A few rows cost next to nothing, and the sum is as exact as bf16.
    Of many rows, where a row costs its time, only those have a second one that have large outliers.
    """

    opaque: Any = (
        None  # set by speed.py: `product` as one operator, for a compiler that cannot look into it
    )
    handle: Tensor

    def __init__(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(values.shape, bias, dtype)
        self.scale = scale
        x86 = values.device.type == "cpu" and "x86" in torch.backends.quantized.supported_engines
        self.values = None if x86 else values
        pieces = zip(values.split(2**14), scale.split(2**14), strict=True) if self.integer else ()
        self.parts = [pack8(part, by) for part, by in pieces]
        self.levels = (
            127 if self.integer and sums_are_wide() else 63
        )  # of an activation on each side of 0
        # The operator takes its range from its input. One more row fixes it, so that the step is 1.
        self.limits = torch.tensor(
            [-self.levels - 1.0, self.levels, *[0.0] * (values.shape[1] - 2)]
        )[None]  # (1, K)
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
            "aten::_weight_int8pack_mm", values.device.type.upper()
        )
        self.few = torch.inf if self.integer else FEW if kernel else 0

    @property
    def integer(self) -> bool:  # whether products are of whole numbers, by packed parts
        return self.values is None

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.integer
            and len(rows := x.reshape(-1, self.in_features)) > PIECE
            and not x.requires_grad
        ):
            # What is made of a product should still be in the cache.
            parts = [super(Q8Linear, self).forward(part) for part in rows.split(PIECE)]
            return torch.cat(parts).view(*x.shape[:-1], -1)
        return super().forward(x)

    def multiply(self, rows: Tensor) -> Tensor:
        if self.values is not None:
            if torch.compiler.is_compiling() and few_rows.fits(rows, self.values):
                return few_rows.product(rows, self.values) * self.scale
            product: Tensor = torch.ops.aten._weight_int8pack_mm(
                rows.bfloat16(), self.values, self.scale
            )
            return product
        sparing = len(rows) > BOTH and not torch.compiler.is_compiling()
        unit = rows.abs().amax(-1, keepdim=True).float().clamp_min(1e-30) / self.levels  # (R, 1)
        exact = rows / unit
        rounded = exact.round()
        rest = (exact - rounded) * (2 * self.levels)
        if sparing:
            mean = (
                torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32) / self.in_features**0.5
            )  # (R,)
            coarse = (unit[:, 0] > COARSE * mean).nonzero()[:, 0]
            rest = rest[coarse]
        fixed = torch.cat([rounded, rest, self.limits])  # (R + the second rows + 1, K)
        if self.opaque is not None and torch.compiler.is_compiling():
            products: Tensor = self.opaque(fixed, self.handle, self.out_features)
        else:
            products = self.product(fixed)
        whole: Tensor
        whole, lost, _ = products.split([len(rows), len(rest), 1])
        fraction = 1 / (2 * self.levels)
        if sparing:
            whole.index_add_(0, coarse, lost, alpha=fraction)
            return whole * unit
        return torch.add(whole, lost, alpha=fraction) * unit

    def product(self, fixed: Tensor) -> Tensor:
        """(R, K) -> (R, N): whole numbers in `limits` on the left, which is what the operator rounds to."""
        narrow = self.levels == 63
        return torch.cat(
            [torch.ops.quantized.linear_dynamic(fixed, part, narrow) for part in self.parts], -1
        )

    def integers(self) -> Tensor:  # int8 (N, K)
        if self.values is not None:
            return self.values
        parts = [torch.ops.quantized.linear_unpack(part)[0].int_repr() for part in self.parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def unpack(self) -> Tensor:
        return self.integers() * self.scale[:, None]

    def loosen(self) -> None:
        """On a CPU that adds in 16 bits: no integer product, for a compiled step of one row is faster without."""
        if self.integer and self.levels == 63:
            self.values, self.parts, self.few = self.integers(), [], LOOSE
