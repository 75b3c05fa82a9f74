"""Bugs that only a GPU shows: mixed devices, and kernels that need another layout.

Run with `pytest -m cuda`.
"""

from pathlib import Path

import pytest
import torch

from minimas import Aligner, KVCache, Sampling, latent_mas, load, single, text_mas, think
from minimas.core.model import prefill
from minimas.fast.quantize import QuantizedLinear

from ..models import TINY, apart, random_ids, remember, tiny_model

pytestmark = [
    pytest.mark.cuda,
    # The compiler imports deprecated parts of torch, and warns that float32 could be faster.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
    ),
]
QUESTIONS = [
    "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?",
    "Tom has 3 coins. He finds 2 more. He doubles the coins. He eats 1. "
    "How many coins does Tom have?",
]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_rollout_is_the_same_on_both_devices(family: str) -> None:
    """Ragged rows, thoughts, cuts and joins are compared in float64.

    A mask or a rotation that stayed on the CPU would fail or differ.
    """
    states = []
    for device in ("cpu", "cuda"):
        model = tiny_model(family).to(device)
        cache = model.new_cache(2)
        hidden = prefill(model, [[1, 2, 3, 4, 5], [6, 7]], cache, chunk_tokens=3)
        _, hidden = think(model, Aligner.from_model(model), hidden, cache, 3)
        joined = KVCache.concat([cache.keep_last(4), cache.truncate(2)])
        states.append(model(model.embed(torch.tensor([[8], [9]], device=device)), joined).cpu())
    assert float((states[0] - states[1]).abs().max()) <= 1e-9


@pytest.mark.parametrize("method", [single, text_mas, latent_mas])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_equal_those_of_the_cpu(method: object, temperature: float) -> None:
    """Draws come from a CPU generator, so even sampled text must not depend on the device
    (float32).
    """
    sampling = Sampling(temperature=temperature, max_new_tokens=16)
    texts = []
    for device in ("cpu", "cuda"):
        lm = load(TINY, device=device, dtype="float32")
        results = method(lm, QUESTIONS, sampling=sampling)  # type: ignore[operator]
        texts.append([result.text for result in results])
    assert texts[0] == texts[1]


def test_a_cache_saved_on_a_gpu_loads_on_a_cpu(tmp_path: Path) -> None:
    """A cache may be saved on a GPU and loaded on a laptop."""
    model = load(TINY, device="cuda", dtype="float32").model
    cache = model.new_cache(1)
    prefill(model, [[1, 2, 3]], cache)
    cache.save(tmp_path / "memory.safetensors")
    other = load(TINY, device="cpu", dtype="float32").model
    again = KVCache.load(tmp_path / "memory.safetensors", other)
    assert all(
        torch.equal(a[:, :, :3].cpu(), b) for a, b in zip(cache.keys, again.keys, strict=True)
    )


def test_a_bf16_model_answers_on_a_gpu() -> None:
    """bf16 is the default dtype of every checkpoint.

    It uses the kernels that take a mask.
    """
    lm = load(TINY, device="cuda")
    assert [r.answer for r in latent_mas(lm, QUESTIONS, sampling=Sampling(max_new_tokens=8))] == [
        "6",
        "9",
    ]


@pytest.mark.parametrize("name", ["q4", "q8", "nf4", "int8"])
def test_quantized_layers_match_their_stored_weights_on_a_gpu(name: str) -> None:
    """Values that are packed for another device are silently wrong numbers."""
    lm = load(TINY, device="cuda", quantize=name)
    for layer in lm.model.modules():
        if isinstance(layer, QuantizedLinear):
            x = torch.randn(3, layer.in_features, device="cuda", dtype=torch.bfloat16)
            assert (
                apart(layer(x).double().cpu(), (x.double() @ layer.weight.double().T).cpu()) < 0.3
            )
    assert [r.answer for r in latent_mas(lm, QUESTIONS, sampling=Sampling(max_new_tokens=8))] == [
        "6",
        "9",
    ]


def test_a_recorded_step_equals_a_plain_one_on_a_gpu() -> None:
    """A replay with old positions or slots of another cache would differ from step 2 on."""
    states = []
    for compile in (False, True):
        model = load(TINY, device="cuda", dtype="float32", compile=compile).model
        hidden, cache = remember(model, random_ids(model, 2, 7).cuda())
        states.append(
            think(model, Aligner.from_model(model), hidden[:, -1:], cache, 300)[0][:, :2].cpu()
        )
    assert apart(states[1], states[0]) <= 1e-3
