"""KVCache: an agent's working memory, the keys and values of every layer (paper, section 3.2).

The invariant is *slot = position*: slots 0 to lengths[b] - 1 of row b are filled, and the key in
slot p was rotated for position p. A ragged batch is padded on the right. The slots from lengths[b]
on are free: a query at position p sees only slots up to p, and the next append overwrites them.
Therefore the causal mask hides the padding too, and a row does not depend on the other rows. A
method that moves a slot also rotates its key. The model calls `append`, `advance` and `set_owner`,
which change the cache in place. The methods that copy, cut or join return a new cache. This file
does not depend on tokens, agents or the forward pass.

    B rows   T new positions   S slots   H query heads   K key-value heads   d head size
"""

import copy
from collections.abc import Iterable, Sequence
from operator import add, sub
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import files
from .config import Config
from .errors import ParameterError
from .rotary import angles, rotate

Lengths = int | Sequence[int] | Tensor  # one number for all rows, or one per row


class Positions(NamedTuple):
    """The T new positions of a forward pass. They are computed once and used by every layer."""

    cos: Tensor  # (B or 1, 1, T, d)
    sin: Tensor  # (B or 1, 1, T, d)
    mask: Tensor | None  # (B or 1, 1, H/K · T, S): True if the query sees the slot; None: all do
    total: int  # S, the number of slots that attention reads
    where: Any  # index of the new slots: rows (B, 1) and slots (B, T), or all rows and slots (T,)


