"""The formats nf4 and int8, by the kernels of bitsandbytes, on CUDA and CPU.

What they gain is memory; for speed there are q4 and q8. Does not know: models, q4, q8.
"""

import logging
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def require(found: str, device: torch.device) -> None:
    """Check that bitsandbytes is installed, new enough and built for `device`.

    Raises ImportError beginning with `found`.
    """
    try:
        bitsandbytes: Any = import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            f"{found} without bitsandbytes, expected it: pip install 'minimas[bnb]'"
        ) from error
    version = tuple(int(part) for part in bitsandbytes.__version__.split(".")[:2])
    if version < (0, 46):
        raise ImportError(
            f"{found} with bitsandbytes {bitsandbytes.__version__}, expected 0.46 or newer"
        )
    if (
        device.type == "cuda"
        and getattr(bitsandbytes.cextension.lib, "compiled_with_cuda", False) is not True
    ):
        raise ImportError(
            f"{found} on {device} with bitsandbytes {bitsandbytes.__version__} built without CUDA, "
            "expected a build for it: pip install -U bitsandbytes"
        )


def layer(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return the layer "nf4" or "int8" of a matrix (N, K), quantized on the matrix's device."""
    bnb: Any = import_module("bitsandbytes.nn")
    (N, K), options = weight.shape, {"requires_grad": False}
    if name == "nf4":
        made = bnb.Linear4bit(K, N, bias is not None, torch.bfloat16, True, "nf4", device="meta")
        how = {"compress_statistics": True, "quant_type": "nf4"}
        made.weight = bnb.Params4bit(weight.bfloat16(), **options, **how).to(weight.device)
    else:
        made = bnb.Linear8bitLt(K, N, bias is not None, has_fp16_weights=False, device="meta")
        # It warns at every call that activations are converted to fp16, as the format does.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        made.weight = bnb.Int8Params(weight.half(), **options, has_fp16_weights=False).to(
            weight.device
        )
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    made.eval()(weight.new_zeros(1, K))  # packs at its first call
    # Its own way rounds the scales anew each time, and a fingerprint must not change.
    made._save_to_state_dict = lambda state, prefix, _: state.update(
        {prefix + "weight": made.weight.data}
    )
    return made  # type: ignore[no-any-return]
