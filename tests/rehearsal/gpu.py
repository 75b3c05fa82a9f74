"""A simulated GPU: fake tensors of a device, and a record of what the host waits for."""

import contextlib
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from minimas import Qwen3
from minimas.core.checkpoint import fill
from minimas.core.config import Config
from minimas.fast.quantize import complete, replacement

CUDA, MPS = torch.device("cuda:0"), torch.device("mps:0")
# hidden_size, intermediate_size, attention heads of Qwen3-0.6B, 4B and 8B; the rest is the same.
SHAPES = {"0.6B": (1024, 3072, 16), "4B": (2560, 9728, 32), "8B": (4096, 12288, 32)}
VALUE = 7  # the result of every read of a number; as a token, it does not end a text
READS = {  # functions that read a tensor's values on the host, and their results here
    "item": lambda x: VALUE,
    "tolist": lambda x: nested(x.shape, x.dtype == torch.bool or VALUE),  # all values are true
    "__bool__": lambda x: x.dtype == torch.bool,  # all values are finite, with no error code
    "__int__": lambda x: VALUE,
    "__float__": lambda x: float(VALUE),
}
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")  # kernels need equal dtypes, fake tensors do not
KERNELS = {  # the dtypes of the tensors that CUDA's kernels take without a conversion
    "_weight_int4pack_mm": [torch.bfloat16, torch.int32, torch.bfloat16],
    "_weight_int8pack_mm": [torch.bfloat16, torch.int8, torch.float32],
}
BY_HAND = ("__getitem__", "__setitem__", "contiguous", "copy_")


def qwen3(size: str, layers: int = 2) -> Config:
    """Return the config of Qwen3 in one of its sizes, with fewer layers."""
    hidden, intermediate, heads = SHAPES[size]
    return Config(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=size != "8B",
        dtype="bfloat16",
    )


def has_kernel(
    name: str, key: str, ask: Any = torch._C._dispatch_has_kernel_for_dispatch_key
) -> bool:
    """Return whether torch has a kernel.

    A build for CPUs has none for CUDA, and a build for CUDA does.
    """
    return name == "aten::_weight_int8pack_mm" or ask(name, key)


class FakeSource:
    """Tensors without values, in place of a checkpoint that `fill` reads."""

    def __init__(self, model: Qwen3) -> None:
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shapes[key], dtype=dtype)

    def low_bits(self, key: str) -> str:
        """Nothing is quantized."""
        return ""


