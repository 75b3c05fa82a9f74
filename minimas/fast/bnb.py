"""The formats nf4 and int8, with the kernels of bitsandbytes, on CUDA and CPU.

They save memory. For speed, use q4 or q8. This file does not depend on models or other formats.
"""

import logging
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def require(found: str, device: torch.device) -> None:
    """Check that bitsandbytes is installed, new enough and built for `device`.

    Raises ImportError with a text that begins with `found`.
    """
    try:
        package = _package()
    except ImportError as error:
        raise ImportError(
            f"{found} without bitsandbytes ({error}), expected it: pip install bitsandbytes"
        ) from error
    found += f" on {device} with bitsandbytes {package.__version__}"
    if tuple(map(int, package.__version__.split(".")[:2])) < (0, 46):
        raise ImportError(f"{found}, expected 0.46 or newer: pip install -U bitsandbytes")
    # If the build failed to load, each of its attributes is a function, so compare with True.
    if device.type == "cuda" and package.cextension.lib.compiled_with_cuda is not True:
        raise ImportError(
            f"{found} built without CUDA, expected a build for it: pip install -U bitsandbytes"
        )


def layer(name: str, weight: Tensor, bias: Tensor | None) -> Any:
    """Return the layer of format "nf4" or "int8" for a matrix (N, K), quantized on its device."""
    bnb = _package().nn
    N, K = weight.shape
    if name == "nf4":
        # float16 is kept, because GPUs without bf16 load models in it.
        dtype = weight.dtype if weight.dtype.itemsize == 2 else torch.bfloat16
        made = bnb.Linear4bit(K, N, False, dtype, quant_type="nf4", device="meta")
        stored = bnb.Params4bit(weight.to(dtype), quant_type="nf4")
    else:
        made = bnb.Linear8bitLt(K, N, False, has_fp16_weights=False, device="meta")
        stored = bnb.Int8Params(weight.half(), requires_grad=False)
    made.weight = stored.to(weight.device)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    made.eval()(weight.new_zeros(1, K))  # the first call packs the weight
    # The scales are saved too: two matrices may have the same values. The method of bitsandbytes
    # rounds them again each time, but a fingerprint must not change.
    if name == "nf4":
        quant = made.weight.quant_state
        made.register_buffer("scales", quant.absmax)
        # The scales have scales too, but not on every CPU.
        made.register_buffer("scales_of_scales", getattr(quant.state2, "absmax", None))
    else:
        made.register_buffer("scales", made.state.SCB)
    made._save_to_state_dict = partial(nn.Module._save_to_state_dict, made)
    return made


def _package() -> Any:
    """Return bitsandbytes, and show only errors from its log.

    At import it warns of kernels that it does not find. At every int8 product it warns that
    activations are converted to fp16, which is part of the format.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return import_module("bitsandbytes")
