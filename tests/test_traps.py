"""The traps that other implementations of LatentMAS and of Qwen3 fell into, one test each, by what happened.

Those of teams, text, scoring and transfer modes are in test_agents.py, test_tokenizer.py and test_answers.py.
"""

import torch

from minimas import Aligner, KVCache, Qwen3, think
from minimas.core.model import Attention, take_last

from .models import TINY, apart, distance, random_ids, reference, remember, tiny_config, tiny_model

FAR = 1e-3


def thoughts_of(
    model: Qwen3, ids: torch.Tensor, lengths: list[int], steps: int = 3
) -> torch.Tensor:
    hidden, cache = remember(model, ids, lengths)
    return think(model, Aligner.from_model(model), take_last(hidden, cache.lengths), cache, steps)[
        0
    ]


def test_padding_of_earlier_agents_stays_invisible(model: Qwen3) -> None:
    """The authors mask past caches with ones, so in a batch the padding of every earlier agent becomes visible."""
    ids, x = random_ids(model, 2, 7), model.embed(random_ids(model, 2, 3, seed=1))
    _, cache = remember(model, ids, [7, 2])
    model(x, cache, torch.tensor([1, 3]))  # the second agent is ragged the other way round
    alone = torch.cat([model.embed(ids[1, :2]), x[1], x[1]])
    assert apart(model(x, cache)[1], reference(model, alone)[-3:]) <= 1e-12


def test_a_cut_memory_turns_its_keys(model: Qwen3) -> None:
    """The authors cut a cache without rotating it while later positions follow its length: the past then lies ahead."""
    ids = random_ids(model, 1, 8)
    kept = remember(model, ids)[1].keep_last(3)
    first_layer_alone = model.new_cache(1)
    model(
        model.embed(ids[:, -3:]), first_layer_alone
    )  # in layer 0 a key depends on its own token and place only
    assert apart(kept.keys[0], first_layer_alone.keys[0][:, :, :3]) <= 1e-12


def test_zero_thoughts_still_hand_the_memory_over(model: Qwen3) -> None:
    """The authors' default of 0 latent steps throws the memory away: their quick start hands nothing over (#13)."""
    hidden, cache = remember(model, random_ids(model, 1, 5))
    think(model, Aligner.from_model(model), hidden[:, -1:], cache, 0)
    x = model.embed(random_ids(model, 1, 2, seed=1))
    assert apart(model(x, cache), model(x)) > FAR


def test_two_live_memories_do_not_disturb_each_other(model: Qwen3) -> None:
    """A position kept on the model, not on the memory, corrupts the other one (as in gpt-fast)."""
    ids, other = random_ids(model, 2, 6).split(1)
    expected = remember(model, ids)[1]
    one, two = model.new_cache(1), model.new_cache(1)
    for at in range(0, 6, 2):
        model(model.embed(ids[:, at : at + 2]), one)
        model(model.embed(other[:, : at + 1]), two)
    assert distance(one, expected) <= 1e-12


def test_thoughts_start_from_the_last_valid_position(model: Qwen3) -> None:
    """Seeded from the pad's hidden state, accuracy falls with batch size: 0.621 became 0.219 (#25, #26)."""
    ids = random_ids(model, 2, 7)
    together, alone = thoughts_of(model, ids, [7, 3])[1:], thoughts_of(model, ids[1:, :3], [3])
    assert apart(together, alone) <= 1e-12
    hidden, cache = remember(model, ids, [7, 3])
    from_the_pad = think(model, Aligner.from_model(model), hidden[:, -1:], cache, 3)[0][1:]
    assert apart(from_the_pad, alone) > FAR


def test_left_padding_is_not_taken_for_right_padding(model: Qwen3) -> None:
    """A row padded on the left has another text in this layout: nothing here guesses which side was meant."""
    ids = random_ids(model, 1, 3)
    left = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], 1)
    assert apart(thoughts_of(model, left, [7]), thoughts_of(model, ids, [3])) > FAR


def test_the_map_comes_from_the_rows_that_a_tokenizer_can_produce() -> None:
    """Qwen3 pads 151,669 rows to 151,936; the authors resize the matrix in one backend only, so their norms differ."""
    model = tiny_model()
    before = Aligner.from_model(model, rows=35)
    model.model.embed_tokens.weight.data[35:] = 0
    model.lm_head.weight.data[35:] = 50
    h = torch.ones(1, 16, dtype=torch.float64)
    assert torch.equal(Aligner.from_model(model, rows=35)(h), before(h))
    assert apart(Aligner.from_model(model)(h), before(h)) > FAR


