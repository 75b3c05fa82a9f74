"""One model on several GPUs: every rank of torchrun holds a part of each layer (tensor parallel).

The heads of attention and the inner features of the MLP are divided among the ranks (Megatron-LM,
arXiv 1909.08053): q, k, v, gate and up by their outputs, o and down by their inputs. Of R ranks,
each one computes 1 / R of a layer, with 1 / R of the KV cache, and its share of the layer's sum.
torch.distributed.tensor.parallel adds up the shares after o and down. A rank reads its part of a
checkpoint as a smaller model, so every format of a layer works, but compiled steps do not. Norms,
the embedding and the LM head are whole on every rank, because W_a needs the last two.

Each rank runs the same program and gets the same results, because the shares are added in the same
order everywhere. This file does not depend on questions or printing.

    N outputs   K inputs
"""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ParameterError
from .order import GROUP

# Divided by their inputs. All other layers of a block are divided by their outputs.
BY_INPUTS = ("self_attn.o_proj", "mlp.down_proj")


def device_mesh(device: torch.device, parallel: Any) -> Any:
    """Return the DeviceMesh of the ranks that hold one model: all ranks, or `parallel` itself.

    Raises ValueError if this process is not one of several ranks that torchrun has started.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if parallel is not True:
        return parallel
    if "WORLD_SIZE" not in os.environ:
        raise ParameterError(
            "parallel",
            "found a process without a rank, "
            "expected: torchrun --nproc-per-node N -m minimas ask --parallel",
        )
    return init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))


class Part:
    """One rank's part of a checkpoint, for use in place of a `Folder` or a `GGUF`."""

    def __init__(self, source: Any, mesh: Any) -> None:
        """Divide the sizes in the config by the number of ranks.

        Raises ValueError if a size is not a multiple of it.
        """
        self.source = source
        self.rank = mesh.get_local_rank()
        self.ranks = mesh.size()
        self.config = source.config
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            size = getattr(self.config, name)
            if size % self.ranks:
                raise ParameterError(
                    "parallel", f"found {self.ranks} ranks, expected a divisor of {name}, {size}"
                )
            self.config = replace(self.config, **{name: size // self.ranks})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)  # path, shapes, files, no_tokenizer

    def of(self, key: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of the tensor `key`, (N, K), (N,) or groups (N, K / 32)."""
        if "_proj." not in key:
            return tensor
        by_inputs = any(name in key for name in BY_INPUTS)
        part = tensor.chunk(self.ranks, int(by_inputs))[self.rank]
        return part.contiguous()  # type: ignore[no-any-return]

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return this rank's part of the tensor `key` in `dtype`, on the CPU."""
        return self.of(key, self.source.read(key, dtype))

    def low_bits(self, key: str) -> str:
        """Return the low-bit format of a matrix, or "" if one of q4's groups would be cut."""
        form: str = self.source.low_bits(key)
        N, K = self.source.shapes[key] if form == "q4" else (0, 0)
        return "" if N % self.ranks or K // GROUP % self.ranks else form

    def blocks(self, key: str) -> Any:
        """Return this rank's part of a tensor's blocks."""
        return [self.of(key, part) for part in self.source.blocks(key)]


def add_shares(model: Any, mesh: Any) -> None:
    """Make the layers that are divided by their inputs add up all ranks' shares, in place."""
    from torch.distributed.tensor import Partial, Replicate
    from torch.distributed.tensor.parallel import PrepareModuleOutput, parallelize_module

    add_up = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())
    parallelize_module(model, mesh, {f"model.layers.*.{name}": add_up for name in BY_INPUTS})
