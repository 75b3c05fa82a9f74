"""16-bit products on a CPU: packing changes no bit.

CPUs without matrix units multiply in 32 bits.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minimas import Aligner, Qwen3, load
from minimas.core.config import FAMILIES
from minimas.fast import packed
from minimas.fast.packed import MAX_NARROW_ROWS, CPULinear, linear, pack, packing_is_faster

from ..models import random_ids, remember, tiny_model, write_folder

packing = pytest.mark.skipif(
    not packing_is_faster(), reason="this CPU or this torch cannot pack bf16 matrices"
)


@pytest.fixture
def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the CPU of most laptops on any machine."""
    monkeypatch.setattr(packed, "has_units", lambda dtype: dtype.itemsize != 2)
    monkeypatch.setattr(packed, "packing_is_faster", lambda: False)


# -- packed for matrix units -----------------------------------------------------------------------


@packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33])
def test_a_packed_layer_gives_the_same_bits(bias: bool, rows: int) -> None:
    """Packing only reorders weights. Any difference would be a change of the model."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 80, bias).to(torch.bfloat16).requires_grad_(False)
    packed = CPULinear(plain)
    for shape in ((rows, 48), (2, rows, 48)):
        x = torch.randn(shape).to(torch.bfloat16)
        assert torch.equal(packed(x), plain(x))
    assert packed.packed is not None


@packing
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_behaves_like_the_plain_one(family: str, tmp_path: Path) -> None:
    """state_dict, fingerprint, W_a and other dtypes must not use the packed weights as they are.

    The result would silently be nonsense.
    """
    plain = tiny_model(family, dtype=torch.bfloat16)
    model = load(write_folder(tmp_path, plain)).model
    layers = [module for module in model.modules() if isinstance(module, CPULinear)]
    assert len(layers) == 7 * 2 + 1

    def check_equal(other: Qwen3) -> None:
        x = other.embed(random_ids(other, 2, 5))
        assert torch.equal(model.logits(model(x)), other.logits(other(x)))
        assert all(
            torch.equal(model.state_dict()[name], tensor)
            for name, tensor in other.state_dict().items()
        )
        assert model.state_dict().keys() == other.state_dict().keys()
        assert model.fingerprint() == other.fingerprint()
        align, theirs = Aligner.from_model(model), Aligner.from_model(other)
        assert torch.equal(align(x), theirs(x))

    assert model.fingerprint() == plain.fingerprint()
    check_equal(plain)
    for layer in layers:  # there is only one copy of the weights
        assert layer.packed is not None
        assert "weight" not in layer._parameters
    check_equal(copy.deepcopy(plain))
    model.to(torch.float32)
    check_equal(copy.deepcopy(plain).to(torch.float32))
    model.to(torch.bfloat16)
    check_equal(plain)


@packing
def test_load_state_dict_works_on_packed_layers() -> None:
    """A packed layer has no parameter named weight, and load_state_dict must still find it."""
    model, other = (tiny_model("qwen2", seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    pack(model)
    ids = random_ids(model, 2, 5)
    remember(model, ids)
    model.load_state_dict(other.state_dict())
    assert torch.equal(remember(model, ids)[0], remember(other, ids)[0])


def test_a_tied_head_follows_an_embedding_that_is_replaced() -> None:
    """After load_state_dict(assign=True), logits came from the old embedding."""
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    pack(model)
    copied = copy.deepcopy(model)
    changed = {key: weight * 2 for key, weight in model.state_dict().items()}
    copied.load_state_dict(changed, assign=True)
    hidden = torch.randn(1, 1, model.config.hidden_size).bfloat16()
    for one in (model, copied):
        assert torch.equal(one.logits(hidden), F.linear(hidden, one.model.embed_tokens.weight))
    assert not torch.equal(model.logits(hidden), copied.logits(hidden))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_are_not_packed(dtype: torch.dtype) -> None:
    """The operators are only for bf16."""
    model = tiny_model(dtype=dtype)
    pack(model)
    remember(model, random_ids(model, 2, 5))
    assert not any(
        isinstance(module, CPULinear) and module.packed is not None for module in model.modules()
    )


def test_a_packed_layer_has_the_gradient_of_the_plain_one(tmp_path: Path) -> None:
    """The packed operator has no gradient.

    An optimized thought silently got gradients only through residuals and norms.
    """
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        model = load(
            write_folder(tmp_path / str(dtype), tiny_model(dtype=torch.bfloat16)), dtype=dtype
        ).model
        ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
        model(model.embed(ids))  # packs the bf16 model
        inputs = model.embed(ids).float().requires_grad_(True)
        model(inputs.to(dtype)).float().square().sum().backward()
        assert inputs.grad is not None
        gradients.append(inputs.grad)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.1


@pytest.mark.parametrize(
    ("dtype", "inputs", "loops"),
    [
        (torch.bfloat16, 8, True),
        (torch.bfloat16, 7, False),
        (torch.float16, 8, False),
        (torch.float32, 8, False),
    ],
)
def test_only_whole_words_of_bf16_go_to_the_loop(
    dtype: torch.dtype, inputs: int, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 is not the upper half of a float32, and half a word would belong to the next row."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    called = []
    product = packed.few_rows.product

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        called.append(x.shape)
        return product(x, weight)

    monkeypatch.setattr(packed.few_rows, "product", counted)
    torch.manual_seed(0)
    plain = nn.Linear(inputs, 4).to(dtype).requires_grad_(False)
    x = torch.randn(2, 1, inputs).to(dtype)
    assert torch.allclose(CPULinear(plain)(x).float(), plain(x).float(), atol=0.05)
    assert bool(called) == loops


# -- without matrix units --------------------------------------------------------------------------


def test_packing_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the operator everywhere.

    On a laptop without AVX-512 it raised an error at the first forward pass of every model.
    """

    def refuses(*args: Any) -> None:
        raise RuntimeError("bf16 path needs the cpu support avx512bw, avx512vl and avx512dq")

    assert packing_is_faster.__wrapped__() == packing_is_faster()
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuses, raising=False)
    assert not packing_is_faster.__wrapped__()


