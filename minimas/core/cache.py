"""KVCache: an agent's working memory, the keys and values of every layer (paper, section 3.2).

The invariant is *slot = position*: row b's slots 0 … lengths[b]-1 are filled, and the key in slot p was rotated for
position p. Ragged batches are padded on the right: no query sees what lies beyond lengths[b] (one at position p sees
slots ≤ p), and the next append overwrites it. So there is no padding mask, a row does not depend on its neighbours, and
whatever moves a slot must rotate its key. A memory is a value: only `append` and `advance`, which the model calls,
change it. Does not know: models, tokens, agents.  B rows, K key-value heads, S slots, T new slots, d head size.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .rotary import move


class KVCache:
    """Keys and values (B, K, S, d) of every layer; `lengths` (B,) int64 on the CPU counts each row's filled slots."""

    def __init__(
        self,
        config: Config,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """An empty memory; room is taken as it is needed."""
        if batch_size < 1:
            raise ValueError(f"batch_size: found {batch_size}, expected 1 or more")
        self.config = config
        self.owner: Any = None  # the model that writes here; it has a name and a fingerprint()
        self.lengths = torch.zeros(
            batch_size, dtype=torch.int64
        )  # on the CPU: reading it never waits for a GPU
        empty = torch.zeros(
            batch_size, config.num_key_value_heads, 0, config.head_dim, dtype=dtype, device=device
        )
        self.dtype, self.device = dtype, empty.device
        self.keys, self.values = (
            [empty] * config.num_hidden_layers,
            [empty] * config.num_hidden_layers,
        )

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot of one row, keys and values of all layers."""
        return (
            2 * len(self.keys) * self.keys[0].shape[1] * self.keys[0].shape[3] * self.dtype.itemsize
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all filled slots; room taken in advance is not counted."""
        return int(self.lengths.sum()) * self.slot_nbytes

    def next_positions(self, rows: int, new: int) -> Tensor:
        """Positions of the next slots, (B, T), or (1, T) for rows of one length; ValueError if rows is not B."""
        if rows != len(self.lengths):
            raise ValueError(
                f"inputs: found {rows} rows, expected {len(self.lengths)} as in the memory"
            )
        starts = self.lengths if bool((self.lengths != self.lengths[0]).any()) else self.lengths[:1]
        return (starts[:, None] + torch.arange(new)).to(self.device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, K, T, d) behind each row's filled slots and return the layer's (B, K, S, d).

        Keys come rotated for their positions. Nothing counts as filled before `advance`, so that a forward pass that
        fails half-way leaves the memory as it was.
        """
        new = keys.shape[2]
        start, total = int(self.lengths.min()), int(self.lengths.max()) + new
        for stores, chunk in ((self.keys, keys), (self.values, values)):
            store = stores[layer] = with_room(stores[layer], total, heads=chunk.shape[1])
            if start + new == total:
                store[:, :, start:total] = chunk
            else:  # ragged rows: each has its own first free slot
                slots = (self.lengths[:, None] + torch.arange(new)).to(store.device)  # (B, T)
                rows = torch.arange(len(slots), device=store.device)[:, None]  # (B, 1)
                store[rows, :, slots] = chunk.transpose(1, 2)  # indexed as (B, T, K, d)
        return self.keys[layer][:, :, :total], self.values[layer][:, :, :total]

    def advance(self, lengths: Tensor, most: int) -> None:
        """Count `lengths` (B,) of the `most` appended slots as filled; raises ValueError for any other number."""
        if (
            lengths.shape != self.lengths.shape
            or int(lengths.min()) < 0
            or int(lengths.max()) > most
        ):
            raise ValueError(
                f"lengths: found {lengths.tolist()}, expected {len(self.lengths)} numbers, 0 … {most}"
            )
        self.lengths = self.lengths + lengths.to("cpu", torch.int64)

    def sign(self, model: Any) -> None:
        """Note which model writes here; raises ValueError if another one has: these keys mean nothing to it."""
        other = self.owner not in (None, model) and self.owner.fingerprint() != model.fingerprint()
        if other or (model is not None and model.dtype != self.dtype):
            found = f"a memory in {self.dtype} of model {getattr(self.owner, 'name', None)!r}"
            raise ValueError(
                f"cache: found {found}, expected {model.dtype} and {model.name!r}, with the same weights"
            )
        self.owner = model

    def fork(self) -> "KVCache":
        """A copy, so that two continuations do not disturb each other."""
        return self.select(range(len(self.lengths)))

    def select(self, rows: Tensor | Sequence[int]) -> "KVCache":
        """A copy of `rows`, an index tensor or a list, with repeats; raises IndexError for one that does not exist."""
        index = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows)).cpu()
        there = (
            index.ndim == 1
            and index.dtype != torch.bool
            and set(index.tolist()) <= set(range(len(self.lengths)))
        )
        if not there or len(index) == 0:
            raise IndexError(
                f"rows: found {index.tolist()}, expected a list of indices below {len(self.lengths)}"
            )
        filled, where = int(self.lengths[index].max()), index.to(self.device)
        return self._with(
            self.lengths[index], lambda store: store[:, :, :filled].index_select(0, where)
        )

    def truncate(self, length: int | Tensor) -> "KVCache":
        """The first `length` slots of every row (an int, or one per row (B,)); shorter rows stay as they are."""
        return self._slice(length, from_end=False)

    def keep_last(self, length: int | Tensor) -> "KVCache":
        """The last `length` slots of every row (an int, or one per row (B,)), moved to slot 0, keys re-rotated."""
        return self._slice(length, from_end=True)

    @classmethod
    def concat(cls, caches: Sequence["KVCache"]) -> "KVCache":
        """Join memories of equal batch size row by row, each one's keys rotated by the length of those before it.

        Equals one forward in which no part sees another (a block mask), not a sequential one. Raises ValueError for
        no caches, or caches of different models, dtypes, devices or batch sizes.
        """
        kinds = {(c.config, len(c.lengths), c.dtype, c.device) for c in caches}
        if len(kinds) != 1:
            found = [f"{n} rows of {dtype} on {device}" for _, n, dtype, device in kinds]
            raise ValueError(
                f"caches: found {found}, expected memories of one model, number of rows, dtype and device"
            )
        joined = cls(*kinds.pop())
        for cache in caches:
            width = int(cache.lengths.max())
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                moved = move(
                    keys[:, :, :width], joined.lengths.to(keys.device), joined.config.rope_theta
                )
                joined.append(layer, moved, values[:, :, :width])
            joined.advance(cache.lengths, most=width)
            joined.sign(cache.owner or joined.owner)
        return joined

    def _slice(self, length: int | Tensor, from_end: bool) -> "KVCache":
        lengths = torch.minimum(self.lengths, torch.as_tensor(length, dtype=torch.int64).cpu())
        if int(lengths.min()) < 0:
            raise ValueError(f"length: found {int(lengths.min())}, expected 0 or more")
        starts = self.lengths - lengths if from_end else torch.zeros_like(lengths)
        slots = (starts[:, None] + torch.arange(int(lengths.max()))).clamp(
            max=int(self.lengths.max()) - 1
        )  # (B, S)
        index = slots.to(self.device)[:, None, :, None]  # (B, 1, S, 1)
        new = self._with(
            lengths, lambda s: s.gather(2, index.expand(-1, s.shape[1], -1, s.shape[3]))
        )  # (B, K, S, d)
        if bool(starts.any()):
            new.keys = [
                move(keys, -starts.to(keys.device), self.config.rope_theta) for keys in new.keys
            ]
        return new

    def _with(self, lengths: Tensor, take: Callable[[Tensor], Tensor]) -> "KVCache":
        new = copy.copy(self)
        new.lengths = lengths
        new.keys, new.values = (
            [take(keys) for keys in self.keys],
            [take(values) for values in self.values],
        )
        return new

    def save(self, path: str | Path) -> None:
        """Write the filled slots to a file; `files.write_memory` says how, and what it raises."""
        from .files import write_memory  # here, so that this room works without that one

        write_memory(path, self)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "KVCache":
        """Read a memory saved by `save` for `model`; `files.read_memory` says how, and what it raises."""
        from .files import read_memory

        lengths, keys, values = read_memory(path, model)
        cache = cls(model.config, len(lengths), model.dtype, model.device)
        cache.owner, cache.lengths, cache.keys, cache.values = model, lengths, keys, values
        return cache


def with_room(store: Tensor, slots: int, heads: int) -> Tensor:
    """`store`, or a copy with room for `slots`; the first append brings the number of heads (of a shard: fewer)."""
    B, _, room, d = store.shape
    if (
        slots < room
    ):  # one to spare: filled to the brim it would be contiguous, another shape to a compiler
        return store
    # Zeros, not empty: a masked slot still enters attention as 0 × value, and 0 × NaN is NaN.
    grown = store.new_zeros(B, heads, max(slots + 1, room + room // 2 + 64), d)
    if room:
        grown[:, :, :room] = store
    return grown
