"""transformers as a reference in float64: equal states and logits to 1e-12, for all three families.

transformers keeps RMSNorm and RoPE in float32 whatever the dtype, so unpatched it agrees only to
1e-6. Two methods of each family are replaced here by float64 versions of the same lines.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from minimas import Qwen3
from minimas.core.config import FAMILIES
from minimas.core.model import take_last

from ..models import LAYOUTS, apart, config_dict, random_ids, remember, tiny_model

CLOSE = 1e-12


def _norm(self: Any, x: Tensor) -> Tensor:
    mean = x.pow(2).mean(-1, keepdim=True)
    scaled = x * torch.rsqrt(mean + self.variance_epsilon)
    return self.weight * scaled  # type: ignore[no-any-return]


def _rope(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    c = self.config
    frequency = c.rope_parameters["rope_theta"] ** -(
        torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
    )
    phase = (position_ids[..., None] * frequency).repeat(1, 1, 2)
    return phase.cos(), phase.sin()


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that builds the same model in transformers.

    It is patched unless told otherwise.
    """
    transformers = pytest.importorskip("transformers")

    def build(model: Qwen3, patched: bool = True) -> Any:
        config = transformers.AutoConfig.for_model(**config_dict(model.config))
        config._attn_implementation = "sdpa"  # "eager" computes its softmax in float32
        theirs = (
            transformers.AutoModelForCausalLM.from_config(config)
            .to(torch.float64)
            .eval()
            .requires_grad_(False)
        )
        missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
        assert not unexpected
        assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
        for module in theirs.modules():
            if patched and type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding")):
                wide = _norm if type(module).__name__.endswith("RMSNorm") else _rope
                monkeypatch.setattr(type(module), "forward", wide)
        return theirs

    return build


@pytest.fixture(
    params=[(f, layout, tied) for f in FAMILIES for layout in LAYOUTS for tied in (False, True)],
    ids=str,
)
def ours(request: pytest.FixtureRequest) -> Qwen3:
    family, (heads, kv_heads, head_dim), tied = request.param
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return tiny_model(family, seed=3, tie_word_embeddings=tied, rope_theta=1e6, **shape)


def test_states_and_logits_agree_with_transformers(ours: Qwen3, oracle: Any) -> None:
    """Any error in the order of QK-norm and RoPE, in head_dim, biases or eps shows here."""
    ids = random_ids(ours, 2, 17)
    theirs = oracle(ours)(ids, output_hidden_states=True)
    hidden, _ = remember(ours, ids)
    assert apart(hidden, theirs.hidden_states[-1]) <= CLOSE
    assert apart(ours.logits(hidden), theirs.logits) <= CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_agree_with_transformers_padded_on_either_side(
    ours: Qwen3, oracle: Any, side: str
) -> None:
    """transformers needs a mask and positions for padding, and this package needs neither.

    Both then continue with two more tokens.
    """
    lengths, ids, more = [7, 3, 5], random_ids(ours, 3, 7), random_ids(ours, 3, 2, seed=1)
    rows = [
        torch.cat([row[:length], new]) for row, length, new in zip(ids, lengths, more, strict=True)
    ]
    mask = torch.zeros(3, 9, dtype=torch.int64)
    padded = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        padded[i, place], mask[i, place] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = oracle(ours)(
        padded, attention_mask=mask, position_ids=positions, output_hidden_states=True
    )
    prefilled, cache = remember(ours, ids, lengths)
    hidden = torch.cat(
        [take_last(prefilled, torch.tensor(lengths)), ours(ours.embed(more), cache)], 1
    )
    for i, row in enumerate(rows):
        expected = theirs.hidden_states[-1][i][mask[i].bool()]
        assert apart(prefilled[i, : lengths[i]], expected[: lengths[i]]) <= CLOSE
        assert apart(hidden[i], expected[-3:]) <= CLOSE
        assert apart(ours.logits(hidden[i]), theirs.logits[i][mask[i].bool()][-3:]) <= CLOSE
        assert len(row) == len(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatched_transformers_agrees_less(family: str, oracle: Any) -> None:
    """The negative control of the patch.

    Without it, the bound could not be told from float32 precision.
    """
    model, ids = tiny_model(family, seed=3), random_ids(tiny_model(family), 1, 30)
    difference = apart(
        oracle(model, patched=False)(ids).logits, model.logits(remember(model, ids)[0])
    )
    assert CLOSE * 100 < difference < 1e-4