class KVCache:
    """Keys and values (B, K, slots, d) of every layer; `lengths` counts each row's filled slots.

    `lengths` is a list of B integers on the host, so that reading it never waits for a GPU.
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
        shape = (batch_size, config.num_key_value_heads, 0, config.head_dim)
        empty = torch.zeros(shape, dtype=dtype, device=device)
        self.config = config
        self.dtype = dtype
        self.device = empty.device
        self.owner: Any = None  # the model that computed the keys
        self.lengths = [0] * batch_size
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    def __repr__(self) -> str:
        kind = f"{len(self.keys)} layers, {self.dtype}, {self.device}"
        return f"KVCache(lengths={self.lengths}, {self.nbytes:,} bytes, {kind})"

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot of one row: keys and values of all layers."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all filled slots; allocated slots that are free are not counted."""
        return sum(self.lengths) * self.slot_nbytes

    def next_positions(self, rows: int, new: int) -> Positions:
        """Return the next `new` positions of every row. Raises ValueError if `rows` is not B."""
        lengths = self.lengths
        if rows != len(lengths):
            raise ValueError(f"inputs: found {rows} rows, expected {len(lengths)} as in the cache")
        ragged = min(lengths) != max(lengths)
        starts = torch.tensor(lengths if ragged else lengths[:1])[:, None]  # (B or 1, 1)
        # A blocking copy would wait for all kernels of the previous step.
        slots = (starts + torch.arange(new)).to(self.device, non_blocking=True)  # (B or 1, T)
        return self.positions_at(slots, max(lengths) + new, ragged)

    def positions_at(self, slots: Tensor, total: int, ragged: bool) -> Positions:
        """Return the positions that write to `slots` (B, T) and attend to slots 0 … total - 1.

        If not `ragged`, all rows have equal lengths, and `slots` is (1, T): the last T slots. A
        recorded step on a GPU calls this itself, because its slots must be a tensor.
        """
        c = self.config
        mask = None
        # The slots as an index: for a slice, compiled code would copy the whole cache in each step.
        where: Any = slice(None), slots[0]
        if ragged or slots.shape[1] > 1:
            # Attention stacks the H/K query heads of a key-value head along T.
            groups = c.num_attention_heads // c.num_key_value_heads
            queries = slots.repeat(1, groups)[:, None, :, None]  # (B or 1, 1, H/K · T, 1)
            # Not is_causal: it aligns the triangle to the top left, which is wrong if S ≠ T.
            mask = torch.arange(total, device=slots.device) <= queries  # (B or 1, 1, H/K · T, S)
        if ragged:
            where = torch.arange(len(slots), device=slots.device)[:, None], slots  # (B, 1), (B, T)
        return Positions(*angles(slots, c.head_dim, c.rope_theta, self.dtype), mask, total, where)

    def append(
        self, layer: int, keys: Tensor, values: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, d) of one layer. Returns all of its slots (B, K, S, d).

        Keys must already be rotated. The new slots count as filled only after `advance`, so a
        forward pass that fails leaves the cache as it was.
        """
        total = positions.total
        for stores, new in ((self.keys, keys), (self.values, values)):
            store = stores[layer] = with_capacity(stores[layer], total, heads=new.shape[1])
            # Slots next to rows: indexing both leaves the other dimensions in place.
            store.transpose(1, 2)[positions.where] = new.transpose(1, 2)  # (B, T, K, d)
        return self.keys[layer][:, :, :total], self.values[layer][:, :, :total]

    def advance(self, lengths: Lengths, most: int) -> None:
        """Count the first `lengths` of the `most` appended slots as filled.

        `lengths` is one number for all rows or one per row. Raises ValueError if a number is below
        0 or above `most`.
        """
        self.lengths = list(map(add, self.lengths, self._per_row(lengths, most)))

    def set_owner(self, model: Any) -> None:
        """Record the model that computes the keys.

        Raises ValueError if the cache holds keys of another model, or has another dtype or device.
        """
        known = self.owner in (None, model) or self.owner.fingerprint() == model.fingerprint()
        if not known or (model.dtype, model.device) != (self.dtype, self.device):
            raise ValueError(
                f"cache: found {self.dtype} on {self.device} of model "
                f"{getattr(self.owner, 'name', None)!r}, expected {model.dtype} on {model.device} "
                f"of {model.name!r}, with the same weights"
            )
        self.owner = model

    def fork(self) -> "KVCache":
        """Return a copy, so that two continuations do not overwrite each other."""
        return self.select(range(len(self.lengths)))

    def select(self, rows: Tensor | Sequence[int]) -> "KVCache":
        """Return a copy of the given `rows`, an index tensor or a list; a row may be repeated.

        Raises IndexError if `rows` is empty or holds an index out of range.
        """
        rows = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        B = len(self.lengths)
        # A boolean mask is not a list of rows, although True == 1.
        if not rows or any(isinstance(row, bool | float) or row not in range(B) for row in rows):
            raise IndexError(f"rows: found {rows}, expected a list of indices below {B}")
        new = copy.copy(self)
        new.lengths = [self.lengths[row] for row in rows]
        index = torch.tensor(rows, device=self.device)  # (B,), made once for all layers
        new.keys = [keys.index_select(0, index) for keys in self.keys]
        new.values = [values.index_select(0, index) for values in self.values]
        return new

    def truncate(self, lengths: Lengths) -> "KVCache":
        """Return a cache of the first `lengths` slots, one number for all rows or one per row.

        Shorter rows stay as they are. Raises ValueError if a number is below 0.
        """
        return self.drop(lengths, self.lengths)

    def keep_last(self, lengths: Lengths) -> "KVCache":
        """Return a cache of the last `lengths` slots, one number for all rows or one per row.

        Shorter rows stay as they are. Raises ValueError if a number is below 0.
        """
        return self.drop(0, [max(n, 0) for n in map(sub, self.lengths, self._per_row(lengths))])

    def drop(self, start: Lengths, stop: Lengths) -> "KVCache":
        """Return a cache without slots `start` to `stop` - 1; later slots move to close the gap.

        Both may differ per row. As in a slice, slots that a row does not have are ignored. The
        result equals a forward pass of the remaining input if the model has one layer, or if the
        later slots did not attend to the dropped ones, as after `concat`. Otherwise it is an
        approximation: above the first layer, the later slots still depend on the dropped ones.
        Raises ValueError if a number is below 0.
        """
        stops = list(map(min, self._per_row(stop), self.lengths))
        starts = list(map(min, self._per_row(start), stops))
        gaps = list(map(sub, stops, starts))  # slots to drop per row
        new = copy.copy(self)
        new.lengths = list(map(sub, self.lengths, gaps))
        begin, gap = torch.tensor([starts, gaps], device=self.device)[..., None]  # (B, 1) each
        slots = torch.arange(max(new.lengths), device=self.device)  # (S,)
        # Slot s of the result is slot s + moves of this cache, whose key moves back by as much.
        moves = gap * (slots >= begin)  # (B, S)
        # The slots after a row's end are free and may hold anything.
        index = (slots + moves).clamp(max=max(self.lengths) - 1)[:, None, :, None]  # (B, 1, S, 1)
        rotation = angles(-moves, self.config.head_dim, self.config.rope_theta, self.dtype)
        new.keys = [rotate(keys.take_along_dim(index, 2), *rotation) for keys in self.keys]
        new.values = [values.take_along_dim(index, 2) for values in self.values]  # (B, K, S, d)
        return new

    @classmethod
    def concat(cls, caches: Sequence["KVCache"]) -> "KVCache":
        """Join caches of equal batch size: the slots of each follow those of the cache before it.

        Row b is joined with row b, and keys are rotated to their new positions.
        For caches that were computed separately, the result equals one forward pass in which no
        part sees another (a block mask), not a causal pass over all parts. Raises ValueError if
        there are no caches, or if their models, dtypes, devices or batch sizes differ.
        """
        kinds = {f"{len(c.lengths)} rows of {c.dtype} on {c.device} of {c.config}" for c in caches}
        if len(kinds) != 1:
            raise ValueError(
                f"caches: found {sorted(kinds)}, "
                "expected one model, number of rows, dtype and device for all"
            )
        joined = caches[0].truncate(0)
        for cache in caches:
            if cache.owner is not None:
                joined.set_owner(cache.owner)
            width = max(cache.lengths)
            first = torch.tensor(joined.lengths, device=joined.device)[:, None]  # (B, 1)
            rotation = angles(first, joined.config.head_dim, joined.config.rope_theta, joined.dtype)
            rows = torch.arange(len(first), device=joined.device)[:, None]  # (B, 1)
            slots = first + torch.arange(width, device=joined.device)  # (B, T)
            # `append` uses only the last two. Nothing attends here, so no mask (T, S) is needed.
            positions = Positions(*rotation, None, max(joined.lengths) + width, (rows, slots))
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                keys = rotate(keys[:, :, :width], *rotation)
                joined.append(layer, keys, values[:, :, :width], positions)
            joined.advance(cache.lengths, width)
        return joined

    def _per_row(self, lengths: Lengths, most: float = float("inf")) -> list[int]:
        """Return one integer per row. Raises ValueError unless all of them are 0 … `most`."""
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        each = given if isinstance(given, Iterable) else [given] * len(self.lengths)
        counts = list(map(int, each))
        if len(counts) != len(self.lengths) or min(counts) < 0 or max(counts) > most:
            raise ValueError(
                f"lengths: found {counts}, expected {len(self.lengths)} numbers, 0 … {most}"
            )
        return counts

    def save(self, path: str | Path, bits: int | None = None) -> None:
        """Write the filled slots to a file, with the fingerprint of the model: see `files`.

        `bits=8` rounds keys and values to 8-bit integers; None keeps them as they are. Raises
        ValueError for other `bits` or if no model has filled the cache, OSError if the file cannot
        be written.
        """
        if bits not in (None, 8):
            raise ParameterError("bits", f"found {bits!r}, expected 8 or None")
        tensors = {"lengths": torch.tensor(self.lengths)}
        for kind, stores in (("keys", self.keys), ("values", self.values)):
            for layer, store in enumerate(stores):
                name = f"{kind}.{layer}"
                part = store[:, :, : max(self.lengths)]
                if bits:
                    part, tensors[f"scale.{name}"] = files.in_8_bits(part)
                tensors[name] = part
        files.write(path, "memory", tensors, self.owner and files.identity(self.owner))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> "KVCache":
        """Read a cache that `save` has written for `model`, onto its device and in its dtype.

        A cache saved in 8 bits is read back in the model's dtype: only the file is smaller. Raises
        FileNotFoundError, or ValueError if the file is damaged, has another format or belongs to
        another model.
        """
        tensors = files.read(path, "memory", model)
        c = model.config
        lengths = tensors.get("lengths", torch.empty(0))
        one_per_row = lengths.dtype == torch.int64 and lengths.ndim == 1 and len(lengths)
        if not one_per_row or lengths.min() < 0:
            raise ValueError(f"{path}: lengths: found {lengths}, expected one count for each row")
        cache = model.new_cache(len(lengths))
        cache.owner = model
        cache.lengths = lengths.tolist()
        shape = (len(lengths), c.num_key_value_heads, max(cache.lengths), c.head_dim)
        for kind, stores in (("keys", cache.keys), ("values", cache.values)):
            for layer in range(len(stores)):
                name = f"{kind}.{layer}"
                shapes = {name: shape, f"scale.{name}": (*shape[:-1], 1)}
                stores[layer] = files.floats(path, tensors, name, shapes, model, model.dtype)
        return cache  # type: ignore[no-any-return]


def with_capacity(store: Tensor, slots: int, heads: int) -> Tensor:
    """Return `store` (B, K, capacity, d) if its capacity is above `slots`, else a larger copy.

    A new store has all K heads. A shard of a layer has fewer, so its first append crops them to
    `heads`, by negative padding.
    """
    capacity = store.shape[2]
    # One slot stays free. A slice of the whole store would be contiguous, with other strides, and
    # compiled steps would be compiled again.
    if slots < capacity:
        return store
    # Zeros, not torch.empty: a masked slot still enters attention as 0 × value, and 0 × NaN is NaN.
    grown = max(slots + 1, capacity + capacity // 2 + 64)
    return F.pad(store, (0, 0, 0, grown - capacity, 0, heads - store.shape[1]))