class FakeGPU:
    """A context in which tensors of `device` can be made. `waits` names what the host waited for.

    `peak` is the largest number of bytes that were allocated on the GPU at the same time, `copied`
    the number of bytes that crossed between the host and the GPU, and `recordings` the number of
    graphs that were recorded.
    """

    def __init__(self, device: torch.device = CUDA) -> None:
        self.device, self.waits = device, list[str]()
        self.allocated = self.peak = self.copied = self.recordings = 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.contexts: list[contextlib.ExitStack] = []

    def __enter__(self) -> "FakeGPU":
        stack = contextlib.ExitStack()
        for name, value in {
            "cuda.get_device_capability": lambda device: (9, 0),
            "cuda.make_graphed_callables": self._record,
            "cuda.device": lambda device: contextlib.nullcontext(),
            "cuda.synchronize": lambda device: None,
            "mps.synchronize": lambda: None,
            "_C._dispatch_has_kernel_for_dispatch_key": has_kernel,
        }.items():
            stack.enter_context(mock.patch(f"torch.{name}", value))
        # A fake tensor's own `tolist` reads item by item.
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", Tensor.tolist))
        stack.enter_context(self.fake)
        stack.enter_context(Watch(self))
        stack.enter_context(ByHand(self))
        self.contexts.append(stack)
        self.waits.clear()
        self.copied = self.recordings = 0
        return self

    def __exit__(self, *error: Any) -> None:
        self.contexts.pop().close()

    def load(
        self, config: Config, quantize: str | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Qwen3:
        """Return a model on the GPU, in 16 bits or quantized, as `minimas.load` makes it."""
        with torch.device("meta"):
            model = Qwen3(config, name="fake")
        source: Any = FakeSource(model)
        replace = partial(replacement, source, self.device, dtype, quantize)
        fill(model, source, self.device, dtype, replace)
        complete(model, quantize)
        return model

    def allocate(self, x: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = x.untyped_storage()
        size = storage.nbytes()
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._free, size)

    def _record(self, step: Any, sample: Any) -> Any:
        self.recordings += 1
        return step

    def _free(self, size: int) -> None:
        self.allocated -= size


class Watch(TorchDispatchMode):
    """Watches every operator for blocking copies between devices, and counts what is allocated."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name, dtypes = func.overloadpacket.__name__, [x.dtype for x in given]
        if dtypes != KERNELS.get(name, dtypes) or (name in PRODUCTS and len(set(dtypes)) > 1):
            raise RuntimeError(f"{func}: wrong dtypes, {dtypes}")
        found = func(*args, **kwargs)
        storages = {id(x.untyped_storage()) for x in given}
        for x in tree_leaves(found):
            if not isinstance(x, Tensor):
                continue
            on_mps = {MPS.type} & {other.device.type for other in (x, *given)}
            if on_mps and torch.float64 in {x.dtype, *dtypes}:  # not even on the way to the CPU
                raise TypeError(f"{func}: found float64 on {MPS}, which does not have it")
            moved = any(x.device != other.device for other in given) and "copy" in str(func)
            if moved:
                self.gpu.copied += x.nbytes
            if moved and not kwargs.get("non_blocking", False):
                self.gpu.waits.append(f"{given[0].device} to {x.device}")
            if x.device == self.gpu.device and id(x.untyped_storage()) not in storages:
                self.gpu.allocate(x)
        return found


class ByHand(TorchFunctionMode):
    """Does what a CPU build of torch refuses for GPU tensors, and counts values that are read.

    Indexing asks for the device itself, even without values, so it is done with tensors on "meta".
    Attention would be computed by a formula for CPUs, which keeps all scores in memory.
    """

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, self.gpu.device
        on_gpu = bool(args) and isinstance(args[0], Tensor) and args[0].device == device
        name = getattr(func, "__name__", "")
        if name in READS:
            self.gpu.waits.append(name if on_gpu else f"{name} on the host")
            return READS[name](args[0])
        if on_gpu and func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if on_gpu and name == "__invert__":  # asks for the device itself, too
            return args[0].logical_not()
        if on_gpu and name in BY_HAND:
            own = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
            for x in own:
                index = x.dtype in (torch.int64, torch.bool) and name != "copy_"
                if x.device != device and not index:
                    raise RuntimeError(f"{name}: a tensor on {x.device} for one on {device}")
                if x.device != device:
                    self.gpu.waits.append(f"index on {x.device}")
            found = func(*tree_map_only(Tensor, on_meta, args), **kwargs)
            if found is None:
                return None
            if not own and (name == "__getitem__" or args[0].is_contiguous()):  # a view
                offset = args[0].storage_offset() + found.storage_offset()
                return args[0].as_strided(found.shape, found.stride(), offset)
            return torch.empty_like(found, device=device)
        return func(*args, **kwargs)


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Return a tensor with the shape of a fused kernel's result, (B, K, G · T, d).

    A mask is converted to the dtype of q meanwhile.
    """
    devices, dtypes = ({getattr(x, what) for x in (q, k, v)} for what in ("device", "dtype"))
    if len(devices) > 1 or len(dtypes) > 1 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise RuntimeError(f"attention: {q.shape}, {k.shape}, {v.shape} of {dtypes} on {devices}")
    if attn_mask is not None:
        if attn_mask.device != q.device or attn_mask.dtype not in (torch.bool, q.dtype):
            raise RuntimeError(f"attention: a mask of {attn_mask.dtype} on {attn_mask.device}")
        attn_mask.expand(*q.shape[:-1], k.shape[2])  # raises for another shape
        attn_mask = attn_mask.to(q.dtype)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def nested(shape: Sequence[int], value: int) -> Any:
    """Return the lists that `tolist` returns for a tensor of this shape with one value."""
    return [nested(shape[1:], value) for _ in range(shape[0])] if shape else value


def on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
