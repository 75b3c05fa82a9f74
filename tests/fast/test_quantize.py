"""Weights of 4 and 8 bits: what is stored, what the kernels compute, and what a model refuses."""

import copy
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minimas import KVCache, Sampling, latent_mas, load
from minimas.fast.order import KNOWN_TILES, unpack4
from minimas.fast.quantize import (
    FORMATS,
    GROUP,
    TORCH_FORMATS,
    Q4Linear,
    Q8Linear,
    QuantizedLinear,
    check,
    fit,
    quantized,
    round_rows,
)  # fmt: skip

from ..models import (
    TINY,
    apart_by_norm,
    random_ids,
    random_model,
    remember,
    tiny_config,
    write_folder,
)

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
NAMES = ["q4", "q8", *(pytest.param(name, marks=needs_bnb) for name in ("nf4", "int8"))]
# Relative rounding errors of each format for Gaussian weights, with a small margin.
LOSS = {"q4": 0.08, "q8": 0.012, "nf4": 0.11, "int8": 0.015}
SIZES = st.tuples(
    st.integers(1, 150), st.integers(1, 6).map(lambda groups: groups * GROUP), st.integers(0, 99)
)


def gaussian(N: int, K: int, seed: int) -> torch.Tensor:
    return (torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) / K**0.5).bfloat16()


def rows(R: int, K: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(R, K, generator=torch.Generator().manual_seed(seed)).bfloat16()


# -- from weights to values --------------------------------------------------------------------


@given(SIZES)
def test_fitting_is_never_worse_than_rounding_between_the_extremes(
    size: tuple[int, int, int],
) -> None:
    """The compared error is the one that it minimizes, for the stored values of every group."""
    weight = gaussian(*size)
    x = weight.float().view(-1, GROUP)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-30)
    zero = ((low + high + scale) / 2).bfloat16().float()
    scale = scale.bfloat16().float()
    plain = ((x - zero) / scale).round().add(8).clamp(0, 15).sub(8) * scale + zero
    values, scale, zero = fit(weight)
    fitted = (values.float().view(len(x), GROUP) - 8) * scale.float().view(
        -1, 1
    ) + zero.float().view(-1, 1)
    importance = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    assert bool(
        (
            (importance * (fitted - x).square()).sum(-1)
            <= (importance * (plain - x).square()).sum(-1)
        ).all()
    )
    assert int(values.max()) <= 15


@given(SIZES)
def test_weights_on_a_4_bit_grid_are_quantized_without_loss(size: tuple[int, int, int]) -> None:
    """GGUF files and AWQ folders hold weights that came from four bits."""
    N, K, seed = size
    source = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (N, K // GROUP, GROUP), generator=source)
    values[..., 0], values[..., 1] = 0, 15  # both ends of every grid are used
    scale = torch.randint(1, 9, (N, K // GROUP, 1), generator=source) / 64
    weight = ((values - 8) * scale).view(N, K).bfloat16()
    found = quantized("q4", weight, None)
    assert isinstance(found, QuantizedLinear) and apart_by_norm(
        found.weight, weight
    ) < 5e-3 < apart_by_norm(weight, found.weight * 1.1)


def test_rows_of_zeros_and_of_one_value_are_kept() -> None:
    """A range of zero must not cause a division by zero."""
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[1], weight[2] = 0.5, -3
    for name in ("q4", "q8"):
        layer = quantized(name, weight, None)
        assert isinstance(layer, QuantizedLinear) and apart_by_norm(layer.weight, weight) < 0.01
        assert bool((layer.weight[0].abs() < 1e-20).all())


# -- layers ------------------------------------------------------------------------------------


WARNS = """
import logging
from minimas.fast import bnb
bnb.import_module = lambda name: logging.getLogger("bitsandbytes.backends.cpu.ops").warning("!")
bnb._package()
logging.getLogger("bitsandbytes.cextension").error("an error")
"""


@needs_bnb
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_step_logs_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes warns at every int8 product.

    That printed 84 lines per token between a question and its answer.
    """
    layer = quantized(name, gaussian(64, 64, 0), None)
    assert layer is not None
    caplog.clear()
    layer(rows(3, 64))
    assert caplog.messages == []


def test_only_errors_of_bitsandbytes_are_shown() -> None:
    """On import it warns about missing kernels for a CPU or a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", WARNS], capture_output=True, text=True, check=False
    )
    assert done.stderr == "an error\n"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 3, 200])
