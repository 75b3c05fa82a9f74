"""Compute the attention weights of a prompt on every slot, layer by layer.

Forward hooks on the attention modules compute them from the queries and the cached keys. This
module does not use agents or arms.

    T new positions   S slots   H query heads   K key-value heads   d head size
"""

from typing import Any

import torch
from torch import Tensor

from minimas import KVCache, Qwen3
from minimas.core.model import Attention, prefill
from minimas.core.rotary import rotate


def attention_weights(model: Qwen3, ids: list[int], cache: KVCache) -> Tensor:
    """Return the attention of a prompt on every slot of the cache and the prompt, (layers, K, S).

    `ids` is prefilled into a copy of `cache`, which has one row. The weights are means over the
    tokens of the prompt and over the query heads that share a key-value head. They sum to 1 over S.
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
