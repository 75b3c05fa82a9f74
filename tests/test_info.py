"""Check how much memory `info` reports for a model, from a GGUF header or a config.json."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import load
from minimas.fast.quantize import Q4Linear, Q8Linear
from minimas.info import describe

from .formats.test_gguf import tensors_of, write
from .models import random_model, tiny_config, tiny_model, write_folder


def number(text: str) -> float:
    """Return the number of bytes at the start of a line, such as 12.3KB."""
    figure = text.split()[0].rstrip(":;,")
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    unit = next(unit for unit in ("kB", "MB", "GB", "B") if figure.endswith(unit))
    return float(figure.removesuffix(unit)) * units[unit]


def held(model: Any) -> int:
    """Return the bytes that the weights of a loaded model occupy."""
    tensors = list(model.parameters())
    for layer in model.modules():
        if isinstance(layer, Q4Linear):
            tensors += [layer.packed, layer.scales]
        if isinstance(layer, Q8Linear):
            tensors.append(layer.values)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "F32"])
def test_the_size_of_a_gguf_file_as_loaded_is_reported(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    """Only other formats were listed, and not the one in which `load` keeps the file."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # whole tiles
    config = tiny_config(**sizes, head_dim=16, vocab_size=99, tie_word_embeddings=tied)
    path = write(tmp_path / "a.gguf", random_model(config, dtype=torch.float32), kinds=kind)
    line = describe(path)["as loaded"]
    real = held(load(path, device="cpu").model)
    assert number(line) == pytest.approx(real, rel=0.02)
    assert "as in the file" in describe(path)["fits"]
    for name in ("q4", "q8"):  # the file's low-bit matrices stay as they are
        [size] = [
            part for part in describe(path)["weights"].split(", ") if part.startswith(f"{name} ")
        ]
        loaded = load(path, device="cpu", quantize=name).model
        assert number(size.removeprefix(name)) == pytest.approx(held(loaded), rel=0.02), name
    becomes = {
        "Q5_0": "Q5_0 rounded to q8",
        "Q8_0": "Q8_0 rounded to q8",
        "F16": "F16 as float16",
        "F32": "F32 as float32",
    }
    assert line.split(": ")[1] == becomes.get(kind, f"{kind} kept as q4, {kind} rounded to q8")


def test_a_tied_16_bit_embedding_in_a_4_bit_file_also_counts_its_8_bit_copy(tmp_path: Path) -> None:
    """The copy is the LM head."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    config = tiny_config(**sizes, head_dim=16, vocab_size=999, tie_word_embeddings=True)
    model = random_model(config, dtype=torch.float32)
    kinds = dict.fromkeys(tensors_of(model), "Q4_1") | {"token_embd.weight": "F16"}
    path = write(tmp_path / "a.gguf", model, kinds)
    line = describe(path)["as loaded"]
    assert number(line) == pytest.approx(held(load(path, device="cpu").model), rel=0.02)
    assert line.split(": ")[1] == "F16 as bfloat16, Q4_1 kept as q4"


def test_info_of_a_gguf_file_needs_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`info` asked for `pip install gguf` only to print a size."""
    config = tiny_config(hidden_size=32, intermediate_size=64, head_dim=8, vocab_size=96)
    model = random_model(config, dtype=torch.float32)
    path = write(tmp_path / "a.gguf", model, kinds="MXFP4")
    with_package = describe(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    without = describe(path)
    hint = without["as loaded"].removeprefix(with_package["as loaded"])
    assert "pip install -U gguf" in hint  # without the package, two matrices cannot be compared
    assert without | {"as loaded": ""} == with_package | {"as loaded": ""}


def test_the_kv_cache_size_depends_on_batch_size_context_and_new_tokens(tmp_path: Path) -> None:
    """The figure for one row does not apply to a batch of eight long texts."""
    folder = write_folder(tmp_path, tiny_model(dtype=torch.float32))
    slot = tiny_model(dtype=torch.float32).new_cache(1).slot_nbytes
    for rows, context, new in ((1, 960, 256), (8, 1000, 0), (3, 10, 2000)):
        line = describe(folder, rows, context, new)["memory"].partition("; ")[2]
        assert number(line) == pytest.approx(rows * (context + new) * slot, rel=0.01)
    huge = describe(folder, 10**6, 10**6, 10**6)
    assert "24 GB: none" in huge["fits"] and "24 GB: bfloat16" in describe(folder)["fits"]


def test_the_memory_of_this_machine_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only common GPU sizes were listed, and not the memory of the machine itself."""
    folder = write_folder(tmp_path, tiny_model(dtype=torch.float32))
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 5000}.get)
    assert "this machine's 5.00GB: bfloat16, " in describe(folder)["fits"]
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 10**5, "SC_PAGE_SIZE": 5000}.get)
    assert "this machine's 500MB: none" in describe(folder)["fits"]


def test_no_figure_is_zero(tmp_path: Path) -> None:
    """W_a of a tiny model was reported as "0 MB"."""
    for text in describe(write_folder(tmp_path, tiny_model(dtype=torch.float32))).values():
        assert not any(word in text for word in (" 0 MB", " 0.0 MB", " 0MB", " 0.00"))
    assert "1.02kB in float32" in describe(tmp_path)["alignment"]
