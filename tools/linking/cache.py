"""A KV cache for autograd.

`KVCache.append` writes into a store that earlier attention has saved for its backward pass, which
autograd does not allow. Here every append makes a new store. The inherited methods that copy, cut
or join are differentiable already, and keep the class. This module does not depend on what is
trained.

    B rows   K key-value heads   T new positions   S slots   d head size
"""

import torch.nn.functional as F
from torch import Tensor

from minimas import KVCache
from minimas.core.cache import Positions


class GradCache(KVCache):
    """A KV cache through which gradients flow.

    It copies all slots at every append, so it is only for rollouts that need gradients.
    """

    def append(
        self, layer: int, keys: Tensor, values: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, d) of one layer. Returns all slots (B, K, S, d)."""
        total = positions.total
        for stores, new in ((self.keys, keys), (self.values, values)):
            held = stores[layer][:, :, :total]
            # A copy even if nothing is added, because the old store must stay as it is.
            store = F.pad(held, (0, 0, 0, total - held.shape[2])).clone()
            store.transpose(1, 2)[positions.where] = new.transpose(1, 2)  # (B, T, K, d)
            stores[layer] = store
        return self.keys[layer], self.values[layer]
