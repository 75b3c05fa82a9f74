"""What a .gguf file holds, by GGUF's own names: metadata, and tensors that are read a range of rows at a time.

A header is parsed from a mapping that is closed again at once, and rows come by plain reads: the file never stays
resident, and one that shrinks meanwhile is an error, not a crash. Every count, offset and type is checked against the
file before it is believed. The common types are decoded here, all others by the package `gguf`.
Does not know: what the metadata and the tensors mean (gguf.py), models, devices.

Source: the GGUF specification (ggml, docs/gguf.md).
"""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST = 10**7  # no real size or count of a header comes near
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
# Number of a type -> its name, weights in a block, bytes in a block.
KINDS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
KINDS |= {2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and how. A vector of plain numbers counts as a column, so that it has rows to cut at."""

    path: Path
    start: int
    number: int
    kind: str
    shape: tuple[int, ...]  # PyTorch's, the file's turned around
    rows: int
    width: int  # weights in a row
    row_size: int  # bytes in a row

    def raw(self, start: int, stop: int) -> Tensor:
        """The bytes of a range of rows, uint8 (n, row_size); raises ValueError if the file has become shorter."""
        buffer = bytearray((stop - start) * self.row_size)
        with self.path.open("rb") as file:
            file.seek(self.start + start * self.row_size)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(
                    f"{self.path}: found its end inside a tensor, expected the size it had when opened"
                )
        return torch.frombuffer(buffer, dtype=torch.uint8).view(stop - start, -1)

    def blocks(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (n, K), scale (n, K/32) and minimum of a range of rows of Q4_0, Q4_1 or Q8_0, in the file's order."""
        blocks = self.raw(start, stop).view(stop - start, self.width // 32, -1)
        head = 4 if self.kind == "Q4_1" else 2
        scales = blocks[..., :head].contiguous().view(torch.float16).float()  # (n, K/32, 1 or 2)
        packed, scale = blocks[..., head:], scales[..., 0]
        if self.kind == "Q8_0":
            return packed.flatten(1).view(torch.int8), scale, None
        values = torch.cat([packed & 15, packed >> 4], -1).flatten(
            1
        )  # low halves are weights 0 … 15, high 16 … 31
        return values, scale, scales[..., 1] if self.kind == "Q4_1" else -8 * scale

    def floats(self, start: int, stop: int) -> Tensor:
        """The weights of a range of rows, (n, width) in some floating dtype, in the file's order."""
        if self.kind in FLOATS:
            return self.raw(start, stop).view(FLOATS[self.kind])
        if self.number in KINDS:
            values, scale, minimum = self.blocks(start, stop)
            weights = values.view(*scale.shape, 32) * scale[..., None]  # (n, K/32, 32)
            return (weights if minimum is None else weights.add_(minimum[..., None])).flatten(1)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(
            dequantize(self.raw(start, stop).numpy(), GGMLQuantizationType(self.number))
        )


class Header:
    """The metadata and the tensors of one file, by GGUF's names."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.path, self.size, self.at = path, path.stat().st_size, 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        self.require(self.size > 24, "file", f"{self.size} bytes", "a GGUF header")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._data,
        ):
            self._parse()

    def require(self, good: bool, field: str, found: Any, expected: str) -> None:
        if not good:
            raise ValueError(f"{self.path}: {field}: found {found!s:.80}, expected {expected}")

    def value(self, field: str, kind: type, default: Any = None) -> Any:
        """A metadata value of a type (float: any number); with no default it has to be there."""
        value, name = (
            self.metadata.get(field, default),
            {float: "number", int: "integer"}.get(kind, kind.__name__),
        )
        good = type(value) is kind or (kind is float and type(value) is int)
        self.require(
            good, field, "nothing" if value is None else repr(value), f"a value of type {name}"
        )
        return value

    def _parse(self) -> None:
        magic, version, tensors, fields = self._take("4sIQQ", "header")
        self.require(magic == b"GGUF", "magic", magic, "b'GGUF'")
        self.require(version in (2, 3), "version", f"{version:#x}", "2 or 3, little-endian")
        for name, count, least in (("tensor count", tensors, 32), ("metadata count", fields, 13)):
            most = self.size // least
            self.require(
                count <= most,
                name,
                f"{count:,}",
                f"at most {most:,} in a file of {self.size:,} bytes",
            )
        for _ in range(fields):
            [name] = self._strings(1, "metadata name")
            field = f"{name!r:.80}"
            self.require(name not in self.metadata, field, "it twice", "it once")
            self.metadata[name] = self._any(field, *self._take("I", field))
        infos: list[Any] = [
            (*self._strings(1, "tensor name"), *self._shape()) for _ in range(tensors)
        ]
        alignment = self.value("general.alignment", int, 32)
        self.require(
            0 < alignment <= 2**20, "general.alignment", alignment, "a positive number of bytes"
        )
        data = -(-self.at // alignment) * alignment
        for name, shape, number, offset in infos:
            field = f"tensor {name!r:.80}"
            self.require(name not in self.tensors, field, "it twice", "it once")
            kind, block, size = _kind(number, f"{self.path}: {field}")
            self.require(all(0 < n <= MOST for n in shape), field, shape, f"sizes of 1 to {MOST:,}")
            self.require(
                shape[-1] % block == 0,
                field,
                shape,
                f"a multiple of {block} in the last place, for {kind}",
            )
            width = shape[-1] if len(shape) > 1 or block > 1 else 1
            rows, row_size = prod(shape) // width, width // block * size
            stop = data + offset + rows * row_size
            self.require(
                stop <= self.size,
                field,
                f"bytes up to {stop:,}",
                f"a file of that size, not {self.size:,}",
            )
            self.tensors[name] = Stored(
                self.path, data + offset, number, kind, shape, rows, width, row_size
            )

    def _shape(self) -> tuple[tuple[int, ...], int, int]:
        (n,) = self._take("I", "tensor dimensions")
        self.require(1 <= n <= 4, "tensor dimensions", n, "1 to 4")
        *shape, number, offset = self._take(f"{n}QIQ", "tensor")
        return tuple(reversed(shape)), number, offset

    def _any(self, field: str, kind: int) -> Any:
        count = None
        if kind == ARRAY:
            kind, count = self._take("IQ", field)
            self.require(count <= MOST, field, f"{count:,} elements", f"at most {MOST:,}")
        self.require(
            kind in SCALARS or kind == STRING,
            field,
            f"value type {kind}",
            "one of GGUF's, no nested array",
        )
        n = 1 if count is None else count
        values = (
            self._strings(n, field)
            if kind == STRING
            else list(self._take(f"{n}{SCALARS[kind]}", field))
        )
        return values[0] if count is None else values

    def _take(self, form: str, field: str) -> tuple[Any, ...]:
        start, self.at = self.at, self.at + struct.calcsize("<" + form)
        self.require(
            self.at <= self.size,
            field,
            f"the end of the file at byte {self.size:,}",
            f"{self.at:,} or more",
        )
        return struct.unpack_from("<" + form, self._data, start)

    def _strings(self, count: int, field: str) -> list[str]:
        texts, data, at, length = [], self._data, self.at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):  # 300,000 of them in a usual vocabulary
                stop = at + 8
                if stop > self.size or (stop := stop + length(data, at)[0]) > self.size:
                    self.require(
                        False,
                        field,
                        f"a string up to byte {stop:,}",
                        f"at most {self.size:,}, its size",
                    )
                texts.append(data[at + 8 : stop].decode())
                at = stop
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {field}: found {error}, expected UTF-8") from error
        self.at = at
        return texts


def shards(path: Path) -> list[Header]:
    """The headers of a file, or of all the shards of which it is one, in order."""
    given = Header(path)
    count = given.value("split.count", int, 1)
    if count <= 1:
        return [given]
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[2]) != count:
        raise ValueError(
            f"{path}: split.count: found {count}, expected a name such as model-00001-of-{count:05}.gguf"
        )
    headers = [
        Header(path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf")) for i in range(count)
    ]
    for i, header in enumerate(headers):
        place = [header.metadata.get(field) for field in ("split.no", "split.count")]
        header.require(place == [i, count], "split.no, split.count", place, f"{[i, count]}")
    total = sum(len(header.tensors) for header in headers)
    expected = headers[0].value("split.tensors.count", int)
    headers[0].require(total == expected, "split.tensors.count", f"{total} tensors", f"{expected}")
    return headers


def _kind(number: int, where: str) -> tuple[str, int, int]:
    """The name of a type and the weights and bytes in its block; refused by name if nobody here can decode it."""
    if number in KINDS:
        return KINDS[number]
    try:
        import numpy
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ImportError(
            f"{where}: found type {number}, which needs a package: pip install gguf"
        ) from error
    try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        dequantize(numpy.zeros((1, size), numpy.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{where}: found type {number} ({error}), expected one that gguf can decode"
        ) from error
    return kind.name, block, size
