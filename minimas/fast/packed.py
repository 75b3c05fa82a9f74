"""16-bit products on a CPU: weights packed for its matrix units, or else widened to 32 bits.

Packing: on AVX-512 with bf16 instructions, `F.linear` in bf16 reads memory at half speed and takes
1.5 times as long for eight rows as for one. With packed weights, eight rows take as long as one:
1.3 ms for the products of a layer of Qwen3-0.6B, against 2.7 ms with `F.linear` (2-core AMD EPYC
with AVX-512, 2026-11-30).

Widening: without matrix units torch multiplies row by row. The products of 64 rows (a layer of
Qwen2.5-0.5B, one thread) take 110 ms widened and 502 ms with `F.linear`, so widening is 4.6 times
as fast. The products of eight rows take 53 ms widened and 65 ms with `F.linear` (2-core AMD EPYC
with AVX2, 2026-11-29). On a CPU with AVX-512, but without its bf16 instructions (Intel's servers
until 2022), torch emulates them. There widening is 2.6 times as fast: 512 rows take 177 ms widened
and 461 ms with `F.linear` or packed weights (2-core Intel Xeon, 2026-11-30).
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import few_rows

mkldnn = torch.ops.mkldnn
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
MAX_NARROW_ROWS = 8 if AVX512 else 3  # most rows for which F.linear is faster than widening
CHUNK_WEIGHTS = 2**20  # weights widened at a time: 4 MB of float32, which stay in the cache


def has_units(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies `dtype` in hardware. True for 32 and 64 bits."""
    if dtype.itemsize != 2:
        return True
    # A CPU with fp16 instructions has bf16 instructions too.
    if AVX512 and not torch.cpu._is_avx512_bf16_supported():
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    # In this order: a torch that was built without oneDNN, as on a Mac, has no such operators.
    return bool(torch.backends.mkldnn.is_available() and getattr(mkldnn, name)())


@cache
def packing_is_faster() -> bool:
    """Return whether packing makes products faster: its operators run, and bf16 has units.

    The operators are tried once.
    """
    x = torch.ones(32, 32, dtype=torch.bfloat16, device="cpu")
    try:
        mkldnn._linear_pointwise(x, mkldnn._reorder_linear_weight(x, None), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return has_units(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear`; many 16-bit rows on a CPU without 16-bit units are computed in 32 bits.

    Compiled steps in bf16 use the loop of `few_rows`. The result is rounded once, at the end.
    Otherwise, inputs with a gradient go to `F.linear`, because autograd would keep every widened
    chunk.
    """
    rows = x.flatten(0, -2)  # (R, K)
    compiling = torch.compiler.is_compiling() and x.is_cpu
    # The loop needs whole 32-bit words.
    if compiling and x.dtype == torch.bfloat16 and not x.shape[-1] % 2:
        y = few_rows.product(rows, weight)  # (R, N)
    # `has_units` comes last, because the compiler cannot trace it.
    elif not x.is_cpu or x.requires_grad or len(rows) <= MAX_NARROW_ROWS or has_units(x.dtype):
        return F.linear(x, weight, bias)
    else:
        wide = rows.float().T  # (K, R)
        chunks = weight.split(max(1, CHUNK_WEIGHTS // weight.shape[1]))
        # (W xᵀ)ᵀ: for 512 rows a prefill is 1.16 times as fast as with x Wᵀ.
        y = torch.cat([(chunk.float() @ wide).T for chunk in chunks], -1)  # (R, N)
    y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], -1)


class CPULinear(nn.Module):
    """A linear layer whose frozen bf16 weight is replaced by a packed one at its first use.

    Packing is the same reordering as in the compiler's freezing, and the results are bit-equal.
    `.weight` and `state_dict()` return copies. `.to()` and `copy.deepcopy` restore the plain
    weight. A plain weight is multiplied by `linear`, and in compiled steps by `few_rows`. It stays
    plain if it cannot be packed, or while `packs` is False.
    """

    packs = True

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.packed: Tensor | None = None
        self.weight = plain.weight
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        # Compiled steps have plain weights, and the packed operator has no gradient.
        if not torch.compiler.is_compiling() and not x.requires_grad and self.pack():
            return mkldnn._linear_pointwise(  # type: ignore[no-any-return]
                x, self.packed, self.bias, "none", [], ""
            )
        return linear(x, self.weight, self.bias)

    def pack(self) -> bool:
        """Pack a frozen bf16 weight on the CPU if this CPU can. Returns whether it is packed."""
        if self.packed is None and self.packs and packing_is_faster():
            weight = self.weight
            if weight.dtype == torch.bfloat16 and weight.is_cpu and not weight.requires_grad:
                self.packed = mkldnn._reorder_linear_weight(weight.data, None)
                del self.weight
        return self.packed is not None

    def unpack(self) -> None:
        """Restore the plain weight."""
        self._apply(lambda weight: weight)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.packed is not None:
            return self.packed.to_dense()
        return super().__getattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Called by .to(), .float() and .cuda(): a packed weight has a fixed dtype and device.
        packed = self.packed
        self.packed = None
        if packed is not None:
            self.weight = nn.Parameter(packed.to_dense(), requires_grad=False)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> Any:
        # A packed weight cannot be copied, so both copies are packed again at their next use.
        self.unpack()
        return super().__getstate__()  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.weight


def tied_head(embedding: Any, hidden: Tensor) -> Tensor:
    """Return the logits (…, V) of hidden states (…, D), with the embedding's current weight."""
    return linear(hidden, embedding.weight)


def pack(model: Any) -> None:
    """Replace the linear layers of a frozen 16-bit model on a CPU by `CPULinear`, in place.

    Any other model stays as it is.
    """
    if model.dtype.itemsize != 2 or model.device.type != "cpu":
        return
    if model.lm_head is None:  # tied
        model.lm_head = partial(tied_head, model.model.embed_tokens)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, CPULinear(module))
