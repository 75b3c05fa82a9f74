"""A .gguf file gives the model, tokenizer and settings it was made from, or a one-line error."""

import copy
import json
import logging
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from minimas import Qwen3, Sampling, Tokenizer, latent_mas, load, single
from minimas.core.config import FAMILIES
from minimas.fast.quantize import QuantizedLinear
from minimas.formats.gguf import GGUF, LAYER, PRE_TOKENIZERS, TOP, WORDS
from minimas.formats.gguf_file import StoredTensor

from ..models import (
    apart,
    apart_by_norm,
    random_ids,
    random_model,
    remember,
    tiny_config,
    tiny_model,
    write_folder,
)
from ..processes import within

numpy = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf", reason="files are written with it")
from gguf.quants import dequantize, quantize  # noqa: E402

Kind = gguf.GGMLQuantizationType
BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")  # the gguf package reads these but does not write them
BACK = {theirs: ours for ours, theirs in (TOP | LAYER).items()}


# -- writing files ---------------------------------------------------------------------------------


def permute(weight: Tensor, heads: int) -> Tensor:
    """Return what LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py returns."""
    return (
        weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    )


def gguf_name(name: str) -> str:
    stem, leaf = name.removeprefix("model.layers.").rsplit(".", 1)
    number, _, owner = stem.partition(".")
    return f"blk.{number}.{BACK[owner]}.{leaf}" if number.isdigit() else f"{BACK[stem]}.{leaf}"


def fields_of(model: Qwen3) -> dict[str, Any]:
    """Return a model's metadata as llama.cpp's converter writes it.

    The names lack the prefix of the architecture.
    """
    c = model.config
    return {
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_theta,
    }


def tensors_of(model: Qwen3, permuted: bool = True) -> dict[str, Tensor]:
    c, found = model.config, {}
    for name, weight in model.state_dict().items():
        if (
            c.model_type == "llama"
            and permuted
            and name.endswith(("q_proj.weight", "k_proj.weight"))
        ):
            weight = permute(
                weight, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            )
        found[gguf_name(name)] = weight.float()
    return found