def test_a_torch_without_onednn_has_no_16_bit_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators are missing on a Mac, and asking for them raised AttributeError."""
    monkeypatch.setattr(packed, "mkldnn", object())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packed.has_units(torch.bfloat16) and not packed.has_units(torch.float16)
    assert not packing_is_faster.__wrapped__()


@pytest.mark.parametrize("native", [True, False])
def test_instructions_that_are_emulated_are_not_used(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch supports bf16 on every CPU with AVX-512. Most of Intel's until 2023 emulate it.

    There a prefill took 2.6 times as long as in 32 bits.
    """
    monkeypatch.setattr(packed, "AVX512", True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    for kind in ("bf16", "fp16"):
        name = f"_is_mkldnn_{kind}_supported"
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True, raising=False)
    for dtype in (torch.bfloat16, torch.float16):
        assert packed.has_units(dtype) == native
    assert packed.has_units(torch.float32)
    assert native or not packing_is_faster.__wrapped__()


@given(
    st.tuples(
        st.integers(1, 3),
        st.integers(1, 9),
        st.integers(1, 70),
        st.integers(1, 90),
        st.integers(0, 99),
    ),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from([1, 100, 1000]),
)
def test_many_rows_are_multiplied_in_32_bits_piece_by_piece(
    size: tuple[int, ...], dtype: torch.dtype, biased: bool, piece: int
) -> None:
    """Pieces in another order, or a bias added twice, give fluent nonsense.

    This happens on machines that CI seldom has.
    """
    B, T, N, K, seed = size
    torch.manual_seed(seed)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((B, T, K), (N, K), (N,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "has_units", lambda dtype: False)
        patch.setattr(packed, "CHUNK_WEIGHTS", piece)
        found = linear(x, weight, bias if biased else None)
    plain = F.linear(x, weight, bias if biased else None)
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    assert found.shape == (B, T, N) and found.dtype == dtype
    if B * T <= MAX_NARROW_ROWS:
        assert torch.equal(found, plain)
    else:  # one rounding of the sum, and those in 32 bits within it
        within = (
            F.linear(x.abs().double(), weight.abs().double(), bias.abs().double())
            * torch.finfo(torch.float32).eps
        )
        assert bool(
            (
                (found.double() - exact).abs()
                <= exact.abs() * torch.finfo(dtype).eps / 2 + 9 * within
            ).all()
        )


def test_on_a_gpu_or_in_32_bits_nothing_is_widened(
    no_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "CHUNK_WEIGHTS", None)  # widening raises a TypeError
    for x in (
        torch.ones(9, 8),
        torch.ones(9, 8).double(),
        torch.ones(9, 8, dtype=torch.bfloat16, device="meta"),
    ):
        linear(x, torch.ones_like(x), None)
    with pytest.raises(TypeError):
        linear(torch.ones(9, 8).bfloat16(), torch.ones(9, 8).bfloat16())


@pytest.mark.parametrize("quantize", [None, "q4", "q8"])
@pytest.mark.parametrize("tied", [True, False])
def test_without_units_torch_computes_no_16_bit_product_of_many_rows(
    quantize: str | None, tied: bool, no_units: None, tmp_path: Path
) -> None:
    """torch multiplies 512 rows in 512 times the time of one.

    A prefill would run at a sixth of the speed.
    """
    plain = tiny_model("qwen2", dtype=torch.bfloat16, tie_word_embeddings=tied)
    folder, ids = write_folder(tmp_path, plain), random_ids(plain, 2, 300)
    for model, narrow in ((plain, True), (load(folder, quantize=quantize).model, False)):
        with NarrowProducts() as found:
            model.logits(model(model.embed(ids)))
        assert bool(found.rows) == narrow


class NarrowProducts(TorchDispatchMode):
    """Records the number of rows of each 16-bit product of many rows."""

    def __enter__(self) -> "NarrowProducts":
        self.rows: list[int] = []
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        x = {"mm": 0, "addmm": 1, "bmm": 0}.get(operator.overloadpacket.__name__)
        if (
            x is not None
            and args[x].dtype.itemsize == 2
            and args[x].shape[:-1].numel() > MAX_NARROW_ROWS
        ):
            self.rows.append(args[x].shape[:-1].numel())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [True, False])
def test_a_widening_model_behaves_like_the_plain_one(
    tied: bool, no_units: None, tmp_path: Path
) -> None:
    """state_dict, fingerprint, copies and other dtypes may differ only in the rounding of sums."""
    plain = tiny_model("qwen2", dtype=torch.bfloat16, tie_word_embeddings=tied)
    model = load(write_folder(tmp_path, plain)).model
    assert sum(isinstance(module, CPULinear) for module in model.modules()) == 7 * 2 + (not tied)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.fingerprint() == plain.fingerprint()
    ids = random_ids(plain, 2, 5)
    copied = copy.deepcopy(model)
    copied.load_state_dict(
        {name: torch.zeros_like(tensor) for name, tensor in plain.state_dict().items()}
    )
    assert not bool(copied.logits(copied(copied.embed(ids))).any()), (
        "a copy that multiplies by the first one's weights"
    )
    wide, narrow = (m.to(torch.float32) for m in (model, plain))
    assert torch.equal(wide.logits(remember(wide, ids)[0]), narrow.logits(remember(narrow, ids)[0]))
