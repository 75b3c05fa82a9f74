"""16-bit matrices in the order that a CPU's matrix units read. Does not know: files, fewer bits."""

from typing import Any

import torch
from torch import Tensor, nn

CAN_PACK = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()


class PackedLinear(nn.Module):
    """A linear layer whose frozen bf16 weight is packed for the CPU's matrix units at its first use, in its place.

    This is the reordering that the compiler's freezing does: bit-equal results, eight rows for the price of one, where
    `F.linear` reads memory at half speed. `.weight` and `state_dict()` give copies; `.to()` brings the plain one back.
    """

    bias: Tensor | None
    opaque: Any = None  # set by speed.py: `product` as one operator, for a compiler that cannot look into it
    handle: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed: Tensor | None = None
        self.out_features = linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:  # the packed operator has no gradient
            return nn.functional.linear(x, self.weight, self.bias)
        if self.packed is None:
            weight = self.weight
            if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.requires_grad:  # changed since
                return nn.functional.linear(x, weight, self.bias)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.data, None)
            del self.weight, weight
        if self.opaque is not None and torch.compiler.is_compiling():
            return self.opaque(x, self.handle, self.out_features)  # type: ignore[no-any-return]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.packed is not None:
            return self.packed.to_dense()
        return super().__getattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        packed, self.packed = self.packed, None  # .to(), .float(), .cuda(): packing is for one dtype and device
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
    """Let a frozen bf16 model on a CPU pack its matrices at its first forward; any other model stays as it is."""
    if not CAN_PACK or model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
