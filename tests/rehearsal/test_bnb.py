"""The formats of bitsandbytes on a GPU without values, as far as they can be rehearsed.

The forward passes of its layers, its functions, and the shapes and dtypes that its operators
declare are run. Its kernels and the classes of its weights are not: a tensor subclass cannot be
made from a fake tensor, so two functions that quantize like the classes replace them. Whether a
build of the package has kernels for a GPU can only be seen on a GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minimas import Aligner, think
from minimas.core.model import prefill

from .gpu import CUDA, FakeGPU, qwen3

bitsandbytes = pytest.importorskip("bitsandbytes")


def stored(quantize: Any) -> Any:
    """Return a function that makes parameters.

    They are quantized when they are moved, but not to "meta".
    """

    def make(data: Tensor, requires_grad: bool = False, **settings: Any) -> Any:
        made: Any = nn.Parameter(data, requires_grad=False)
        made.quant_state = made.CB = made.SCB = None
        made.to = lambda device: quantize(data, **settings)
        return made

    return make


def four_bits(data: Tensor, quant_type: str) -> Any:
    """Return what `Params4bit.to` returns."""
    values, state = bitsandbytes.functional.quantize_4bit(
        data, blocksize=64, compress_statistics=True, quant_type=quant_type
    )
    made: Any = nn.Parameter(values, requires_grad=False)
    made.quant_state = state
    return made


def eight_bits(data: Tensor) -> Any:
    """Return what `Int8Params.to` returns for a GPU tensor.

    It does not quantize it. The first call does.
    """
    made: Any = nn.Parameter(data, requires_grad=False)
    made.CB = made.SCB = None
    return made


@pytest.fixture(autouse=True)
def fake_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the classes of weights by functions.

    The package's tables of values must not stay fake.
    """
    for place in (bitsandbytes.nn, bitsandbytes.nn.modules):
        monkeypatch.setattr(place, "Params4bit", stored(four_bits))
        monkeypatch.setattr(place, "Int8Params", stored(eight_bits))
    monkeypatch.setattr(bitsandbytes.functional, "name2qmap", {})
    yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("quantize", "bits"), [("nf4", 4.127), ("int8", 8)])
def test_a_latent_step_waits_for_nothing(quantize: str, bits: float, dtype: torch.dtype) -> None:
    """Weights have the size that `info` says, nothing is read, and states keep their dtype."""
    gpu = FakeGPU()
    with gpu:
        config = qwen3("4B", layers=1)
        model = gpu.load(config, quantize, dtype)
        matrices = [layer for name, layer in model.named_modules() if name.endswith("_proj")]
        plain = gpu.allocated - 2 * config.vocab_size * config.hidden_size
        numbers = sum(layer.in_features * layer.out_features for layer in matrices)
        assert plain == pytest.approx(numbers * bits / 8, rel=0.01)
        size = config.hidden_size
        align = Aligner(matrix=torch.empty(size, size, device=CUDA), norm=1.0)
        gpu.waits.clear()
        cache = model.new_cache(3)
        hidden = prefill(model, [[0] * 5, [0] * 17, [0] * 9], cache)
        prompts = list(gpu.waits)
        thoughts, hidden = think(model, align, hidden, cache, 2)
        assert (thoughts.device, thoughts.dtype, hidden.dtype) == (CUDA, dtype, dtype)
        assert gpu.waits == prompts == ["cpu to cuda:0"], "only the prompt's ids are copied"
        for layer in matrices:
            assert layer.weight.dtype in (torch.uint8, torch.int8)
            # In bf16 it was emulated on the GPUs for which models are loaded in float16.
            assert getattr(layer, "compute_dtype", dtype) == dtype
