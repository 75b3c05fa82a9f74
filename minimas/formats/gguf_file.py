"""Read a .gguf file by GGUF's own names: its metadata, and its tensors a range of rows at a time.

The file is read, not mapped into memory, so it never stays resident. If it becomes shorter in the
meantime, an error is raised, whereas a mapping would crash the process. Every count, offset and
type is checked against the file before it is used. The common types are decoded here, all others by
the package `gguf`. gguf.py interprets the metadata and the tensors.

Source: the GGUF specification (ggml, docs/gguf.md).
"""

import re
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


def table(text: str) -> list[list[str]]:
    """Return the words of each line."""
    return [line.split() for line in text.strip().splitlines()]


SCALARS = "BbHhIif?  Qqd"  # the letter in `struct` of each type of metadata value
STRING, ARRAY = 8, 9  # the types without a letter
# Number of a tensor's type -> its name, weights per block and bytes per block (0 if it cannot be
# decoded). Block types that are decoded here also have: 1, or -1 if a block's parts are in reverse
# order; the value that means 0 in a type without minimums; `bits` and `run` of `bit_fields` for the
# low bits, then for the high bits; the bytes of each part. The parts are float16 numbers, a
# K-quant's factors for them, high bits and low bits.
TYPES: dict[int, Any] = {
    int(number): (name, *map(int, numbers))
    for number, name, *numbers in table("""
        0 F32 1 4
        1 F16 1 2
        2 Q4_0 32 18  1 8 4 16 0 0 2 16
        3 Q4_1 32 20  1 0 4 16 0 0 4 16
        6 Q5_0 32 22  1 16 4 16 1 1 2 4 16
        7 Q5_1 32 24  1 0 4 16 1 1 4 4 16
        8 Q8_0 32 34  1 0 8 32 0 0 2 32
        9 Q8_1 0 0
        10 Q2_K 256 84
        11 Q3_K 256 110
        12 Q4_K 256 144  1 0 4 32 0 0 4 12 128
        13 Q5_K 256 176  1 0 4 32 1 32 4 12 32 128
        14 Q6_K 256 210  -1 32 4 64 2 32 128 64 16 2
        15 Q8_K 0 0
        16 IQ2_XXS 256 66
        17 IQ2_XS 256 74
        18 IQ3_XXS 256 98
        19 IQ1_S 256 50
        20 IQ4_NL 32 18
        21 IQ3_S 256 110
        22 IQ2_S 256 82
        23 IQ4_XS 256 136
        24 I8 0 0
        25 I16 0 0
        26 I32 0 0
        27 I64 0 0
        28 F64 0 0
        29 IQ1_M 256 56
        30 BF16 1 2
        34 TQ1_0 256 54
        35 TQ2_0 256 66
        39 MXFP4 32 17
        40 NVFP4 64 36
    """)
}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # their names in torch


def bit_fields(data: Tensor, bits: int, run: int) -> Tensor:
    """Split bytes into numbers of `bits` bits, (…, n) -> (…, 8 n / bits) uint8.

    In every `run` bytes, the lowest bits are the first `run` numbers, the bits above them are the
    next `run` numbers, and so on.
    """
    runs = data.unflatten(-1, (-1, run))  # (…, n / run, run)
    parts = [runs >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -2).flatten(-3)


