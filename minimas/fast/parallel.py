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
from torch import Tensor, distributed

from ..core.errors import ParameterError

DIVIDED = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0}  # dimension of W
DIVIDED |= {"o_proj": 1, "down_proj": 1}
COMMAND = "torchrun --nproc-per-node N -m minimas ask --parallel"


def join(device: torch.device, parallel: Any) -> Any:
    """Return the DeviceMesh of the ranks that hold one model: `parallel`, or all if it is True.

    Raises ValueError if this process is not one of several ranks that torchrun has started.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if parallel is not True:
        return parallel
    if not distributed.is_initialized() and "RANK" not in os.environ:
        raise ParameterError("parallel", f"found a process without a rank, expected {COMMAND}")
    ranks = int(os.environ.get("WORLD_SIZE", 0)) or distributed.get_world_size()
    return init_device_mesh(device.type, (ranks,))


class Part:
    """What one rank reads of a checkpoint, in place of a `Folder` or a `GGUF`."""

    def __init__(self, source: Any, mesh: Any) -> None:
        """Raises ValueError if heads or features do not divide by the number of ranks."""
        self.source, self.rank, self.ranks = source, mesh.get_local_rank(), mesh.size()
        smaller = {}
        for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            size = getattr(source.config, field)
            if size % self.ranks:
                problem = f"found {self.ranks} ranks, expected a divisor of {field}, {size}"
                raise ParameterError("parallel", problem)
            smaller[field] = size // self.ranks
        self.config = replace(source.config, **smaller)
        whole = {key: torch.empty(shape, device="meta") for key, shape in source.shapes.items()}
        self.shapes = {key: tuple(self.of(key, tensor).shape) for key, tensor in whole.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)  # path, files, no_tokenizer

    def of(self, key: str, tensor: Tensor) -> Tensor:
        """Return this rank's part of the tensor `key`, (N, K), (N,) or groups (N, K / 32)."""
        dim = DIVIDED.get(key.split(".")[-2])
        return tensor if dim is None else tensor.chunk(self.ranks, dim)[self.rank].contiguous()

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Read this rank's part of a tensor onto the CPU."""
        return self.of(key, self.source.read(key, dtype))

    def blocks(self, key: str) -> Any:
        """Return this rank's part of a tensor's blocks; None if there are none, or they are cut."""
        blocks = self.source.blocks(key)
        cut = blocks and DIVIDED[key.split(".")[-2]] and blocks[1].shape[1] % self.ranks
        return None if blocks is None or cut else tuple(self.of(key, part) for part in blocks)


def add_shares(model: Any, mesh: Any) -> None:
    """Let the layers that are divided by their inputs add up the shares of all ranks, in place."""
    from torch.distributed.tensor import Partial, Replicate
    from torch.distributed.tensor.parallel import PrepareModuleOutput, parallelize_module

    add_up = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())
    names = ("self_attn.o_proj", "mlp.down_proj")
    parallelize_module(model, mesh, {f"model.layers.*.{name}": add_up for name in names})