def test_the_methods_count_the_tokenizers_rows() -> None:
    """`lm.aligner` asks the tokenizer, so nobody has to remember it."""
    from minimas import load

    lm = load(TINY)
    assert lm.tokenizer is not None
    h = torch.ones(1, lm.model.config.hidden_size)
    expected = Aligner.from_model(lm.model, "ridge", lm.tokenizer.size)
    assert torch.equal(lm.aligner("ridge")(h), expected(h))
    assert lm.aligner("ridge") is lm.aligner("ridge")


def test_a_causal_mask_is_aligned_to_the_memorys_end(model: Qwen3) -> None:
    """is_causal=True aligns its triangle to the top left: right for T = S; T new tokens on a memory see too little."""
    ids = random_ids(model, 1, 9)
    whole, _ = remember(model, ids)
    _, cache = remember(model, ids[:, :6])
    assert apart(model(model.embed(ids[:, 6:]), cache), whole[:, 6:]) <= 1e-12
    visible = torch.ones(9, 9).bool().tril()
    visible[6:] = torch.ones(3, 9).bool().tril()
    assert apart(reference(model, model.embed(ids)[0], visible=visible)[6:], whole[0, 6:]) > FAR


def test_a_rollouts_first_thoughts_do_not_know_how_many_follow(model: Qwen3) -> None:
    """A rollout planned for its length (a mask of ones of the final size) changes its first thoughts."""
    ids = random_ids(model, 2, 4)
    assert torch.equal(
        thoughts_of(model, ids, [4, 2], 6)[:, :2], thoughts_of(model, ids, [4, 2], 2)
    )


def test_experts_joined_are_not_experts_chained(model: Qwen3) -> None:
    """The authors' "hierarchical" changes the prompts only: the cache is still chained (#32)."""
    one, two = random_ids(model, 2, 5).split(1)
    _, chained = remember(model, torch.cat([one, two], 1))
    joined = KVCache.concat([remember(model, one)[1], remember(model, two)[1]])
    assert distance(joined.truncate(5), chained.truncate(5)) <= 1e-12
    assert (
        apart(joined.keys[1][:, :, 5:10], chained.keys[1][:, :, 5:10]) > FAR
    )  # layer 0 cannot tell, layer 1 can


def test_shifting_every_position_proves_nothing(model: Qwen3) -> None:
    """RoPE is relative: a control that shifts all of them passes always; shifting the new tokens shows it."""
    x, places = model.embed(random_ids(model, 1, 6))[0], torch.arange(6)
    assert apart(reference(model, x, places + 500), reference(model, x)) <= 1e-9
    assert apart(reference(model, x, places + 500 * (places > 3)), reference(model, x)) > FAR


def test_random_models_are_not_so_small_that_nothing_shows() -> None:
    """Initialised at 0.02 an attention adds 1e-4 to its residual, and half of all bugs stay below the tolerance."""
    model = tiny_model()
    one, two = (remember(model, random_ids(model, 1, 5, seed))[0] for seed in (0, 1))
    assert apart(one, two) > 0.1
    x = model.embed(random_ids(model, 1, 5))[0]
    assert (
        apart(reference(model, x, visible=torch.eye(5).bool())[1:], reference(model, x)[1:]) > 0.05
    )


def test_head_size_is_the_configs() -> None:
    """It is not hidden_size // heads in Qwen3; gpt-fast overwrites it so."""
    attention = Attention(tiny_config(hidden_size=16, num_attention_heads=4, head_dim=10))
    assert tuple(attention.q_proj.weight.shape) == (40, 16)


def test_a_shard_of_a_layer_is_still_a_layer(model: Qwen3) -> None:
    """The number of heads is read off the weights: a layer cut by key-value heads gives partial sums that add up."""
    x = model.embed(random_ids(model, 2, 5))
    layer = model.model.layers[0].self_attn
    parts = []

    def attention(layer: Attention) -> torch.Tensor:
        cache = model.new_cache(2)
        return layer(x, cache.next_positions(2, 5), cache, 0)  # type: ignore[no-any-return]

    for half in range(2):
        shard = tiny_model().model.layers[0].self_attn
        for name, rows in (("q_proj", 12), ("k_proj", 6), ("v_proj", 6)):
            part = getattr(layer, name).weight[half * rows : (half + 1) * rows]
            getattr(shard, name).weight = torch.nn.Parameter(part, requires_grad=False)
        part = layer.o_proj.weight[:, half * 12 : (half + 1) * 12]
        shard.o_proj.weight = torch.nn.Parameter(part, requires_grad=False)
        parts.append(attention(shard))
    assert apart(sum(parts), attention(layer)) <= 1e-12