def random_blocks(kind: str, rows: int, width: int) -> Any:
    """Return rows of a K-quant with random values and weights below 1."""
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    source = torch.Generator().manual_seed(rows)
    blocks = torch.randint(256, (rows, width // block, size), generator=source).byte().numpy()
    at = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(208, 210)}[kind]
    numbers = numpy.full(blocks[..., at].shape[-1] // 2, 2e-4, numpy.float16)
    blocks[..., at] = numbers.view(numpy.uint8)
    return blocks.reshape(rows, -1)


def write(
    path: Path,
    model: Qwen3,
    kinds: dict[str, str] | str = "F32",
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a model with gguf's own writer.

    `kinds` gives the type per tensor or of all matrices, and `extra` more tensors and metadata.
    """
    permuted = options.pop("permuted", True)
    writer = gguf.GGUFWriter(path, model.config.model_type, **options)
    more = extra or {}
    fields = {
        f"{model.config.model_type}.{name}": value for name, value in fields_of(model).items()
    }
    for name, value in (
        fields | {key: value for key, value in more.items() if not isinstance(value, Tensor)}
    ).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
            }
            add[type(value)](name, value)
    tensors = tensors_of(model, permuted) | {
        key: value for key, value in more.items() if isinstance(value, Tensor)
    }
    for name, weight in tensors.items():
        kind = kinds if isinstance(kinds, str) else kinds.get(name, "F32")
        if kind in K_QUANTS and weight.ndim > 1:
            data = random_blocks(kind, *weight.shape)
        else:
            data = quantize(weight.numpy(), Kind[kind if weight.ndim > 1 else "F32"])
        writer.add_tensor(name, data, raw_dtype=Kind[kind if weight.ndim > 1 else "F32"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def filled(file: GGUF, dtype: torch.dtype = torch.float32) -> Qwen3:
    """Return the model of a file, filled as load fills it."""
    model = Qwen3(file.config).to(dtype)
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == file.shapes
    model.load_state_dict({name: file.read(name, dtype) for name in file.shapes})
    return model.eval()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, value: Any) -> bytes:
    """Return one metadata entry with any content. Bytes are used as they are."""
    if isinstance(value, bytes):
        return text(name) + value
    number, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f"), str: (8, "")}[type(value)]
    body = text(value) if isinstance(value, str) else struct.pack("<" + form, value)
    return text(name) + struct.pack("<I", number) + body


TINY_FIELDS = {"general.architecture": "qwen3"} | {
    f"qwen3.{k}": v for k, v in fields_of(tiny_model()).items()
}
TINY_TENSORS: dict[str, tuple[tuple[int, ...], int, int]] = {"token_embd.weight": ((16, 41), 0, 0)}


def raw_file(
    fields: dict[str, Any] | None = None,
    tensors: dict[str, tuple[tuple[int, ...], int, int]] | list[Any] | None = None,
    head: tuple[bytes, int, int | None, int | None] = (b"GGUF", 3, None, None),
    data: int = 41 * 16 * 4,
) -> bytes:
    """Return any file, byte by byte.

    Tensors are name -> (shape in the file's order, type, offset).
    """
    entries = {
        key: value for key, value in (TINY_FIELDS | (fields or {})).items() if value is not None
    }
    infos = list(
        (TINY_TENSORS | tensors).items()
        if isinstance(tensors, dict)
        else tensors or TINY_TENSORS.items()
    )
    counts = (
        len(infos) if head[2] is None else head[2],
        len(entries) if head[3] is None else head[3],
    )
    body = (
        head[0]
        + struct.pack("<IQQ", head[1], *counts)
        + b"".join(field(*entry) for entry in entries.items())
    )
    for name, (shape, number, offset) in infos:
        body += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
    return body + bytes(-len(body) % 32) + bytes(data)


def opened(path: Path, content: bytes) -> GGUF:
    path.write_bytes(content)
    return GGUF(path)


# -- what a file gives -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_gives_the_model_that_it_was_made_from(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """Q and K rows in the file's order give fluent nonsense.

    All tensors and states are compared, also those of a file without the permutation.
    """
    model = tiny_model(
        family, dtype=torch.float32, tie_word_embeddings=tied, rope_theta=5e4, rms_norm_eps=1e-5
    )
    file = GGUF(write(tmp_path / "a.gguf", model))
    assert file.config == model.config
    assert {tensor.kind for tensor in file.tensors.values()} == {"F32"}
    again, ids = filled(file), random_ids(model, 2, 9)
    assert all(
        torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items()
    )
    expected = remember(model, ids)[0]
    assert torch.equal(remember(again, ids)[0], expected)
    unlike = remember(filled(GGUF(write(tmp_path / "b.gguf", model, permuted=False))), ids)[0]
    assert (apart(unlike, expected) > 0.1) == (family == "llama")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_the_dtype_comes_from_the_matrices(kind: str, tmp_path: Path) -> None:
    """Norms are float32 in every file. If they decided, every model would be loaded in float32."""
    model = tiny_model(dtype=torch.float32, hidden_size=32, intermediate_size=32, head_dim=8)
    file = GGUF(write(tmp_path / "a.gguf", model, kind))
    assert file.config.dtype == {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")
    assert file.tensors["model.layers.0.mlp.up_proj.weight"].kind == kind
    half = file.read("model.layers.0.mlp.up_proj.weight", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert apart(half.float(), model.state_dict()["model.layers.0.mlp.up_proj.weight"]) < 0.2


def test_metadata_missing_from_old_files_has_the_defaults_of_llama(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32, head_dim=4, num_key_value_heads=4)
    old = {
        f"llama.{name}": None
        for name in ("attention.key_length", "attention.head_count_kv", "rope.freq_base")
    }
    fields = {"general.architecture": "llama"} | {
        f"llama.{k}": v for k, v in fields_of(model).items()
    }
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_file(dict.fromkeys(TINY_FIELDS) | fields | old))
    assert GGUF(path).config == tiny_config(
        "llama", head_dim=4, num_key_value_heads=4, tie_word_embeddings=True
    )


def test_the_config_of_a_file_has_no_unknown_fields(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A field that Config does not know would give a warning at every load."""
    with caplog.at_level(logging.WARNING):
        opened(tmp_path / "a.gguf", raw_file())
    assert not caplog.records


def stored(
    path: Path, name: str, data: Any, kind: str, family: str = "qwen3", **fields: Any
) -> GGUF:
    """Return a file with one additional matrix, given as bytes (rows, bytes)."""
    model = tiny_model(family, dtype=torch.float32)
    writer = gguf.GGUFWriter(path, family)
    for key, value in fields_of(model).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"{family}.{key}", value
        )
    writer.add_tensor("token_embd.weight", numpy.zeros((41, 16), numpy.float32))
    writer.add_tensor(name, data, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUF(path)


def finite_blocks(draw_bytes: bytes, rows: int, kind: str, at: tuple[int, ...]) -> Any:
    """Return random blocks of a type whose float16 numbers, at the given bytes, are small.

    Their exponents are at most 15.
    """
    data = (
        numpy.frombuffer(draw_bytes, numpy.uint8)
        .copy()
        .reshape(rows, -1, gguf.GGML_QUANT_SIZES[Kind[kind]][1])
    )
    for byte in at:
        data[..., byte] &= 0b10111111
    return data.reshape(rows, -1)


@given(
    data=st.data(),
    kind=st.sampled_from(sorted(BLOCKS)),
    rows=st.sampled_from([1, 8, 24]),
    family=st.sampled_from(FAMILIES),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_contain_the_numbers_of_the_file(
    data: st.DataObject, kind: str, rows: int, family: str, tmp_path: Path
) -> None:
    """Swapped halves or a minimum of the wrong sign must show.

    Each weight is compared with the gguf package, without a tolerance.
    """
    rows = 24 if family == "llama" else rows
    content = data.draw(
        st.binary(min_size=2 * rows * BLOCKS[kind], max_size=2 * rows * BLOCKS[kind])
    )
    raw = finite_blocks(content, rows, kind, (1, 3) if kind == "Q4_1" else (1,))
    file = stored(tmp_path / "a.gguf", "blk.0.attn_q.weight", raw, kind, family)
    expected = torch.from_numpy(dequantize(raw, Kind[kind]))
    if family == "llama":  # 4 heads of 6: undone by the definition, not by this package
        expected = torch.stack(
            [expected[(row // 6) * 6 + 2 * (row % 3) + (row % 6) // 3] for row in range(24)]
        )
    key = "model.layers.0.self_attn.q_proj.weight"
    values, scale, minimum = file.blocks(key)
    assert values.dtype == (torch.int8 if kind == "Q8_0" else torch.uint8) and values.shape == (
        rows,
        64,
    )
    assert scale.dtype == torch.float32 and scale.shape == (rows, 2)
    assert minimum.shape == scale.shape and not (kind == "Q8_0" and bool(minimum.any()))
    assert file.low_bits(key) == ("q8" if kind == "Q8_0" else "q4")
    weights = values.view(rows, 2, 32) * scale[..., None] + minimum[..., None]
    assert torch.equal(weights.flatten(1), expected)
    assert torch.equal(file.read(key, torch.float32), expected)
    assert torch.equal(file.read(key, torch.float64), expected.double())


@pytest.mark.parametrize(
    ("kind", "at"),
    {"Q2_K": (81, 83), "Q3_K": (109,), "IQ4_NL": (1,), "IQ4_XS": (1,)}.items(),
)
def test_other_types_are_decoded_by_the_gguf_package(
    kind: str, at: tuple[int, ...], tmp_path: Path
) -> None:
    """They are decoded in slabs as in one piece, also with llama's order of rows."""
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    content = torch.randint(256, (24 * 2 * size,), generator=torch.Generator().manual_seed(0))
    raw = finite_blocks(bytes(content.tolist()), 24, kind, at)
    expected = torch.from_numpy(dequantize(raw, Kind[kind]))
    for family in ("qwen2", "llama"):
        file = stored(tmp_path / "a.gguf", "blk.0.attn_q.weight", raw, kind, family)
        key = "model.layers.0.self_attn.q_proj.weight"
        assert file.shapes[key] == (24, 2 * block) and file.tensors[key].kind == kind
        assert file.low_bits(key) == "q8"
        read = file.read(key, torch.float32)
        assert torch.equal(permute(read, 4) if family == "llama" else read, expected)


def test_reading_in_slabs_equals_reading_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slabs may be smaller than a row or not divide the rows.

    A single slab would double the memory.
    """
    sizes: list[int] = []
    raw = StoredTensor.read_bytes

    def counted(self: StoredTensor, start: int, stop: int) -> Tensor:
        sizes.append((stop - start) * self.shape[-1])
        return raw(self, start, stop)

    monkeypatch.setattr(StoredTensor, "read_bytes", counted)
    model = tiny_model("llama", dtype=torch.float32)
    file = GGUF(write(tmp_path / "a.gguf", model))
    for slab in (1, 16 * 5, 16 * 7 + 3):
        monkeypatch.setattr("minimas.formats.gguf.CHUNK_WEIGHTS", slab)
        sizes.clear()
        assert all(
            torch.equal(file.read(name, torch.float32), w) for name, w in model.state_dict().items()
        )
        assert max(sizes) <= max(slab, 24)


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    """gguf's own reader takes 7 seconds for the header of a Qwen file.

    The header here has the same size.
    """
    tokens = struct.pack("<IIQ", 9, 8, 300_000) + b"".join(text(f"t{i}") for i in range(300_000))
    types = struct.pack("<IIQ", 9, 5, 300_000) + struct.pack("<300000i", *[1] * 300_000)
    content = raw_file({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    with within(10):
        assert opened(tmp_path / "a.gguf", content).shapes


def test_a_file_that_shrinks_raises_an_error_and_does_not_crash(tmp_path: Path) -> None:
    """With a memory mapping it would be a bus error, which ends the process."""
    file = GGUF(write(tmp_path / "a.gguf", tiny_model(dtype=torch.float32)))
    (tmp_path / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"a\.gguf: found the end of the file inside a tensor"):
        [file.read(name, torch.float32) for name in file.shapes]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    """transformers is a second reader of the same file, including the Q and K rows."""
    transformers = pytest.importorskip("transformers")
    sizes = {"head_dim": 8, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 96}
    model = tiny_model(family, dtype=torch.float32, **sizes)
    words = {
        "general.name": "tiny",
        f"{family}.rope.dimension_count": 8,
        f"{family}.vocab_size": 96,
    }
    file = GGUF(write(tmp_path / "a.gguf", model, "Q8_0", words))
    raw = file.files["config.json"]
    kind = transformers.Qwen2ForCausalLM if family == "qwen2" else transformers.LlamaForCausalLM
    theirs = kind(kind.config_class(**raw)).eval()
    reader = pytest.importorskip(
        "transformers.modeling_gguf_pytorch_utils"
    )  # from_pretrained asks for accelerate
    read = reader.load_gguf_checkpoint(
        str(tmp_path / "a.gguf"), return_tensors=True, model_to_load=theirs
    )
    assert theirs.load_state_dict(read["tensors"], strict=True)
    assert all(
        torch.equal(file.read(name, torch.float32), weight)
        for name, weight in read["tensors"].items()
    )
    ours, ids = filled(file), random_ids(model, 1, 12)
    with torch.no_grad():
        expected = theirs(ids).logits
    assert apart(ours.logits(remember(ours, ids)[0]), expected) < 1e-5


# -- tied embeddings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embedding", "head"), [("Q4_0", "Q8_0"), ("Q8_0", "Q4_1"), ("F16", "Q5_0"), ("F32", "F32")]
)
def test_two_copies_of_one_matrix_are_tied_and_the_finer_one_is_used(
    embedding: str, head: str, tmp_path: Path
) -> None:
    """As two matrices, they would make W_a differ from the identity."""
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=True, hidden_size=32)
    weight = model.model.embed_tokens.weight.data
    kinds = {"token_embd.weight": embedding, "output.weight": head}
    file = GGUF(write(tmp_path / "a.gguf", model, kinds, {"output.weight": weight}))
    assert file.config.tie_word_embeddings
    assert "lm_head.weight" not in file.shapes
    bits = {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q8_0": 8.5, "F16": 16.0, "F32": 32.0}
    finer = max(embedding, head, key=lambda kind: bits[kind])
    assert file.tensors["model.embed_tokens.weight"].kind == finer
    expected = torch.from_numpy(
        dequantize(quantize(weight.numpy(), Kind[finer]), Kind[finer])
    ).view_as(weight)
    assert torch.equal(file.read("model.embed_tokens.weight", torch.float32), expected)


def coarse(weight: Tensor) -> Tensor:
    """Return the matrix with the precision of Q2_K.

    Each group of sixteen weights has four levels, with an error of about 3/10.
    """
    groups = weight.view(len(weight), -1, 16)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 3
    return (((groups - low) / step).round() * step + low).view_as(weight)


@pytest.mark.parametrize(("kind", "tied"), [("Q2_K", True), ("Q4_K", False)])
def test_a_coarser_type_may_differ_more_and_still_be_a_copy(
    kind: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied model's Q2_K embedding was treated as another matrix than its Q8_0 head."""
    model = random_model(
        tiny_config(hidden_size=256, intermediate_size=32, tie_word_embeddings=True),
        dtype=torch.float32,
    )
    weight = model.model.embed_tokens.weight.data
    rounded = coarse(weight)
    assert 0.2 < apart_by_norm(rounded, weight) < 0.4
    path = write(tmp_path / "a.gguf", model, {"output.weight": "Q8_0"}, {"output.weight": weight})
    content = path.read_bytes()
    name = text("token_embd.weight") + struct.pack("<IQQ", 2, 256, 41)
    number = struct.pack("<I", int(Kind[kind]))
    path.write_bytes(content.replace(name + struct.pack("<I", 0), name + number))
    read = StoredTensor.read

    def decoded(self: StoredTensor, start: int, stop: int) -> Tensor:
        return rounded[start:stop] if self.kind == kind else read(self, start, stop)

    monkeypatch.setattr(StoredTensor, "read", decoded)
    file = GGUF(path)
    assert file.config.tie_word_embeddings is tied
    assert file.tensors["model.embed_tokens.weight"].kind == ("Q8_0" if tied else kind)


def test_an_untied_head_is_not_treated_as_a_copy(tmp_path: Path) -> None:
    """This holds even if it was initialized as a copy and then trained."""
    model = tiny_model(dtype=torch.float32)
    near = model.model.embed_tokens.weight.data + 0.4 * torch.randn(
        41, 16, generator=torch.Generator().manual_seed(1)
    )
    model.lm_head.weight.data.copy_(near)
    file = GGUF(write(tmp_path / "a.gguf", model))
    assert not file.config.tie_word_embeddings
    assert torch.equal(file.read("lm_head.weight", torch.float32), near)


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_equal_first_rows_do_not_make_an_untied_head_a_copy(tmp_path: Path, first: float) -> None:
    """The first tokens may be unused. Logits came from the wrong matrix then."""
    model = tiny_model(dtype=torch.float32, vocab_size=200)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.data[:64] = first
    file = GGUF(write(tmp_path / "a.gguf", model))
    assert not file.config.tie_word_embeddings
    assert torch.equal(file.read("lm_head.weight", torch.float32), model.lm_head.weight)


# -- shards ----------------------------------------------------------------------------------------


def sharded(path: Path, model: Qwen3) -> list[Path]:
    write(path / "m.gguf", model, split_max_tensors=9)
    return sorted(path.glob("m-*.gguf"))


def test_any_shard_loads_all_shards(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    paths = sharded(tmp_path, model)
    assert len(paths) == 3
    for path in paths:
        assert all(
            torch.equal(w, filled(GGUF(path)).state_dict()[name])
            for name, w in model.state_dict().items()
        )


def test_a_shard_that_is_missing_or_foreign_is_named(tmp_path: Path) -> None:
    """Tensors of a missing shard would keep their uninitialized values."""
    first, second, third = sharded(tmp_path, tiny_model("llama", dtype=torch.float32))
    content = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(ValueError, match=r"found it repeated, expected it once"):
        GGUF(first)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003\.gguf'"):
        GGUF(third)
    second.write_bytes(content.replace(b"blk.0.", b"blk.1.").replace(b"blk.1.", b"blk.0."))
    with pytest.raises(ValueError, match="found it repeated, expected it once"):
        GGUF(first)
    second.write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"renamed\.gguf-00001-of-00003\.gguf'"):
        GGUF(first.rename(tmp_path / "renamed.gguf"))


# -- tokenizers ------------------------------------------------------------------------------------


TEXTS = [
    "",
    "Hello  world\n\n\tit's 12345",
    "naïve e\u0301 日本語 👩‍👩‍👧 \u00a0x",
    "<|im_start|>user\nWe'LL<|im_end|>",
    "ab<tool>12",
]
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(pre: str) -> Backend:
    """Return a small tokenizer that splits as `pre` says, made of the library's own classes."""
    tokenizer, byte_level = (
        Backend(models.BPE(ignore_merges=pre == "llama-bpe")),
        pre_tokenizers.ByteLevel,
    )
    number = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}.get(pre)
    if number:
        words = Regex(WORDS.replace(r"\p{N}{1,3}", number))
        steps = [
            pre_tokenizers.Split(words, "isolated"),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        steps += [byte_level(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.Sequence(steps),
        decoders.ByteLevel(),
    )
    if pre == "qwen2":
        from tokenizers.normalizers import NFC

        tokenizer.normalizer = NFC()
    alphabet = byte_level.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=CONTROLS if pre == "smollm" else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.add_special_tokens(CONTROLS)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def words_of(tokenizer: Backend, cut: str, **changes: Any) -> dict[str, Any]:
    """Return the tokenizer's metadata as llama.cpp's converter writes it.

    It has three padding tokens.
    """
    raw, added = json.loads(tokenizer.to_str()), tokenizer.get_added_tokens_decoder()
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [by_id[i] for i in range(len(by_id))] + [f"[PAD{i}]" for i in range(3)]
    types = [
        3 if i in added and added[i].special else 4 if i in added else 1 for i in range(len(by_id))
    ] + [5] * 3
    fields = {
        "model": "gpt2",
        "pre": cut,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "padding_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    fields |= changes
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def with_words(path: Path, words: dict[str, Any], family: str = "qwen3") -> GGUF:
    return GGUF(
        write(path / "a.gguf", tiny_model(family, dtype=torch.float32, vocab_size=500), extra=words)
    )


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_file_gives_the_tokenizer_that_it_was_made_from(
    pre: str, family: str, tmp_path: Path
) -> None:
    """Ids, text and control tokens are equal.

    Added tokens may be inside the vocabulary (SmolLM) or after it (Qwen).
    """
    original = trained(pre)
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    file = with_words(
        tmp_path, words_of(original, pre) | {"tokenizer.chat_template": template}, family
    )
    assert file.no_tokenizer is None
    for name, content in file.files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert file.files["tokenizer.json"]["model"]["ignore_merges"] == (pre == "llama-bpe")
    ours = Tokenizer(tmp_path)
    assert ours.backend.get_vocab(True) == original.get_vocab(True)
    assert ours.size == original.get_vocab_size(True)
    for sample in TEXTS:
        assert ours.encode(sample) == original.encode(sample).ids
        assert ours.decode(ours.encode(sample)) == original.decode(original.encode(sample).ids)
    assert set(ours.control) == {*CONTROLS, "<tool>"}
    end = original.token_to_id("<|im_end|>")
    assert ours.end_ids == {end}
    assert file.files["generation_config.json"]["eos_token_id"] == [
        end,
        original.token_to_id("<|endoftext|>"),
    ]
    config = file.files["tokenizer_config.json"]
    assert config["chat_template"] == template
    assert config.get("bos_token") == ("<|im_start|>" if family == "llama" else None)
    assert (config["eos_token"], config["pad_token"], config["unk_token"]) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )


def test_pre_tokenizers_split_a_text_differently() -> None:
    """If all of them split a text alike, the test above could not detect a wrong one."""
    cuts = []
    for pre in sorted(PRE_TOKENIZERS):
        backend = Backend.from_str(json.dumps({"version": "1.0", "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
            "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "vocab": {}, "merges": []}}))  # fmt: skip
        cuts.append(
            [
                piece
                for piece, _ in backend.pre_tokenizer.pre_tokenize_str("We'LL see 12345 ☃x!\n\n y")
            ]
        )
    assert len({tuple(cut) for cut in cuts}) == len(PRE_TOKENIZERS)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1},
            Sampling(0.6, 0.95, 20, 1.1, min_p=0.05),
        ),
        ({"top_p": 0.9}, Sampling(1.0, 0.9, 50)),  # Hugging Face's own defaults for the others
        ({"penalty_repeat": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"temp": 0.0, "penalty_repeat": 1.1}, Sampling(repetition_penalty=1.1)),
        ({}, Sampling()),
    ],
)
def test_a_gguf_file_has_the_sampling_of_the_folder_that_it_was_made_from(
    found: dict[str, Any], expected: Sampling, tmp_path: Path
) -> None:
    """Qwen3 repeats itself without end if it decodes greedily, as it did from a GGUF file."""
    extra = {f"general.sampling.{name}": value for name, value in found.items()}
    lm = load(write(tmp_path / "a.gguf", tiny_model("qwen3"), extra=extra))
    assert lm.sampling == expected


def test_a_wrong_sampling_value_of_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    extra = {"general.sampling.temp": 0.6, "general.sampling.top_p": 1.5}
    lm = load(write(tmp_path / "a.gguf", tiny_model("qwen3"), extra=extra))
    with pytest.raises(ValueError, match=r"a\.gguf.*generation_config\.json: top_p: found 1\.5"):
        _ = lm.sampling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"tokenizer\.ggml\.model: found nothing, expected a value of type str"),
        ({"model": "llama"}, r"tokenizer\.ggml\.model: found 'llama', expected 'gpt2'"),
        ({"pre": "default"}, r"tokenizer\.ggml\.pre: found 'default', expected one of .*smollm"),
        ({"pre": None}, r"tokenizer\.ggml\.pre: found nothing"),
        ({"merges": None}, r"tokenizer\.ggml\.merges: found nothing"),
        (
            {"merges": ["a b c"]},
            r"tokenizer\.ggml\.merges: found .*, expected two tokens that make a third",
        ),
        ({"merges": ["☃ b"]}, r"tokenizer\.ggml\.merges: found"),
        ({"token_type": [1, 1]}, r"tokenizer\.ggml\.token_type: found 2, expected 4"),
        (
            {"tokens": ["a", "a"], "token_type": [1, 1], "merges": ["a a"]},
            r"tokenizer\.ggml\.tokens: found a repeated token",
        ),
    ],
)
def test_a_tokenizer_that_is_not_fully_specified_is_left_out_with_a_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """With nearly correct ids, a model silently performs badly. The model itself still loads."""
    file = with_words(
        tmp_path, words_of(trained("gpt-2"), "gpt-2", **{"eos_token_id": 7} | changes)
    )
    assert file.no_tokenizer is not None
    assert file.files.keys() == {"config.json", "generation_config.json"}
    assert file.files["generation_config.json"]["eos_token_id"][0] == 7
    with pytest.raises(ValueError, match=message):
        raise ValueError(file.no_tokenizer)
    assert "a.gguf: " in file.no_tokenizer and "\n" not in file.no_tokenizer
    filled(file)


# -- what is refused -------------------------------------------------------------------------------


def bad(
    fields: dict[str, Any] | None = None, tensors: Any = None, **options: Any
) -> Callable[[], bytes]:
    return lambda: raw_file(fields, tensors, **options)


def q(name: str, value: Any) -> Callable[[], bytes]:
    return bad({f"qwen3.{name}": value})


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing in it": (
        lambda: b"",
        "GGUF header: found the end of the file at byte 0, expected 24 bytes",
    ),
    "another format": (
        bad(head=(b"GGML", 3, None, None)),
        "magic: found b'GGML', expected b'GGUF'",
    ),
    "an old version": (bad(head=(b"GGUF", 1, None, None)), "version: found 0x1, expected 2 or 3"),
    "big-endian": (
        bad(head=(b"GGUF", 3 << 24, None, None)),
        "version: found 0x3000000, expected .* little-endian",
    ),
    "a vast count of tensors": (
        bad(head=(b"GGUF", 3, 2**60, None)),
        "tensor dimensions: found 0, expected 1 to 4",
    ),
    "a vast count of fields": (
        bad(head=(b"GGUF", 3, None, 2**60)),
        "metadata name: found the end of the file",
    ),
    "one field too many": (bad(head=(b"GGUF", 3, None, 13)), "found .*, expected"),
    "half a header": (lambda: raw_file()[:200], "found the end of the file at byte 200"),
    "half a tensor table": (lambda: raw_file(data=0)[:-48], "found .*, expected"),
    "half the data": (
        lambda: raw_file()[:-1],
        r"tensor 'token_embd\.weight': found bytes up to .*, expected",
    ),
    "an unknown value": (bad({"x": struct.pack("<I", 13)}), "'x': found value type 13"),
    "a nested array": (
        bad({"x": struct.pack("<IIQ", 9, 9, 1)}),
        "'x': found value type 9, .* a scalar or a string",
    ),
    "a vast array": (
        bad({"x": struct.pack("<IIQ", 9, 0, 2**40)}),
        "'x': found 1,099,511,627,776 elements, expected at most 10,000,000",
    ),
    "an array too long": (
        bad({"x": struct.pack("<IIQ", 9, 4, 9**6)}),
        "'x': found the end of the file",
    ),
    "strings too many": (
        bad({"x": struct.pack("<IIQ", 9, 8, 9**6)}),
        "'x': found the end of the file|'x'.*UTF-8",
    ),
    "a vast string": (
        bad({"x": struct.pack("<IQ", 8, 2**63)}),
        "'x': found the end of the file .*, expected 9,223,",
    ),
    "no UTF-8": (bad({"x": struct.pack("<IQ", 8, 1) + b"\xff"}), "'x': found .*, expected UTF-8"),
    "a field twice": (
        lambda: raw_file({"a": 1, "b": 2}).replace(text("b"), text("a")),
        "'a': found it repeated",
    ),
    "alignment zero": (bad({"general.alignment": 0}), r"general\.alignment: found 0, expected"),
    "an alignment in words": (
        bad({"general.alignment": "32"}),
        r"general\.alignment: found '32', expected .* type int",
    ),
    "no dimensions": (
        bad(tensors={"output_norm.weight": ((), 0, 0)}),
        "tensor dimensions: found 0, expected 1 to 4",
    ),
    "a size of zero": (
        bad(tensors={"output_norm.weight": ((0,), 0, 0)}),
        r"found \(0,\), expected sizes above 0",
    ),
    "a vast size": (
        bad(tensors={"output_norm.weight": ((2**63, 2**63), 0, 0)}),
        "found bytes up to 340,282,.*, expected at most",
    ),
    "an offset beyond": (
        bad(tensors={"output_norm.weight": ((16,), 0, 2**60)}),
        "found bytes up to 1,152,",
    ),
    "half a block": (
        bad(tensors={"output.weight": ((16, 2), 8, 0)}),
        r"\(2, 16\), expected .* a multiple of 32 for Q8_0",
    ),
    "a tensor twice": (
        bad(tensors=[*TINY_TENSORS.items()] * 2),
        r"'token_embd\.weight': found it repeated, expected it once",
    ),
    "an unknown type": (
        bad(tensors={"output.weight": ((32, 2), 999, 0)}),
        r"'output\.weight': found type 999 \(",
    ),
    "a type nobody decodes": (
        bad(tensors={"output.weight": ((32, 1), 9, 0)}),
        r"found type 9 \(.*Q8_1.*, expected",
    ),
    "whole numbers": (
        bad(tensors={"output.weight": ((32, 1), 26, 0)}),
        r"found type 26 \(.*I32.*, expected",
    ),
    "a scaling": (
        bad(tensors={"rope_freqs.weight": ((4,), 0, 0)}),
        r"rope_freqs\.weight': found RoPE scaling, expected none",
    ),
    "no embeddings": (
        bad(tensors=[("output.weight", ((16, 41), 0, 0))]),
        r"token_embd\.weight: found nothing, expected a matrix",
    ),
    "another architecture": (
        bad({"general.architecture": "gemma3"}),
        r"found 'gemma3', expected one of qwen3",
    ),
    "no architecture": (
        bad({"general.architecture": None}),
        r"general\.architecture: found nothing, expected",
    ),
    "a missing size": (
        q("embedding_length", None),
        r"config\.json: hidden_size: found None, expected a positive integer",
    ),
    "a size in words": (
        q("block_count", "2"),
        r"config\.json: num_hidden_layers: found '2', expected a positive integer",
    ),
    "a size that is true": (
        q("block_count", True),
        r"config\.json: num_hidden_layers: found True, expected a positive integer",
    ),
    "no layers": (q("block_count", 0), "num_hidden_layers: found 0, expected a positive integer"),
    "no heads": (
        q("attention.head_count", 0),
        "num_attention_heads: found 0, expected a positive integer",
    ),
    "heads by layer": (
        q("attention.head_count_kv", struct.pack("<IIQ2i", 9, 5, 2, 2, 1)),
        r"config\.json: num_key_value_heads: found \[2, 1\], expected a positive integer",
    ),
    "no base": (
        q("rope.freq_base", None),
        r"config\.json: rope_theta: found None, expected a positive number",
    ),
    "a base of nan": (q("rope.freq_base", float("nan")), "rope_theta: found nan"),
    "an epsilon in words": (
        q("attention.layer_norm_rms_epsilon", "x"),
        r"config\.json: rms_norm_eps: found 'x', expected a positive number",
    ),
    "a part of the head turned": (
        q("rope.dimension_count", 4),
        r"rope\.dimension_count: found 4, expected 6",
    ),
    "values of another size": (
        q("attention.value_length", 4),
        r"attention\.value_length: found 4, expected 6",
    ),
    "yarn": (
        q("rope.scaling.type", "yarn"),
        r"qwen3\.rope\.scaling\.type: found 'yarn', expected 'none'",
    ),
    "a factor": (
        q("rope.scaling.factor", 4.0),
        r"qwen3\.rope\.scaling\.factor: found 4\.0, expected 0",
    ),
    "experts": (q("expert_count", 8), r"qwen3\.expert_count: found 8, expected 0"),
    "a window": (
        q("attention.sliding_window", 4096),
        r"qwen3\.attention\.sliding_window: found 4096, expected 0",
    ),
    "both ways": (
        q("attention.causal", False),
        r"qwen3\.attention\.causal: found False, expected True",
    ),
    "an end beyond": (
        bad({"tokenizer.ggml.eos_token_id": 41}),
        r"eos_token_id: found 41, expected an id below 41",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_gives_an_error_of_one_line(what: str, tmp_path: Path) -> None:
    """Otherwise a damaged or foreign file gives a model of noise, or exhausts the memory."""
    content, message = BAD[what]
    with within(30), pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path / "bad.gguf", content())
    assert str(caught.value).startswith(f"{tmp_path / 'bad.gguf'}: ") and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cls.weight", "cls.weight"),
        ("blk.0.ffn_up_exps.weight", "model.layers.0.ffn_up_exps.weight"),
        ("blk.2.attn_q.weight", "model.layers.2.self_attn.q_proj.weight"),
        ("weight", "weight"),
    ],
)
def test_a_tensor_that_the_model_does_not_have_is_refused(
    name: str, key: str, tmp_path: Path
) -> None:
    """If an expert or an adapter is ignored, the model is not that of the file."""
    model = tiny_model(dtype=torch.float32)
    path = write(tmp_path / "a.gguf", model, extra={name: torch.ones(4)})
    with pytest.raises(ValueError, match=rf"a\.gguf: tensor {key}: unexpected"):
        load(path, device="cpu")


@pytest.mark.parametrize("shape", [(16,), (16, 40, 1), (8, 82)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Rows of another length would give a model of noise."""
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_file(tensors=[("token_embd.weight", (shape, 0, 0))]))
    with pytest.raises(ValueError, match=r"a\.gguf: tensor model\.embed_tokens\.weight: found"):
        load(path, device="cpu")


def test_the_file_that_all_bad_files_are_based_on_is_valid(tmp_path: Path) -> None:
    """Otherwise all of them could be refused for the same wrong reason."""
    ones = tiny_model("llama", dtype=torch.float32)
    assert (
        opened(tmp_path / "a.gguf", raw_file({"qwen3.rope.scaling.type": "none"})).config.vocab_size
        == 41
    )
    assert opened(tmp_path / "a.gguf", raw_file(head=(b"GGUF", 2, None, None))).shapes
    assert GGUF(write(tmp_path / "b.gguf", ones)).config == ones.config
    with pytest.raises(FileNotFoundError, match=r"c\.gguf'"):
        GGUF(tmp_path / "c.gguf")


def test_common_types_need_no_package_and_others_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(dtype=torch.float32, hidden_size=32, intermediate_size=32, head_dim=8)
    for kind in ("F16", "Q4_0", "Q5_0", "MXFP4"):
        write(tmp_path / f"{kind}.gguf", model, kind)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for kind in ("F16", "Q4_0", "Q5_0"):
        file = GGUF(tmp_path / f"{kind}.gguf")
        assert all(bool(file.read(name, torch.float32).isfinite().all()) for name in file.shapes)
    with pytest.raises(
        ImportError, match=r"MXFP4\.gguf: tensor '.*': found type MXFP4, .*: pip install -U gguf"
    ):
        load(tmp_path / "MXFP4.gguf", device="cpu")


@pytest.fixture(scope="module")
def complete_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a small file with a tokenizer, three tensor types and two copies of the embedding."""
    model = random_model(
        tiny_config("llama", num_hidden_layers=1, hidden_size=32, vocab_size=64), 0, torch.float32
    )
    kinds = {"blk.0.attn_q.weight": "Q4_1", "output.weight": "Q8_0", "blk.0.ffn_up.weight": "Q5_0"}
    tokens = [*"abcd", "ab", "<|im_end|>"]
    words = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [1, 1, 1, 1, 1, 3],
        "merges": ["a b"],
    }
    extra = {f"tokenizer.ggml.{name}": value for name, value in words.items()} | {
        "tokenizer.ggml.eos_token_id": 5
    }
    path = write(tmp_path_factory.mktemp("whole") / "a.gguf", model, kinds, extra)
    assert GGUF(path).no_tokenizer is None
    return path.read_bytes()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_an_error_or_another_model_but_no_crash(
    data: st.DataObject, complete_file: bytes, tmp_path: Path
) -> None:
    """Bytes are changed or cut off anywhere, mostly in the header."""
    content = bytearray(complete_file)
    header = complete_file.index(b"output.weight") + 400
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(complete_file) - 1)))
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    try:
        with within():  # a huge count that is accepted would take minutes
            file = opened(tmp_path / "a.gguf", bytes(content))
            with torch.device("meta"):  # as in `load`: damaged sizes may be huge
                wanted = Qwen3(file.config).state_dict()
            expected = {name: tuple(weight.shape) for name, weight in wanted.items()}
            if file.shapes == expected:
                for name in file.shapes:
                    file.read(name, torch.float32)
                    if file.low_bits(name) == "q4":
                        file.blocks(name)
    except ValueError as error:
        assert str(error).startswith(str(tmp_path / "a.gguf")) and "\n" not in str(error)


