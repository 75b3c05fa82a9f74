"""16-bit products on a CPU: weights in the order that its matrix units read, or widened to 32 bits where it has none.

Does not know: files, fewer bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import few_rows

FEW = (
    3  # rows up to which one after another is faster than widening, measured on two cores with AVX2
)
PIECE = 2**20  # weights that are widened at a time: 4 MB stay in the cache until they are used


def _has_units(kind: str) -> bool:
    """Whether this CPU multiplies `kind`; without (bf16: x86 before AVX-512, fp16: most) torch takes row after row."""
    return torch.backends.mkldnn.is_available() and bool(
        getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()
    )


def _can_pack() -> bool:
    """Whether torch has the operators, and they run on this CPU."""
    x = torch.ones(32, 32, dtype=torch.bfloat16, device="cpu")
    try:
        torch.ops.mkldnn._linear_pointwise(
            x, torch.ops.mkldnn._reorder_linear_weight(x, None), None, "none", [], ""
        )
    except (AttributeError, RuntimeError):
        return False
    return True


HAS_UNITS = {torch.bfloat16: _has_units("bf16"), torch.float16: _has_units("fp16")}
CAN_PACK = _can_pack()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, but for more than FEW rows of 16 bits on a CPU without units for them: multiplied and added in 32."""
    R, (N, K) = x.shape[:-1].numel(), weight.shape
    # A gradient would keep every widened piece until it is asked for.
    if x.device.type != "cpu" or HAS_UNITS.get(x.dtype, True) or R <= FEW or x.requires_grad:
        return F.linear(x, weight, bias)
    rows, y, step = x.reshape(R, K).float(), x.new_empty(R, N), max(1, PIECE // K)  # (R, K), (R, N)
    for at in range(0, N, step):
        part = (
            weight[at : at + step].float() @ rows.T
        ).T  # (R, step); in this order up to a third faster
        y[:, at : at + step] = part if bias is None else part + bias[at : at + step]
    return y.view(*x.shape[:-1], N)


class CPULinear(nn.Module):
    """A linear layer whose frozen bf16 weight is packed for the CPU's matrix units at its first use, in its place.

    This is the reordering that the compiler's freezing does: bit-equal results, eight rows for the price of one, where
    `F.linear` reads memory at half speed. `.weight` and `state_dict()` give copies; `.to()` brings the plain one back.
    A weight that cannot be packed stays, and is multiplied by `linear`, or by `few_rows` in compiled steps; there any
    weight stays as long as they are of one row.
    """

    bias: Tensor | None
    opaque: Any = (
        None  # set by speed.py: `product` as one operator, for a compiler that cannot look into it
    )
    handle: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.packed: Tensor | None = None
        self.weight, self.bias, self.out_features = plain.weight, plain.bias, plain.out_features

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:  # the packed operator has no gradient
            return F.linear(x, self.weight, self.bias)
        if self.opaque is None:
            self.pack()
        elif torch.compiler.is_compiling():
            if self.packed is None and few_rows.fits(x, self.weight):
                y = few_rows.product(x, self.weight)
                return (y if self.bias is None else y + self.bias).to(x.dtype)
            return self.opaque(x, self.handle, self.out_features)  # type: ignore[no-any-return]
        return self.product(x)

    def pack(self) -> None:
        if self.packed is not None or not CAN_PACK:
            return
        weight = self.weight
        if (
            weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and not weight.requires_grad
        ):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.data, None)
            del self.weight

    def product(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.packed is not None:
            return self.packed.to_dense()
        return super().__getattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        packed, self.packed = (
            self.packed,
            None,
        )  # .to(), .float(), .cuda(): packing is for one dtype and device
        if packed is not None:
            self.weight = nn.Parameter(packed.to_dense(), requires_grad=False)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._apply(lambda weight: weight)
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.packed.to_dense()


def pack(model: Any) -> None:
    """Give a frozen 16-bit model on a CPU the linear layers that are fast there; any other model stays as it is."""
    wide = not HAS_UNITS.get(model.dtype, True)
    if model.device.type != "cpu" or not (wide or (CAN_PACK and model.dtype == torch.bfloat16)):
        return
    if wide:
        model.linear = linear
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, CPULinear(child))