class StoredTensor(NamedTuple):
    """A tensor of a file: where its bytes are, their type, and its shape. A vector is one row."""

    name: str  # GGUF's name
    path: Path
    start: int  # its first byte in the file
    kind: str  # name of the type
    shape: tuple[int, ...]  # in PyTorch's order, the reverse of the file's
    rows: int
    row_bytes: int
    layout: list[int]  # the end of its type's line in TYPES, empty if not decoded here

    def read_bytes(self, start: int, stop: int) -> Tensor:
        """Return the bytes of rows `start` to `stop`, or to the last row, uint8 (n, row_bytes).

        Raises ValueError if the file has become shorter since it was opened.
        """
        count = (min(stop, self.rows) - start) * self.row_bytes
        with self.path.open("rb") as file:
            file.seek(self.start + start * self.row_bytes)
            data = bytearray(file.read(count))
        if len(data) < count:
            raise ValueError(
                f"{self.path}: found the end of the file inside a tensor, "
                "expected the size it had when it was opened"
            )
        return torch.frombuffer(data, dtype=torch.uint8).view(-1, self.row_bytes)

    def read_blocks(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, scales and minimums of a range of rows; the type must have a `layout`.

        A weight is value · scale + minimum. Values are (n, B, g, w) for B blocks of g groups of w
        weights. They are uint8 in Q4 types and in types with minimums, else int8. Scales and
        minimums are float32 (n, B, g, 1).
        """
        order, middle, low_bits, low_run, high_bits, high_run, *sizes = self.layout
        blocks = self.read_bytes(start, stop).unflatten(1, (-1, sum(sizes)))  # (n, B, bytes)
        parts = blocks.split(sizes, -1)[::order]
        values = bit_fields(parts[-1], low_bits, low_run)  # (n, B, g · w)
        if high_bits:
            values |= bit_fields(parts[-2], high_bits, high_run) << 4
        scale, *minimums = parts[0].view(torch.float16).float().split(1, -1)  # (n, B, 1)
        if self.kind == "Q6_K":
            scale = scale * parts[1].view(torch.int8)
        elif self.kind.endswith("K"):
            # Eight scales and eight minimums have six bits each. The first four scales are the low
            # bits of `first`, and the first four minimums those of `second`. The top two bits of
            # these bytes are the top bits of the last four, whose other four bits are in `rest`.
            first, second, rest = parts[1].split(4, -1)
            scale = scale * torch.cat([first & 63, rest & 15 | first >> 6 << 4], -1)
            minimums = [-minimums[0] * torch.cat([second & 63, rest >> 4 | second >> 6 << 4], -1)]
        if self.kind == "Q4_0":
            minimums = [-middle * scale]
        elif not minimums:
            values = values.view(torch.int8) - middle
            minimums = [0 * scale]
        return values.view(*scale.shape, -1), scale[..., None], minimums[0][..., None]

    def read(self, start: int, stop: int) -> Tensor:
        """Return the weights of a range of rows, floating-point (n, width), in the file's order.

        Raises ImportError if the package gguf is needed and missing.
        """
        if self.layout:
            values, scale, minimum = self.read_blocks(start, stop)
            return (values * scale + minimum).flatten(1)  # (n, K)
        data = self.read_bytes(start, stop)  # (n, row_bytes)
        if self.kind in FLOATS:
            return data.view(getattr(torch, FLOATS[self.kind]))  # (n, K)
        try:
            from gguf import GGMLQuantizationType as Kind
            from gguf.quants import dequantize

            return torch.from_numpy(dequantize(data.numpy(), Kind[self.kind]))  # (n, K)
        except (ImportError, KeyError) as error:
            raise ImportError(
                f"{self.path}: tensor {self.name!r}: found type {self.kind}, which needs a package "
                f"({error}): pip install -U gguf"
            ) from error


class Header:
    """The metadata and the tensors of one file, by GGUF's names."""

    def __init__(self, path: Path) -> None:
        """Read the header of `path`.

        Raises FileNotFoundError, and ValueError naming the file, the field, what was found and what
        was expected.
        """
        self.path = path
        self.size = path.stat().st_size
        self.metadata: dict[str, Any] = {}
        self.tensors: list[StoredTensor] = []
        with path.open("rb") as self._file:
            magic, version, tensors, fields = self._unpack("4sIQQ", "GGUF header")
            self.require(magic == b"GGUF", "magic", magic, "b'GGUF'")
            self.require(version in (2, 3), "version", f"{version:#x}", "2 or 3, little-endian")
            for _ in range(fields):
                name = self._string("metadata name")
                field = f"{name!r:.80}"
                self.require(name not in self.metadata, field, "it repeated", "it once")
                [kind] = self._unpack("I", field)
                if kind == ARRAY:
                    kind, size = self._unpack("IQ", field)
                    self.metadata[name] = self._values(kind, size, field)
                else:
                    [self.metadata[name]] = self._values(kind, 1, field)
            self._parse_tensors(tensors)

    def require(self, good: bool, field: str, found: Any, expected: str) -> None:
        """Raise ValueError naming the file and `field` unless `good`."""
        if not good:
            raise ValueError(f"{self.path}: {field}: found {found!s:.80}, expected {expected}")

    def value(self, field: str, kind: type, default: Any = None) -> Any:
        """Return a metadata value of type `kind`.

        Raises ValueError for another type, or if the field is missing and `default` is None.
        """
        value = self.metadata.get(field, default)
        self.require(
            type(value) is kind,
            field,
            "nothing" if value is None else repr(value),
            f"a value of type {kind.__name__}",
        )
        return value

    def _values(self, kind: int, count: int, field: str) -> list[Any]:
        # Large vocabularies have 300,000.
        self.require(count <= 10**7, field, f"{count:,} elements", "at most 10,000,000")
        if kind == STRING:
            return [self._string(field) for _ in range(count)]
        known = kind != ARRAY and kind < len(SCALARS)
        self.require(known, field, f"value type {kind}", "a scalar or a string")
        return list(self._unpack(f"{count}{SCALARS[kind]}", field))

    def _parse_tensors(self, count: int) -> None:
        entries = []
        for _ in range(count):
            name = self._string("tensor name")
            [dimensions] = self._unpack("I", "tensor dimensions")
            self.require(1 <= dimensions <= 4, "tensor dimensions", dimensions, "1 to 4")
            entries.append((name, *self._unpack(f"{dimensions}QIQ", "tensor")))
        alignment = self.value("general.alignment", int, 32)
        self.require(alignment > 0, "general.alignment", alignment, "a positive number of bytes")
        table_end = self._file.tell()
        data_start = table_end + -table_end % alignment
        for name, *sizes, number, offset in entries:
            field = f"tensor {name!r:.80}"
            shape = tuple(reversed(sizes))
            kind, block, block_bytes, *layout = TYPES.get(number, ("not known", 0, 0))
            self.require(block > 0, field, f"type {number} ({kind})", "one that can be decoded")
            self.require(
                min(shape) > 0 and shape[-1] % block == 0,
                field,
                shape,
                f"sizes above 0, the last a multiple of {block} for {kind}",
            )
            start = data_start + offset
            rows = prod(shape[:-1])
            row_bytes = shape[-1] // block * block_bytes
            stop = start + rows * row_bytes
            self.require(
                stop <= self.size, field, f"bytes up to {stop:,}", f"at most {self.size:,}"
            )
            self.tensors.append(
                StoredTensor(name, self.path, start, kind, shape, rows, row_bytes, layout)
            )

    def _read(self, count: int, field: str) -> bytes:
        data = self._file.read(min(count, self.size))
        if len(data) < count:
            raise ValueError(
                f"{self.path}: {field}: found the end of the file at byte {self.size:,}, "
                f"expected {count:,} bytes, of which it has {len(data):,}"
            )
        return data

    def _unpack(self, form: str, field: str) -> tuple[Any, ...]:
        """Read the values that `form`, a format of the module struct, describes."""
        return struct.unpack(f"<{form}", self._read(struct.calcsize(f"<{form}"), field))

    def _string(self, field: str) -> str:
        [length] = self._unpack("Q", field)
        try:
            return self._read(length, field).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {field}: found {error}, expected UTF-8") from error


def read_header(path: Path) -> Header:
    """Return a file's header. For a shard, return the first shard's header with all tensors.

    Raises as `Header` does, and FileNotFoundError if a shard is missing.
    """
    given = Header(path)
    count = given.value("split.count", int, 1)
    if count <= 1:
        return given
    end = f"-of-{count:05}.gguf"
    stem = re.sub(rf"-\d{{5}}{end}$", "", path.name)
    first, *others = (Header(path.with_name(f"{stem}-{i + 1:05}{end}")) for i in range(count))
    for shard in others:
        first.tensors += shard.tensors
    return first
