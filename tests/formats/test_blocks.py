"""Blocks of a .gguf file, compared weight by weight with the definition of their type."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimas.formats.gguf_file import TYPES as ALL_TYPES
from minimas.formats.gguf_file import StoredTensor

Decode = Callable[[bytes], list[float]]


def half(data: bytes) -> float:
    return float(struct.unpack("<e", data)[0])


def q4_0(b: bytes) -> list[float]:
    return [half(b[:2]) * ((b[2 + i % 16] >> 4 * (i // 16) & 15) - 8) for i in range(32)]


def q4_1(b: bytes) -> list[float]:
    scale, minimum = half(b[:2]), half(b[2:4])
    return [scale * (b[4 + i % 16] >> 4 * (i // 16) & 15) + minimum for i in range(32)]


def fifth_bits(value: bytes, i: int) -> int:
    return int.from_bytes(value, "little") >> i & 1


def q5_0(b: bytes) -> list[float]:
    low = [b[6 + i % 16] >> 4 * (i // 16) & 15 for i in range(32)]
    return [half(b[:2]) * (low[i] + 16 * fifth_bits(b[2:6], i) - 16) for i in range(32)]


def q5_1(b: bytes) -> list[float]:
    low = [b[8 + i % 16] >> 4 * (i // 16) & 15 for i in range(32)]
    scale, minimum = half(b[:2]), half(b[2:4])
    return [scale * (low[i] + 16 * fifth_bits(b[4:8], i)) + minimum for i in range(32)]


def q8_0(b: bytes) -> list[float]:
    return [half(b[:2]) * value for value in struct.unpack("32b", b[2:])]


def six_bits(b: bytes, j: int) -> tuple[int, int]:
    """Return scale and minimum of group j (of eight) of a K-quant of 4 or 5 bits.

    They are stored in twelve bytes.
    """
    if j < 4:
        return b[j] & 63, b[j + 4] & 63
    return (b[j + 4] & 15) | (b[j - 4] >> 6 << 4), (b[j + 4] >> 4) | (b[j] >> 6 << 4)


def q4_k(b: bytes, fifth: bytes = bytes(32)) -> list[float]:
    """Decode Q4_K, and also Q5_K, whose weight i has bit i // 32 of byte i % 32 of `fifth`."""
    weights = []
    for i in range(256):
        scale, minimum = six_bits(b[4:16], i // 32)
        low = b[16 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
        value = low + 16 * (fifth[i % 32] >> i // 32 & 1)
        weights.append(half(b[:2]) * scale * value - half(b[2:4]) * minimum)
    return weights


def q5_k(b: bytes) -> list[float]:
    return q4_k(b[:16] + b[48:], b[16:48])


def q6_k(b: bytes) -> list[float]:
    scales, weights = struct.unpack("16b", b[192:208]), []
    for i in range(256):
        part, place = divmod(i, 128)
        low = b[64 * part + place % 64] >> 4 * (place // 64) & 15
        high = b[128 + 32 * part + place % 32] >> 2 * (place // 32) & 3
        weights.append(half(b[208:]) * scales[i // 16] * (low + 16 * high - 32))
    return weights


# Weights per block, bytes per block, positions of the float16 exponents, and the definition.
TYPES: dict[str, tuple[int, int, tuple[int, ...], Decode]] = {
    "Q4_0": (32, 18, (1,), q4_0),
    "Q4_1": (32, 20, (1, 3), q4_1),
    "Q5_0": (32, 22, (1,), q5_0),
    "Q5_1": (32, 24, (1, 3), q5_1),
    "Q8_0": (32, 34, (1,), q8_0),
    "Q4_K": (256, 144, (1, 3), q4_k),
    "Q5_K": (256, 176, (1, 3), q5_k),
    "Q6_K": (256, 210, (209,), q6_k),
}


def finite(data: bytes, kind: str) -> bytes:
    """Make the float16 numbers of any blocks finite, with exponents of at most 15."""
    _, size, exponents, _ = TYPES[kind]
    content = bytearray(data)
    for at in exponents:
        for place in range(at, len(content), size):
            content[place] &= 0b10111111
    return bytes(content)


def stored(path: Path, kind: str, rows: int, data: bytes) -> StoredTensor:
    """Store a matrix of a type, after 32 bytes of other data."""
    path.write_bytes(bytes(32) + data)
    weights, size, *_ = TYPES[kind]
    row_bytes = len(data) // rows
    shape = (rows, row_bytes // size * weights)
    _, _, _, *layout = next(entry for entry in ALL_TYPES.values() if entry[0] == kind)
    return StoredTensor("x", path, 32, kind, shape, rows, row_bytes, layout)


def by_definition(data: bytes, kind: str, rows: int) -> Tensor:
    _, size, _, decode = TYPES[kind]
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    weights = [weight for block in blocks for weight in decode(block)]
    return torch.tensor(weights, dtype=torch.float64).float().view(rows, -1)


def some_blocks(kind: str, count: int) -> bytes:
    source = torch.Generator().manual_seed(0)
    content = torch.randint(1, 256, (count * TYPES[kind][1],), generator=source)
    return finite(bytes(content.tolist()), kind)


@given(data=st.data(), kind=st.sampled_from(sorted(TYPES)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_every_weight_matches_the_definition_of_its_type(
    data: st.DataObject, kind: str, tmp_path: Path
) -> None:
    """Bits in another order or a factor of another group must show, so there is no tolerance."""
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    count = rows * blocks * TYPES[kind][1]
    content = finite(data.draw(st.binary(min_size=count, max_size=count)), kind)
    tensor = stored(tmp_path / "x", kind, rows, content)
    expected = by_definition(content, kind, rows)
    assert torch.equal(tensor.read(0, rows), expected)
    start = data.draw(st.integers(0, rows - 1))
    assert torch.equal(tensor.read(start, rows + 5), expected[start:])


@pytest.mark.parametrize("kind", TYPES)
def test_the_package_gguf_reads_the_same_weights(kind: str, tmp_path: Path) -> None:
    """A second reader guards against a definition that is misread both here and in the code."""
    gguf = pytest.importorskip("gguf")
    import numpy
    from gguf.quants import dequantize

    content = some_blocks(kind, 12)
    found = stored(tmp_path / "x", kind, 4, content).read(0, 4)
    raw = numpy.frombuffer(content, numpy.uint8).reshape(4, -1)
    expected = dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert torch.equal(found, torch.from_numpy(expected))


@pytest.mark.parametrize("kind", TYPES)
def test_every_byte_of_a_block_is_used(kind: str, tmp_path: Path) -> None:
    """If a byte, such as one of the fifth bits, were skipped, changing it would change nothing."""
    content = some_blocks(kind, 1)
    expected = stored(tmp_path / "x", kind, 1, content).read(0, 1)
    for at in range(len(content)):
        for bit in (1, 16):
            changed = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
            found = stored(tmp_path / "x", kind, 1, changed).read(0, 1)
            assert not torch.equal(found, expected), (at, bit)


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_that_ends_inside_a_block_is_refused(kind: str, tmp_path: Path) -> None:
    tensor = stored(tmp_path / "x", kind, 2, some_blocks(kind, 4))
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    assert tensor.read(0, 1).shape == (1, tensor.shape[1])
    with pytest.raises(ValueError, match="found the end of the file inside a tensor"):
        tensor.read(0, 2)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_4_bit_blocks_are_read_as_values_scales_and_minimums(kind: str, tmp_path: Path) -> None:
    """This is the layout of q4, so the weights are not rounded twice."""
    content = some_blocks(kind, 6)
    values, scale, minimum = stored(tmp_path / "x", kind, 3, content).read_blocks(0, 3)
    assert values.dtype == torch.uint8 and int(values.max()) == 15 and values.shape[-1] == 32
    weights = values.double() * scale + minimum
    assert torch.equal(weights.float().flatten(1), by_definition(content, kind, 3))
