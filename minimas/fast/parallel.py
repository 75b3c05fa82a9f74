"""One model on several GPUs: every rank of torchrun holds a part of each layer (tensor parallel).

The heads of attention and the inner features of the MLP are divided among N ranks (Megatron-LM,
arXiv 1909.08053): q, k, v, gate and up by their outputs, o and down by their inputs. So a rank
computes an N-th of a layer, with an N-th of the KV cache, and its share of the layer's sum. Shares
are added up after o and down by torch.distributed.tensor.parallel. A rank reads its part of a
checkpoint as a smaller model, so every format that a layer can have works, except compiled steps.
Norms, the embedding and the LM head are whole on every rank: W_a needs the last two.

Each rank runs the same program. What it computes is the same on all of them, because the shares are
added in one order. Does not know: questions, who prints.

    N outputs   K inputs
"""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ParameterError
from .order import GROUP

BY_INPUTS = ("o_proj", "down_proj")  # of the layers of a block; the others by their outputs


def join(device: torch.device, parallel: Any) -> Any:
    """Return the DeviceMesh of the ranks that hold one model: all if `parallel` is True, else it.

    Raises ValueError if this process is not one of several ranks that torchrun has started.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if parallel is not True:
        return parallel
    if "RANK" not in os.environ:
        expected = "expected: torchrun --nproc-per-node N -m minimas ask --parallel"
        raise ParameterError("parallel", f"found a process without a rank, {expected}")
    return init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))


class Part:
    """What one rank reads of a checkpoint, in place of a `Folder` or a `GGUF`."""

    def __init__(self, source: Any, mesh: Any) -> None:
        """Raises ValueError if heads or features do not divide by the number of ranks."""
        self.source, self.rank, self.ranks = source, mesh.get_local_rank(), mesh.size()
        self.config = source.config
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            size = getattr(self.config, name)
            if size % self.ranks:
                problem = f"found {self.ranks} ranks, expected a divisor of {name}, {size}"
                raise ParameterError("parallel", problem)
            self.config = replace(self.config, **{name: size // self.ranks})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)  # path, shapes, files, no_tokenizer

    def of(self, key: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of the tensor `key`, (N, K), (N,) or groups (N, K / 32)."""
        layer = key.split(".")[-2]
        if not layer.endswith("_proj"):
            return tensor
        part: Tensor = tensor.chunk(self.ranks, int(layer in BY_INPUTS))[self.rank]
        return part.contiguous()

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Read this rank's part of a tensor onto the CPU."""
        return self.of(key, self.source.read(key, dtype))

    def kept_as(self, key: str) -> str:
        """Return the format of the file that a matrix keeps; "" if a group would be cut."""
        kept: str = self.source.kept_as(key)
        N, K = self.source.shapes[key] if kept == "q4" else (0, 0)
        cut = N % self.ranks or K // GROUP % self.ranks
        return "" if cut else kept

    def blocks(self, key: str) -> Any:
        """Return this rank's part of a tensor's blocks."""
        return [self.of(key, part) for part in self.source.blocks(key)]


def add_shares(model: Any, mesh: Any) -> None:
    """Let the layers that are divided by their inputs add up the shares of all ranks, in place."""
    from torch.distributed.tensor import Partial, Replicate
    from torch.distributed.tensor.parallel import PrepareModuleOutput, parallelize_module

    add_up = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())
    parallelize_module(model, mesh, {f"model.layers.*.*.{name}": add_up for name in BY_INPUTS})
