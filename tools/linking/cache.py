"""A KV cache for autograd.

`KVCache.append` writes into a store that earlier attention has saved for its backward pass, which
autograd refuses. Here every append makes a new store. The methods that copy, cut or join are
differentiable as they are, and keep the class. Does not know: what is trained.

    B rows   K key-value heads   T new positions   S slots   d head size
"""

import torch.nn.functional as F
from torch import Tensor

from minimas import KVCache
from minimas.core.cache import Positions


class GradCache(KVCache):
    """A KV cache through which gradients flow; see `KVCache`.

    It copies all slots at every append. Use it only where gradients are needed.
    """

    def append(
        self, layer: int, keys: Tensor, values: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, d) of one layer; returns all slots (B, K, S, d)."""
        total = positions.total
        for stores, new in ((self.keys, keys), (self.values, values)):
            held = stores[layer][:, :, :total]
            # A copy, also if nothing is added: the old store must stay as it is.
            store = F.pad(held, (0, 0, 0, total - held.shape[2])).clone()
            store.transpose(1, 2)[positions.where] = new.transpose(1, 2)  # (B, T, K, d)
            stores[layer] = store
        return self.keys[layer], self.values[layer]