def test_a_quantized_layer_is_close_to_its_matrix(name: str, count: int) -> None:
    weight, bias, x = gaussian(96, 128, 0), rows(1, 96, seed=2)[0], rows(count, 128)
    layer = quantized(name, weight, bias)
    assert layer is not None
    found, expected = layer(x[None]), F.linear(x.float(), weight.float(), bias.float())
    assert found.shape == (1, count, 96) and found.dtype == torch.bfloat16
    assert apart_by_norm(found[0].float() - bias.float(), expected - bias.float()) < LOSS[name]
    assert (
        apart_by_norm(layer(x.flip(1)[None])[0], expected) > 0.5
    )  # another input gives another output


@given(SIZES, st.sampled_from(["q4", "q8"]))
def test_the_kernel_for_few_rows_matches_the_stored_weights(
    size: tuple[int, int, int], name: str
) -> None:
    """A packed order that is misread gives fluent nonsense.

    It may show only after a long prompt, or only after a short one.
    """
    layer, x = quantized(name, gaussian(*size), None), rows(3, size[1])
    assert isinstance(layer, QuantizedLinear)
    expected = F.linear(x.double(), layer.weight.double())
    assert apart_by_norm(layer(x), expected) < 0.006
    many = x.repeat(140, 1)
    assert len(many) > layer.max_kernel_rows
    assert apart_by_norm(layer(many)[:3], expected) < 0.006


@pytest.mark.parametrize("name", ["q4", "q8"])
@pytest.mark.parametrize(
    "shape", [(1, 32), (65, 64), (1000, 1056), (130, 16384), (70, 2**17), (3, 2**16 + 32)]
)
def test_matrices_in_several_chunks_may_have_any_number_of_rows(
    name: str, shape: tuple[int, int]
) -> None:
    """The padding rows of the last tile were added to every chunk."""
    N, K = shape
    weight, bias = gaussian(N, K, 0), rows(1, N, seed=2)[0]
    layer = quantized(name, weight, bias)
    assert isinstance(layer, QuantizedLinear)
    assert apart_by_norm(layer.weight, weight) < LOSS[name]
    for count in (1, 3, 70):
        x = rows(count, K)
        expected = F.linear(x.double(), layer.weight.double(), bias.double())
        assert apart_by_norm(layer(x), expected) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_rows_need_not_be_contiguous(name: str) -> None:
    """The 4-bit kernels refuse such rows, and the last states of a batch are not contiguous."""
    layer, x = quantized(name, gaussian(64, 64, 0), None), rows(15, 64).view(3, 5, 64)
    assert layer is not None
    assert torch.equal(layer(x[:, -1:]), layer(x[:, -1:].contiguous()))
    if name in TORCH_FORMATS:  # without rows, bitsandbytes divides by 0 (AVX-512): a crash
        assert layer(x[:0]).shape == (0, 5, 64)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_quantized_layer_is_independent(name: str) -> None:
    """The copy had the state dict of the original."""
    layer, x = quantized(name, gaussian(64, 64, 0), None), rows(3, 64)
    assert layer is not None
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    stored = copied.state_dict()["weight"]
    assert torch.equal(stored, layer.state_dict()["weight"])
    assert stored.data_ptr() != layer.state_dict()["weight"].data_ptr()


ORDER = """
import torch
from minimas.fast.quantize import quantized
torch.manual_seed(0)
layer = quantized("q4", torch.randn(150, 96).bfloat16(), None)
through_the_kernel = layer.multiply(torch.eye(96).bfloat16()).T
same = torch.equal(through_the_kernel, layer.weight)
print(torch.backends.cpu.get_cpu_capability(), layer.tile, same)
"""


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="these are x86's"
)
@pytest.mark.parametrize(("capability", "tile"), [("default", None), ("avx2", 32)])
def test_weights_are_unpacked_correctly_on_other_x86_cpus(
    capability: str, tile: int | None
) -> None:
    """With another packing order, a CPU would compute every long prompt with a wrong matrix."""
    variables = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", ORDER], env=variables, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{capability.upper()} {tile} True\n", done.stderr


