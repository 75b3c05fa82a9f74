"""Who is attended to: the weights of a prompt on every slot, layer by layer.

They are computed beside the forward pass from the cached keys, by a hook on the attention modules.
Does not know: agents, arms, which slot is whose.

    T new positions   S slots   H query heads   K key-value heads   d head size
"""

from typing import Any

import torch
from torch import Tensor

from minimas import KVCache, Qwen3
from minimas.core.model import Attention, prefill
from minimas.core.rotary import rotate


def attention_weights(model: Qwen3, ids: list[int], cache: KVCache) -> Tensor:
    """Return how much a prompt attends to every slot: (layers, K, S), S slots of cache and prompt.

    `ids` is prefilled into a copy of `cache`, which has one row. The weights are means over the
    prompt's tokens and over the query heads that share a key-value head; they sum to 1 over S.
    """
    weights: list[Tensor] = []

    def watch(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        x, positions, used, layer = args
        B, T, _ = x.shape
        q = module.q_norm(module.q_proj(x).view(B, T, -1, module.head_dim)).transpose(1, 2)
        q = rotate(q, positions.cos, positions.sin)  # (1, H, T, d)
        keys = used.keys[layer][:, :, : positions.total]  # (1, K, S, d)
        q = q.reshape(1, keys.shape[1], -1, module.head_dim)  # (1, K, H/K · T, d)
        scores = (q @ keys.transpose(-1, -2)).float() / module.head_dim**0.5  # (1, K, H/K · T, S)
        if positions.mask is not None:
            scores = scores.masked_fill(~positions.mask, -torch.inf)
        weights.append(scores.softmax(-1).mean((0, 2)))  # (K, S)

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_hook(watch) for layer in layers]
    try:
        prefill(model, [ids], cache.fork(), chunk_tokens=len(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights)
