"""Check theorem 3.3: continuing from a handed-over KV cache equals feeding the same inputs again.

Everything that the agents before the last one feed to the model is kept: prompts, thoughts and ends
of turns. The last agent's prompt is then computed in two ways, both in float64: on the KV cache
that the agent gets, and in one forward pass of all kept inputs from an empty cache. Two negative
controls change the cache a little, and must be detected.
"""

from typing import Any

import torch
from torch import Tensor

from minimas import LM, KVCache
from minimas.core.rotary import angles, rotate
from tools.evaluation.last_turn import LastTurn, latent_turn
from tools.evaluation.rows import kind_of

from .setting import FAILS, HOLDS, Finding, Setting

# Differences relative to the largest value: at most CLOSE is equal, at least FAR is not.
CLOSE, FAR = 1e-9, 1e-6
PARTS = ("hidden states", "logits", "KV cache")


def measure(setting: Setting) -> Finding:
    """Return the largest difference between the two ways, and the smallest one of the controls."""
    lm, rows = setting.wide, setting.rows(tiny=8, other=1)
    steps = setting.steps(most=4)
    found = [compare(lm, row["question"], kind_of(row), steps) for row in rows]
    worst = {part: max(one["hand-over"][part] for one in found) for part in PARTS}
    controls = [name for name in found[0] if name not in ("hand-over", "positions")]
    nearest = {name: min(one[name]["hidden states"] for one in found) for name in controls}
    largest, smallest = max(worst.values()), min(nearest.values())
    fed, again = (max(one["positions"][name] for one in found) for name in ("handed", "explicit"))
    sentence = (
        f"In float64 the last agent's states, logits and KV cache after a hand-over differ from "
        f"those after feeding all inputs again by at most {largest:.1e} of the largest value, with "
        f"{fed} positions computed instead of {again}; with one thought removed, or keys one "
        f"position off, they differ by at least {smallest:.1e}."
    )
    holds = largest <= CLOSE and smallest >= FAR
    figures: dict[str, Any] = {
        "questions": len(rows),
        "latent steps": steps,
        "largest difference": worst,
        "smallest difference of a control": nearest,
        "by question": found,
    }
    return Finding(sentence, HOLDS if holds else FAILS, figures)


def compare(lm: LM, question: str, kind: str, steps: int) -> dict[str, dict[str, float]]:
    """Return how much a hand-over and each control differ from explicit input."""
    model, fed = lm.model, list[Tensor]()
    hook = model.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    try:
        last = latent_turn(lm, [question], latent_steps=steps, kind=kind)
    finally:
        hook.remove()
    x = model.embed(
        torch.tensor([last.tokenizer.encode_turn(last.prompts[0])], device=model.device)
    )
    explicit = model.new_cache(1)
    expected = model(torch.cat([*fed, x], 1), explicit)[:, -x.shape[1] :]  # (1, T, D)
    found: dict[str, dict[str, float]] = {
        "positions": {"handed": x.shape[1], "explicit": explicit.lengths[0]}
    }
    memories = {
        "hand-over": last.memory.fork(),
        "one thought less": without_last_thought(last),
        "keys one position off": turned(last.memory),
    }
    for name, memory in memories.items():
        states = model(x, memory)
        found[name] = {
            "hidden states": apart(states, expected),
            "logits": apart(model.logits(states), model.logits(expected)),
        }
        same_length = memory.lengths == explicit.lengths
        found[name]["KV cache"] = distance(memory, explicit) if same_length else 1.0
    return found


def without_last_thought(last: LastTurn) -> KVCache:
    """Return the KV cache that the last agent gets, without the last thought."""
    *_, end = [stop for _, what, _, stop in last.parts() if what == "thoughts"]
    return last.memory.drop(end - 1, end)


def turned(memory: KVCache) -> KVCache:
    """Return a copy of a KV cache with keys that are rotated by one position too many."""
    new = memory.fork()
    config = memory.config
    one = torch.ones(1, 1, dtype=torch.int64, device=memory.device)
    turn = angles(one, config.head_dim, config.rope_theta, memory.dtype)
    new.keys = [rotate(keys, *turn) for keys in memory.keys]
    return new


def distance(a: KVCache, b: KVCache) -> float:
    """Return the largest difference between the keys and values of two caches with one row."""
    filled = a.lengths[0]
    pairs = [*zip(a.keys, b.keys, strict=True), *zip(a.values, b.values, strict=True)]
    return max(apart(mine[:, :, :filled], theirs[:, :, :filled]) for mine, theirs in pairs)


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference between two tensors, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
