"""Check that attention weights agree with those of transformers."""

import pytest
import torch

from minimas.core.config import FAMILIES
from minimas.core.model import prefill
from tools.evaluation.attention import attention_weights

from ..models import config_dict, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_agrees_with_transformers(family: str) -> None:
    """The weights of prompt tokens on a filled cache must be right in every layer."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(family, dtype=torch.float32)
    raw = config_dict(model.config)
    config = transformers.AutoConfig.for_model(**raw, attn_implementation="eager")
    oracle = transformers.AutoModelForCausalLM.from_config(config).eval()
    oracle.load_state_dict(model.state_dict(), strict=False)
    before, ids = [3, 1, 4, 1, 5], [9, 2, 6]
    cache = model.new_cache(1)
    prefill(model, [before], cache)
    found = attention_weights(model, ids, cache)
    with torch.no_grad():
        shown = oracle(torch.tensor([before + ids]), output_attentions=True).attentions
    expected = torch.stack(
        [layer[0].unflatten(0, (-1, 2))[:, :, len(before) :].mean((1, 2)) for layer in shown]
    )  # (layers, K, S)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-5
    assert float((found.sum(-1) - 1).abs().max()) < 1e-5
    assert cache.lengths == [len(before)], "the caller's cache must stay as it is"
    assert float((attention_weights(model, ids[::-1], cache) - expected).abs().max()) > 1e-3