@pytest.mark.parametrize(
    "field", ["final_logit_softcapping", "rope.dimension_sections", "attention.temperature_scale"]
)
def test_scaling_metadata_is_refused(field: str, tmp_path: Path) -> None:
    """It was ignored, so the logits were wrong."""
    with pytest.raises(ValueError, match=rf"qwen3\.{field}: found 2\.0, expected 0"):
        opened(tmp_path / "a.gguf", raw_file({f"qwen3.{field}": 2.0}))


# -- loading ---------------------------------------------------------------------------------------


def test_a_file_gives_the_same_answers_as_its_folder(tmp_path: Path) -> None:
    """Config, tokenizer, template, end tokens and weights all come from the one file."""
    model = random_model(tiny_config(vocab_size=500, tie_word_embeddings=True), dtype=torch.float32)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"
    )
    words = words_of(trained("qwen2"), "qwen2") | {"tokenizer.chat_template": template}
    path = write(tmp_path / "a.gguf", model, extra=words)
    folder = write_folder(tmp_path / "folder", model)
    for name, content in GGUF(path).files.items():
        if name != "config.json":
            (folder / name).write_text(json.dumps(content))
    results = []
    for source in (path, folder):
        lm = load(source, device="cpu")
        options = {"sampling": Sampling(max_new_tokens=12), "kind": "free"}
        results.append([lm.end_ids, lm.model.fingerprint(), *(
            [(r.text, r.agents[0].prompt) for r in method(lm, ["What is two and two?"], **options)]
            for method in (single, latent_mas)
        )])  # fmt: skip
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_keeps_its_size_when_loaded(kind: str, family: str, tmp_path: Path) -> None:
    """Types with another layout than q4 were widened to 16 bits, and so were all embeddings.

    Llama's queries and keys are in order. 32-bit weights and 4 bits are used on request.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    model = random_model(tiny_config(family, **sizes), dtype=torch.float32)
    path = write(tmp_path / "a.gguf", model, kinds=kind)
    exact = load(path, device="cpu", dtype="float32").model
    assert not any(isinstance(module, QuantizedLinear) for module in exact.modules())
    model = load(path, device="cpu").model
    assert not [name for name, x in model.named_parameters() if x.ndim > 1]  # no matrix is wide
    four_bits = kind.startswith("Q4")
    for name, module in model.named_modules():
        if name.endswith(("_proj", "embed_tokens", "lm_head")):
            form = "Q4Linear" if four_bits and name.endswith("_proj") else "Q8Linear"
            assert type(module).__name__ == form
    for name, weight in exact.state_dict().items():
        # The scales of q4 are rounded to bf16.
        most = 0.005 if four_bits and name.endswith("_proj.weight") else 0.015
        assert apart(model.state_dict()[name].double(), weight.double()) <= most, name
    ids = random_ids(model, 1, 6)
    # The states are close.
    assert apart(remember(model, ids)[0].double(), remember(exact, ids)[0].double()) <= 0.2
    for asked in ("q8", "q4"):
        layer = load(path, device="cpu", quantize=asked).model.model.layers[0].self_attn.q_proj
        assert type(layer).__name__ == ("Q4Linear" if four_bits or asked == "q4" else "Q8Linear")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_tied_file_has_one_matrix_for_embedding_and_head(dtype: str, tmp_path: Path) -> None:
    """There were two matrices, of 16 and 8 bits.

    The look-up, the product and W_a must use the same numbers, in a copy of the model too.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    config = tiny_config(**sizes, tie_word_embeddings=True)
    path = write(tmp_path / "a.gguf", random_model(config, dtype=torch.float32), kinds="Q5_1")
    lm = load(path, device="cpu", dtype=dtype)
    for model in (lm.model, copy.deepcopy(lm.model)):
        assert model.lm_head is model.model.embed_tokens
        weight, ids = model.model.embed_tokens.weight, torch.tensor([[3, 40], [0, 3]])
        assert weight.shape == (41, 32)
        found = model.embed(ids)
        assert found.dtype == model.dtype and torch.equal(found, weight[ids].to(model.dtype))
        hidden = model(found)
        expected = hidden.double() @ weight.double().T
        assert apart(model.logits(hidden).double(), expected) < 0.01
        assert model.fingerprint() == lm.model.fingerprint()
    norm = lm.model.model.embed_tokens.weight.double().norm(dim=-1).mean()
    assert lm.aligner("ridge").norm == pytest.approx(float(norm), rel=1e-5)
    with pytest.raises(ValueError, match="found a quantized model"):
        lm.model.to(torch.float32)


def test_a_model_with_only_an_8_bit_head_refuses_to_move(tmp_path: Path) -> None:
    """The layers before the head would already have moved."""
    model = random_model(tiny_config(hidden_size=32, head_dim=8), dtype=torch.float32)
    kinds = dict.fromkeys(tensors_of(model), "F16") | {"output.weight": "Q8_0"}
    lm = load(write(tmp_path / "a.gguf", model, kinds), device="cpu")
    assert lm.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="found a quantized model"):
        lm.model.to(torch.float32)
    assert {x.dtype for x in lm.model.parameters()} == {torch.bfloat16}


def test_a_file_without_a_known_tokenizer_says_why_when_it_is_needed(tmp_path: Path) -> None:
    """The model still accepts ids, but it cannot be asked a question."""
    words = words_of(trained("qwen2"), "qwen2", model="llama")
    lm = load(
        write(tmp_path / "a.gguf", tiny_model(dtype=torch.float32, vocab_size=500), extra=words)
    )
    assert lm.tokenizer is None
    with pytest.raises(
        ValueError, match=r"a\.gguf: tokenizer\.ggml\.model: found 'llama', expected"
    ):
        single(lm, ["hello"])