@given(st.sampled_from(KNOWN_TILES), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_each_order_is_unpacked_by_its_formula(
    tile: int, tiles: int, groups: int, seed: int
) -> None:
    """A machine has one of the orders."""
    N, K, source = 64 * tiles, GROUP * groups, torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (N, K), generator=source, dtype=torch.uint8)
    scales = torch.randn(groups, N, 2, generator=source).bfloat16()
    packed = torch.zeros(N // tile, K, tile // 2, dtype=torch.uint8)
    for row in range(N):
        at, place = divmod(row, tile)
        high, lane = divmod(place, tile // 2)
        packed[at, :, lane] |= values[row] << 4 * high
    scale, zero = scales.float().repeat_interleave(GROUP, 0).unbind(-1)  # (K, N)
    expected = ((values.float() - 8).T * scale + zero).T
    assert apart_by_norm(unpack4(packed.view(N, K // 2), scales, tile), expected) < 0.004


def test_an_unknown_packing_order_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new kernel in a later torch is then slower, but computes with the same matrix."""
    known = quantized("q4", gaussian(150, 96, 0), None)
    monkeypatch.setattr("minimas.fast.quantize.tile_of_this_cpu", lambda: None)
    unknown = quantized("q4", gaussian(150, 96, 0), None)
    assert isinstance(known, QuantizedLinear) and isinstance(unknown, QuantizedLinear)
    assert unknown.max_kernel_rows == torch.inf
    assert torch.equal(unknown.weight, known.weight)
    assert torch.equal(unknown(rows(700, 96)), unknown.multiply(rows(700, 96)))


@given(SIZES, st.sampled_from(["Q4_0", "Q4_1"]))
def test_blocks_of_a_gguf_file_keep_their_values(size: tuple[int, int, int], kind: str) -> None:
    N, K, seed = size
    source = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (N, K), generator=source).to(torch.uint8)
    scale = (torch.rand(N, K // GROUP, generator=source) + 0.1).half().float()
    minimum = torch.randn(N, K // GROUP, generator=source).half().float()
    offset = {"Q4_0": -8 * scale, "Q4_1": minimum}[kind]
    layer = Q4Linear(values, scale, offset + 8 * scale, None)
    x = rows(2, K)
    weight = values.double().view(N, -1, GROUP) * scale.double()[..., None]
    weight = (weight + offset.double()[..., None]).view(N, K)
    assert apart_by_norm(layer.weight, weight) < 0.004  # the rounding of bf16
    assert apart_by_norm(layer(x), F.linear(x.double(), weight)) < 0.01


def test_an_8_bit_layer_works_as_an_embedding() -> None:
    """It returns the rows of `weight`, bit for bit, for ids of any shape, even an empty one."""
    layer = quantized("q8", gaussian(50, 64, 0), None)
    assert isinstance(layer, Q8Linear)
    ids = torch.tensor([[[3, 49]], [[0, 3]]])
    assert torch.equal(layer(ids), layer.weight[ids])
    assert layer(ids[:0]).shape == (0, 1, 2, 64) and layer(ids).dtype == torch.bfloat16
    assert not torch.equal(layer(ids), layer.weight[ids + torch.tensor([0, -1])])
    wide = Q8Linear(gaussian(50, 64, 0).half(), None)  # in a float16 model
    assert wide(ids).dtype == torch.float16 and torch.equal(wide(ids), wide.weight[ids].half())


def test_a_row_with_large_values_does_not_change_its_neighbours() -> None:
    """The operator takes one scale for the whole batch.

    The answer to a question would then depend on the others.
    """
    weight, small_row = gaussian(64, 64, 0), rows(1, 64)
    layer = quantized("q8", weight, None)
    assert isinstance(layer, QuantizedLinear)
    both = torch.cat([small_row, 3000 * rows(1, 64, seed=5)])
    assert apart_by_norm(layer(both)[:1], layer(small_row)) < 0.003
    coarse = (both / (both.abs().amax() / 127)).round() * (both.abs().amax() / 127)
    assert apart_by_norm(F.linear(coarse[:1], weight), F.linear(small_row, weight)) > 0.5


def test_one_large_activation_does_not_round_the_others_to_zero() -> None:
    """Real models have outliers a thousand times as large as the rest."""
    weight, x = gaussian(64, 256, 0), rows(1, 256)
    x[0, 7] = 1000
    layer = quantized("q8", weight, None)
    assert isinstance(layer, QuantizedLinear)
    small = x.clone()
    small[0, 7] = 0
    found = layer(x).double() - 1000 * layer.weight[:, 7].double()
    assert (
        apart_by_norm(found, F.linear(small.double(), layer.weight.double())) < 0.6
    )  # bf16 rounds the sum
    unit = 1000 / 127
    assert bool(((small / unit).round() == 0).all())  # with one scale, all of them become zero


def test_many_rows_with_outliers_are_as_exact_as_few() -> None:
    """An outlier must not round small activations to zero, in its own row or another one."""
    weight, many = gaussian(64, 256, 0), rows(192, 256)
    many[5::7, 3] = 1000
    layer = quantized("q8", weight, None)
    assert isinstance(layer, Q8Linear)
    expected = F.linear(many.double(), layer.weight.double())
    found = layer(many).double()
    with_outlier, without_outlier = many[:, 3] == 1000, many[:, 3] != 1000
    small = many.clone()
    small[:, 3] = 0
    rest = found - many[:, 3:4].double() @ layer.weight[:, 3:4].double().T
    small_alone = F.linear(small[with_outlier].double(), layer.weight.double())
    assert apart_by_norm(rest[with_outlier], small_alone) < 0.6  # bf16 rounds the sum
    assert apart_by_norm(found[without_outlier], expected[without_outlier]) < 0.006


def test_a_gradient_through_many_rows_unpacks_a_matrix_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unpacking takes longer than the product, so it must not be repeated per chunk of rows."""
    layer, x = quantized("q8", gaussian(64, 64, 0), None), rows(320, 64).requires_grad_()
    assert isinstance(layer, Q8Linear)
    calls, unpack = [], layer.unpack
    monkeypatch.setattr(layer, "unpack", lambda: (calls.append(1), unpack())[1])
    layer(x).float().sum().backward()
    assert calls == [1]
    assert x.grad is not None and bool(x.grad.any())


@pytest.mark.parametrize("K", [33, 40, 48])
def test_rows_may_have_any_length(K: int) -> None:
    """The 8-bit kernel crashes the process if a row is not a multiple of its vectors."""
    layer, x = quantized("q8", gaussian(7, K, 0), None), rows(3, K)
    assert isinstance(layer, Q8Linear)
    assert apart_by_norm(layer(x), F.linear(x.double(), layer.weight.double())) < 0.006


@pytest.mark.parametrize("name", ["q4", "q8"])
def test_gradients_reach_the_input_of_a_quantized_layer(name: str) -> None:
    """With two layers: the second one must not unpack into the memory used by the first one."""
    first, second = (quantized(name, gaussian(64, 64, seed), None) for seed in (0, 1))
    assert first is not None and second is not None
    for count in (2, 200):
        x = rows(count, 64).requires_grad_()
        second(first(x)).float().sum().backward()
        assert x.grad is not None and float(x.grad.abs().sum()) > 0
        assert (
            apart_by_norm(
                x.grad, torch.ones(count, 64) @ second.weight.float() @ first.weight.float()
            )
            < 0.01
        )


# -- models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tied bf16 model whose sizes divide into groups."""
    config = tiny_config(
        hidden_size=64, intermediate_size=128, head_dim=16, tie_word_embeddings=True, vocab_size=97
    )
    return write_folder(
        tmp_path_factory.mktemp("quantized"), random_model(config, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize("name", ["q4", "q8"])
def test_a_quantized_model_equals_the_model_of_its_unpacked_weights(
    folder: Path, name: str
) -> None:
    """Every matrix is in its place and in the right order, and states agree up to bf16 rounding."""
    model = load(folder, device="cpu", quantize=name).model
    plain = random_model(model.config, dtype=torch.float64)
    state = model.state_dict()
    head = state.pop("lm_head.weight")
    plain.load_state_dict({key: value.double() for key, value in state.items()})
    ids = random_ids(model, 2, 9)
    hidden, expected = remember(model, ids)[0], remember(plain, ids)[0]
    assert apart_by_norm(hidden, expected) < 0.03 < 0.3 < apart_by_norm(hidden, expected.flip(0))
    assert apart_by_norm(model.logits(hidden), hidden.double() @ head.double().T) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_is_quantized_and_the_embedding_is_not(folder: Path, name: str) -> None:
    """W_a comes from exact embeddings.

    Otherwise a quantized model would use another map for its thoughts.
    """
    exact, lm = load(folder, device="cpu"), load(folder, device="cpu", quantize=name)
    assert not [key for key, module in lm.model.named_modules() if type(module) is torch.nn.Linear]
    assert torch.equal(lm.model.model.embed_tokens.weight, exact.model.model.embed_tokens.weight)
    found, expected = lm.aligner("ridge"), exact.aligner("ridge")
    assert (
        found.norm == expected.norm
        and found.matrix is not None
        and torch.equal(found.matrix, expected.matrix)
    )


def test_an_untied_head_is_not_quantized() -> None:
    """W_a also needs the exact W_out."""
    exact, lm = load(TINY, device="cpu"), load(TINY, device="cpu", quantize="q4")
    assert torch.equal(lm.model.lm_head.weight, exact.model.lm_head.weight)
    matrix, expected = (one.aligner("ridge").matrix for one in (lm, exact))
    assert matrix is not None and expected is not None
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("name", NAMES)
def test_agents_answer_in_every_format(name: str) -> None:
    """The embedded model answers correctly in each format, after latent thoughts."""
    lm = load(TINY, device="cpu", quantize=name)
    eva = "Eva has 2 cards. She finds 7 more. She loses 3. She doubles the cards. "
    eva += "How many cards does Eva have?"
    questions = [eva, "Tom has 3 coins. He loses 1. He gets 7 more. How many coins does Tom have?"]
    results = latent_mas(lm, questions, sampling=Sampling(max_new_tokens=16))
    assert [result.answer for result in results] == ["12", "9"]


@pytest.mark.parametrize("name", ["q4", "q8"])
def test_a_quantized_state_dict_has_the_names_of_hugging_face(folder: Path, name: str) -> None:
    exact = load(folder, device="cpu").model.state_dict()
    found = load(folder, device="cpu", quantize=name).model.state_dict()
    assert {key: value.shape for key, value in found.items() if key != "lm_head.weight"} == {
        key: value.shape for key, value in exact.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_cache_belongs_to_its_format(folder: Path, tmp_path: Path, name: str) -> None:
    """The fingerprint is the same after a step and in the next process.

    Another format has another fingerprint.
    """
    model = load(folder, device="cpu", quantize=name).model
    before = model.fingerprint()
    _, cache = remember(model, random_ids(model, 1, 5))
    cache.save(tmp_path / "memory.safetensors")
    assert model.fingerprint() == before
    again = load(folder, device="cpu", quantize=name).model
    assert KVCache.load(tmp_path / "memory.safetensors", again).lengths == [5]
    with pytest.raises(ValueError, match="model: found memory of"):
        KVCache.load(tmp_path / "memory.safetensors", load(folder, device="cpu").model)


def test_a_matrix_that_does_not_divide_into_groups_is_not_quantized(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning gives the number of such matrices, and loading does not fail."""
    config = tiny_config(hidden_size=64, intermediate_size=80, head_dim=16)
    model = load(
        write_folder(tmp_path, random_model(config, dtype=torch.bfloat16)),
        device="cpu",
        quantize="q4",
    ).model
    assert "2 matrices are not quantized" in caplog.text
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Q4Linear"
    assert not isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "move", [lambda m: m.to("meta"), lambda m: m.float(), lambda m: m.to(torch.float64)]
)
def test_a_packed_model_cannot_be_moved(folder: Path, name: str, move: Any) -> None:
    """Values that are packed for one device are silently wrong on another.

    The model must not be partly moved either.
    """
    model = load(folder, device="cpu", quantize=name).model
    before = model.fingerprint()
    with pytest.raises(
        ValueError, match="found a quantized model, packed for its device; expected load"
    ):
        move(model)
    assert model.fingerprint() == before and model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_model_or_a_part_of_it_cannot_be_overwritten_or_moved(
    folder: Path, name: str
) -> None:
    """bitsandbytes took new values and kept the old scales, or failed at the next step."""
    model = load(folder, device="cpu", quantize=name).model
    before = model.fingerprint()
    refused = r"to\(\) or load_state_dict\(\): found a quantized model, packed for its device"
    for state in (load(folder, device="cpu").model.state_dict(), model.state_dict()):
        with pytest.raises(ValueError, match=refused):
            model.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match=refused):
        model.model["layers"].float()
    assert model.fingerprint() == before


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_differ_only_in_their_scales_have_other_fingerprints(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """With nf4 and int8, a KV cache of one model was accepted by the other."""
    plain = load(folder, device="cpu").model
    for key, weight in plain.state_dict().items():
        if "proj" in key:
            weight.mul_(2)
    other = write_folder(tmp_path / "other", plain)
    one, two = (load(path, device="cpu", quantize=name).model for path in (folder, other))
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_layer_with_a_bias_saves_it(name: str) -> None:
    """nf4 and int8 left the biases of Qwen2 out of the state and of the fingerprint."""
    bias = torch.arange(64).bfloat16()
    layer = quantized(name, gaussian(64, 64, 0).bfloat16(), bias)
    assert layer is not None and torch.equal(layer.state_dict()["bias"], bias)


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_model_can_be_pickled(folder: Path, name: str) -> None:
    """nf4 and int8 were written by torch.save, and could not be read again."""
    model = load(folder, device="cpu", quantize=name).model
    again = pickle.loads(pickle.dumps(model))
    assert again.fingerprint() == model.fingerprint()
    ids = random_ids(model, 1, 5)
    assert torch.equal(remember(again, ids)[0], remember(model, ids)[0])


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("q5", None, r"quantize: found 'q5', expected one of q4, q8, nf4, int8"),
        ("", None, r"quantize: found ''"),
        ("q4", torch.float64, r"found 'q4' with float64, expected 16 or 32 bits"),
    ],
)
def test_a_format_that_cannot_run_is_refused_before_loading(
    name: str, dtype: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load("/nowhere/at/all", device="cpu", dtype=dtype or "auto", quantize=name)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "expected it: pip install bitsandbytes$"),
        ("0.41.3", "bitsandbytes 0.41.3, expected 0.46 or newer: pip install -U bitsandbytes$"),
    ],
)
def test_a_missing_or_old_package_is_named_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch, version: str | None, said: str
) -> None:
    from minimas.fast import bnb

    def fake(name: str) -> Any:
        if version is None:
            raise ImportError(name)
        return type("module", (), {"__version__": version})

    monkeypatch.setattr(bnb, "import_module", fake)
    with pytest.raises(ImportError, match=said):
        check("nf4", torch.device("cpu"), torch.bfloat16)


def test_the_table_of_formats_has_the_stored_bits_per_weight() -> None:
    """`minimas info` computes sizes from this table."""
    weight = gaussian(256, 256, 0)
    q4, q8 = quantized("q4", weight, None), quantized("q8", weight, None)
    assert isinstance(q4, QuantizedLinear) and isinstance(q8, QuantizedLinear)
    held = sum(t.numel() * t.element_size() for t in (q4.packed, q4.scales))
    assert held * 8 / weight.numel() == FORMATS["q4"]
    values, scale = round_rows(weight)
    assert values.element_size() * 8 == FORMATS["q8"] and scale.dtype == torch.bfloat16
