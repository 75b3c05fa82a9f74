"""KVCache: an agent's working memory, the keys and values of every layer (paper, section 3.2).

The invariant is *slot = position*: slots 0 to lengths[b] - 1 of row b are filled, and the key in
slot p was rotated for position p. A ragged batch is padded on the right. The slots from lengths[b]
on are free: a query at position p sees only slots up to p, and the next append overwrites them.
Therefore no padding mask is needed, and a row does not depend on the other rows. A method that
moves a slot also rotates its key. `append`, `advance` and `sign`, which the model calls, change the
cache; every other method returns a new one. Does not know: tokens, agents, what a model computes.

    B rows   T new positions   S slots   H query heads   K key-value heads   d head size
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import files
from .config import Config
from .rotary import angles, move


class Positions(NamedTuple):
    """Where the T new positions of a forward pass are. Made once and used by every layer."""

    cos: Tensor  # (B or 1, 1, T, d)
    sin: Tensor  # (B or 1, 1, T, d)
    mask: Tensor | None  # (B or 1, 1, H/K · T, S): True if the query sees the slot; None: all True
    total: int  # S, the slots that attention reads
    indices: tuple[Tensor, Tensor] | None  # rows (B, 1) and slots (B, T); None: the last T of the S


class KVCache:
    """Keys and values (B, K, S, d) of every layer; `lengths` counts the filled slots of each row.

    `lengths` is a list of B integers on the host, so that it never waits for a GPU.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Create an empty cache. Slots are allocated when they are needed."""
        if batch_size < 1:
            raise ValueError(f"batch_size: found {batch_size}, expected 1 or more")
        self.config = config
        self.owner: Any = None  # the model that computed the keys
        self.lengths = [0] * batch_size
        shape = (batch_size, config.num_key_value_heads, 0, config.head_dim)
        empty = torch.zeros(shape, dtype=dtype, device=device)
        self.dtype, self.device = dtype, empty.device
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    def __repr__(self) -> str:
        layers = len(self.keys)
        return f"KVCache(lengths={self.lengths}, {layers} layers, {self.dtype}, {self.device})"

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot of one row: keys and values of all layers."""
        c = self.config
        vectors = 2 * c.num_hidden_layers * c.num_key_value_heads
        return vectors * c.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all filled slots; allocated slots that are free are not counted."""
        return sum(self.lengths) * self.slot_nbytes

    def next_positions(self, rows: int, new: int) -> Positions:
        """Return the next `new` positions of every row; raises ValueError if `rows` is not B."""
        if rows != len(self.lengths):
            found = f"found {rows} rows, expected {len(self.lengths)} as in the memory"
            raise ValueError(f"inputs: {found}")
        ragged = min(self.lengths) != max(self.lengths)
        starts = self.lengths if ragged else self.lengths[:1]
        slots = torch.tensor(starts)[:, None] + torch.arange(new)  # (B or 1, T)
        return self.positions_at(slots.to(self.device), max(self.lengths) + new, ragged)

    def positions_at(self, slots: Tensor, total: int, ragged: bool) -> Positions:
        """Return new positions at `slots` (B, T) of `total` ones.

        If not `ragged`, `slots` is (1, T): the last ones, the same for all rows.
        """
        c, mask, indices = self.config, None, None
        if ragged or slots.shape[1] > 1:
            # Not is_causal: it aligns the triangle to the top left, which is wrong if S ≠ T.
            mask = torch.arange(total, device=slots.device) <= slots[:, None, :, None]
            groups = c.num_attention_heads // c.num_key_value_heads
            mask = mask.repeat(1, 1, groups, 1)  # (B or 1, 1, H/K · T, S)
        if ragged:
            indices = torch.arange(len(slots), device=slots.device)[:, None], slots
        return Positions(*angles(slots, c.head_dim, c.rope_theta, self.dtype), mask, total, indices)

    def append(
        self, layer: int, keys: Tensor, values: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, d) of one layer; returns all of its slots (B, K, S, d).

        Keys are already rotated. The new slots count as filled only after `advance`, so a forward
        pass that fails leaves the cache as it was.
        """
        total = positions.total
        for stores, new in ((self.keys, keys), (self.values, values)):
            store = stores[layer] = with_capacity(stores[layer], total, heads=new.shape[1])
            if positions.indices is None:
                store[:, :, total - new.shape[2] : total] = new
            else:
                rows, slots = positions.indices
                store[rows, :, slots] = new.transpose(1, 2)  # (B, T, K, d)
        return self.keys[layer][:, :, :total], self.values[layer][:, :, :total]

    def advance(self, lengths: int | Sequence[int] | Tensor, most: int) -> None:
        """Count the first `lengths` of `most` appended slots as filled, in all rows or per row.

        Raises ValueError if a number is below 0 or above `most`.
        """
        counts = self._per_row(lengths, most)
        self.lengths = [old + count for old, count in zip(self.lengths, counts, strict=True)]

    def sign(self, model: Any) -> None:
        """Set the model that computes the keys; raises ValueError if another one has before."""
        known = self.owner in (None, model) or self.owner.fingerprint() == model.fingerprint()
        if not known or model.dtype != self.dtype:
            found = f"a memory in {self.dtype} of model {getattr(self.owner, 'name', None)!r}"
            expected = f"{model.dtype} and {model.name!r}, with the same weights"
            raise ValueError(f"cache: found {found}, expected {expected}")
        self.owner = model

    def fork(self) -> "KVCache":
        """Return a copy, so that two continuations do not overwrite each other."""
        return self.select(range(len(self.lengths)))

    def select(self, rows: Tensor | Sequence[int]) -> "KVCache":
        """Return a copy of `rows`, an index tensor or a list, which may repeat a row.

        Raises IndexError if there is no row, or one that does not exist.
        """
        rows = list(rows.tolist() if isinstance(rows, Tensor) else rows)
        B = len(self.lengths)
        integers = [not isinstance(row, bool) and hasattr(row, "__index__") for row in rows]
        if not rows or not all(integers) or not all(0 <= row < B for row in rows):
            raise IndexError(f"rows: found {rows}, expected a list of indices below {B}")
        rows = [int(row) for row in rows]
        lengths = [self.lengths[row] for row in rows]
        index = torch.tensor(rows, device=self.device)
        return self._map(lengths, lambda x: x[:, :, : max(lengths)].index_select(0, index))

    def truncate(self, lengths: int | Sequence[int] | Tensor) -> "KVCache":
        """Return the first `lengths` slots, the same number for all rows or one for each row.

        Rows that are shorter stay as they are. Raises ValueError if a number is below 0.
        """
        kept = zip(self.lengths, self._per_row(lengths), strict=True)
        return self._gather([range(min(pair)) for pair in kept])

    def keep_last(self, lengths: int | Sequence[int] | Tensor) -> "KVCache":
        """Return the last `lengths` slots, for all rows or for each, moved to slot 0.

        Rows that are shorter stay as they are. Raises ValueError if a number is below 0.
        """
        kept = zip(self.lengths, self._per_row(lengths), strict=True)
        slots = [range(max(end - n, 0), end) for end, n in kept]
        new, moves = self._gather(slots), [-row.start for row in slots]
        if any(moves):
            delta = torch.tensor(moves, device=self.device)
            new.keys = [move(keys, delta, self.config.rope_theta) for keys in new.keys]
        return new

    @classmethod
    def concat(cls, caches: Sequence["KVCache"]) -> "KVCache":
        """Join caches of equal batch size row by row; keys are rotated to their new positions.

        Equals one forward pass in which no part sees another (a block mask), not a sequential one.
        Raises ValueError for no caches, or different models, dtypes, devices or batch sizes.
        """
        kinds = {(c.config, len(c.lengths), c.dtype, c.device) for c in caches}
        if len(kinds) != 1:
            found = [f"{n} rows of {dtype} on {device}" for _, n, dtype, device in kinds]
            expected = "memories of one model, number of rows, dtype and device"
            raise ValueError(f"caches: found {found}, expected {expected}")
        wide, start = cls(*kinds.pop()), 0  # all slots of one cache, then all of the next
        slots: list[list[int]] = [[] for _ in wide.lengths]  # those that are filled
        for cache in caches:
            delta = torch.tensor([len(row) for row in slots], device=wide.device)
            width = max(cache.lengths)
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                keys = move(keys[:, :, :width], delta, wide.config.rope_theta)
                values = values[:, :, :width]
                if start:
                    keys = torch.cat([wide.keys[layer], keys], 2)
                    values = torch.cat([wide.values[layer], values], 2)
                wide.keys[layer], wide.values[layer] = keys, values
            for row, length in zip(slots, cache.lengths, strict=True):
                row += range(start, start + length)
            start += width
            if cache.owner is not None:
                wide.sign(cache.owner)
        return wide._gather(slots)

    def _per_row(self, lengths: int | Sequence[int] | Tensor, most: float = math.inf) -> list[int]:
        """Return one integer for each row."""
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        each = given if isinstance(given, Iterable) else [given] * len(self.lengths)
        counts = [int(length) for length in each]
        if len(counts) != len(self.lengths) or min(counts) < 0 or max(counts) > most:
            expected = f"{len(self.lengths)} numbers, 0 … {most}"
            raise ValueError(f"lengths: found {counts}, expected {expected}")
        return counts

    def _gather(self, slots: Sequence[Sequence[int]]) -> "KVCache":
        """Return a cache whose row b holds `slots[b]` of this one. Keys are not rotated."""
        index = pad(slots, self.device)[:, None, :, None]  # (B, 1, S, 1)
        return self._map(
            [len(row) for row in slots],
            lambda x: x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])),  # (B, K, S, d)
        )

    def _map(self, lengths: list[int], change: Callable[[Tensor], Tensor]) -> "KVCache":
        new = copy.copy(self)
        new.lengths = lengths
        new.keys = [change(keys) for keys in self.keys]
        new.values = [change(values) for values in self.values]
        return new

    def save(self, path: str | Path) -> None:
        """Write the filled slots to a file: see `files.write_memory`."""
        files.write_memory(path, self)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "KVCache":
        """Read a cache that `save` wrote for `model`: see `files.read_memory`."""
        lengths, keys, values = files.read_memory(path, model)
        cache = cls(model.config, len(lengths), model.dtype, model.device)
        cache.owner, cache.lengths, cache.keys, cache.values = model, lengths, keys, values
        return cache


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows of integers as one tensor (B, T), padded with 0 on the right."""
    width = max(map(len, rows))
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)


def with_capacity(store: Tensor, slots: int, heads: int) -> Tensor:
    """Return `store`, or a copy with more than `slots` slots.

    The first append sets the number of heads: a shard of a layer has fewer.
    """
    B, _, capacity, d = store.shape
    # One slot stays free: a slice of the whole store would be contiguous, with other strides, and
    # compiled steps would be compiled again.
    if slots < capacity:
        return store
    # Zeros, not empty: a masked slot still enters attention as 0 × value, and 0 × NaN is NaN.
    grown = store.new_zeros(B, heads, max(slots + 1, capacity + capacity // 2 + 64), d)
    if capacity:
        grown[:, :, :capacity] = store
    return grown
