"""Diagnose an audit: attention, transplants and geometry.

Three diagnostics show what is in the KV cache of the last agent, and what has an effect:

    attention      attention of the last agent on each part of its KV cache
    transplant     the loss after the thoughts of one KV cache were copied into another
    geometry       norms and cosines of the thoughts

This module does not use records, statistics or files.

    B rows   n thoughts   S slots   D hidden   V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimas import Aligner, KVCache

from .arms import Arm
from .bench import Bench, CallOptions
from .grading import gold_text
from .last_turn import LastTurn, slots
from .looking import attention_by_head

HOST = "pause"  # the map of the host of a transplant; its slots do not depend on hidden states
NAMES = {  # of the arms of a transplant, in records
    "host": "pauses in all layers",
    "all layers": "thoughts in all layers",
    "layer 0": "thoughts in layer 0",
    "all but layer 0": "thoughts in all layers but layer 0",
    "donor": "thoughts, own cache",
}
Record = dict[str, Any]


# -- attention --------------------------------------------------------------------------------


def attention(last: LastTurn, gold: str) -> dict[str, list[float]]:
    """Return the attention of the last agent on each part of its KV cache, for a single question.

    Returns part -> share per layer, a mean over heads (see `attention_by_head`). The remaining
    attention, up to 1, goes to the last agent's own turn.
    """
    weights = attention_by_head(last, last.memory, gold).mean(1)  # (layers, S)
    return {name: weights[:, start:end].sum(-1).tolist() for name, start, end in segments(last)}


def segments(last: LastTurn) -> list[tuple[str, int, int]]:
    """Return (part, first slot, end slot) of a full KV cache, for a single question.

    The parts are the prompt, the thoughts and the generated text of each agent. Raises ValueError
    if the cache is not full, that is, if slots were removed from it.
    """
    transfer = last.handover_run.transfer if last.handover_run else None
    if transfer not in ("full", "shuffled"):
        raise ValueError(f"transfer: found {transfer!r}, expected full or shuffled")
    names = [trace.name for trace in last.traces(0)]
    return [(f"{names[agent]}: {what}", start, end) for agent, what, start, end in last.parts()]


# -- transplants ------------------------------------------------------------------------------


def transplant(
    host: KVCache, donor: KVCache, chosen: Sequence[int], layers: Sequence[int]
) -> KVCache:
    """Return a copy of `host` with the `chosen` slots of `donor` in some layers.

    Slots keep their positions, so no key is rotated. Raises ValueError if the caches have different
    numbers of slots.
    """
    if slots(host) != slots(donor):
        problem = f"found {slots(host)} and {slots(donor)} slots, expected equal numbers"
        raise ValueError(f"memories: {problem}")
    new = host.fork()
    for layer in layers:
        for into, out in ((new.keys, donor.keys), (new.values, donor.values)):
            into[layer][:, :, list(chosen)] = out[layer][:, :, list(chosen)]
    return new


def transplants(host: LastTurn, donor: LastTurn, gold: str) -> dict[str, float]:
    """Return the gold NLL of one question with the donor's thoughts in the host's KV cache.

    The thoughts are copied in none of the layers ("host"), all, or some of them. "donor" is the
    donor's own cache.
    """
    thoughts: list[int] = []
    for name, start, end in segments(host):
        if name.endswith("thoughts"):
            thoughts += range(start, end)
    every = range(len(host.memory.keys))
    memories = {
        "host": host.memory.fork(),
        "all layers": transplant(host.memory, donor.memory, thoughts, every),
        "layer 0": transplant(host.memory, donor.memory, thoughts, every[:1]),
        "all but layer 0": transplant(host.memory, donor.memory, thoughts, every[1:]),
        "donor": donor.memory.fork(),
    }
    found = {}
    for name, memory in memories.items():
        [[loss]] = host.losses([[gold]], memory)
        found[name] = loss.mean
    return found


# -- geometry ---------------------------------------------------------------------------------


class Tap:
    """A map that keeps its inputs and outputs, states and thoughts, (B, 1, D) per step."""

    def __init__(self, align: Callable[[Tensor], Tensor]) -> None:
        self.align = self.drawn = align
        self.states: list[Tensor] = []
        self.thoughts: list[Tensor] = []

    def with_generators(self, generators: Sequence[torch.Generator]) -> "Tap":
        """Give the noise of the map, if any, one generator per row. Returns this map."""
        if hasattr(self.align, "with_generators"):
            self.drawn = self.align.with_generators(generators)
        return self

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map (B, 1, D) to (B, 1, D)."""
        self.states.append(hidden)
        self.thoughts.append(self.drawn(hidden))
        return self.thoughts[-1]


def walk(tap: Tap, w_in: Tensor) -> dict[str, Tensor]:
    """Return norms and cosines of the n thoughts of all agents, (B, n) each.

    `w_in` (V, D) has the embeddings of the tokens. "successive cosine" is the cosine between a
    thought and the one before it, (B, n − 1).
    """
    dtype = torch.promote_types(tap.thoughts[0].dtype, torch.float32)
    states = torch.cat(tap.states, 1).to(dtype)  # (B, n, D)
    thoughts = torch.cat(tap.thoughts, 1).to(dtype)  # (B, n, D)
    raw, align = thoughts, tap.align
    if isinstance(align, Aligner):
        raw = Aligner(align.matrix, None, align.scale, align.shift)(states)
    unit, tokens = F.normalize(thoughts, dim=-1), F.normalize(w_in.to(dtype), dim=-1)
    return {
        "state norm": states.norm(dim=-1),
        "norm before rescaling": raw.norm(dim=-1),
        "norm": thoughts.norm(dim=-1),
        "cosine to the nearest token": (unit @ tokens.T).amax(-1),
        "successive cosine": (unit[:, 1:] * unit[:, :-1]).sum(-1),
    }


def geometry(tap: Tap, steps: int, w_in: Tensor) -> dict[str, float | None]:
    """Return the means of the measures of `walk` for agents with `steps` thoughts each.

    A mean is None if there are no values.
    """
    values = walk(tap, w_in)
    following = values["successive cosine"]
    within = [i for i in range(following.shape[1]) if (i + 1) % steps]  # not across agents
    values["successive cosine"] = following[:, within]
    return {name: float(value.mean()) if value.numel() else None for name, value in values.items()}


# -- all of them ------------------------------------------------------------------------------


def diagnose(bench: Bench, arms: Sequence[Arm], most: int) -> Record:
    """Return attention, transplants and geometry on the first `most` questions.

    Returns {} without thoughts.

    `arms` are the arms of an audit, named "METRIC: NAME". The metric has no effect here.
    """
    latent = {arm.name.split(": ", 1)[1]: arm for arm in arms if arm.method == "latent_mas"}
    full = latent.get("full")
    if full is None:
        return {}
    steps = bench.lm.default_steps if full.latent_steps is None else full.latent_steps
    if steps == 0:
        return {}
    rows = range(min(most, len(bench.rows)))
    attended, moved = [], []
    for i in rows:
        gold, donor = gold_text(bench.rows[i]), bench.last_turn([i], full)
        attended.append(attention(donor, gold))
        host = bench.last_turn([i], replace(full, align=HOST))
        moved.append(transplants(host, donor, gold))
    geometries = {
        name: thoughts_geometry(bench, arm, rows)
        for name, arm in latent.items()
        if arm.transfer == "full" and arm.latent_steps != 0
    }
    return {
        "questions": len(rows),
        "attention": mean_attention(attended),
        "geometry": {name: found for name, found in geometries.items() if found},
        "transplant": {name: sum(one[name] for one in moved) / len(moved) for name in moved[0]},
        "transplants": [
            {"id": bench.rows[i]["id"], "seed": 0, "arm": NAMES[name], "nll": nll}
            for i, one in zip(rows, moved, strict=True)
            for name, nll in one.items()
        ],
    }


def mean_attention(attended: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Return the mean attention on each part per layer, over the questions that have the part."""
    means = {}
    for name in dict.fromkeys(name for one in attended for name in one):
        layers = [one[name] for one in attended if name in one]
        means[name] = [sum(values) / len(layers) for values in zip(*layers, strict=True)]
    return means


def thoughts_geometry(bench: Bench, arm: Arm, rows: range) -> dict[str, float | None]:
    """Return the geometry of an arm's thoughts, as means over the rows that have a value.

    Rows whose agents have different numbers of latent steps are left out. Returns {} if no row
    remains.
    """
    w_in = bench.lm.model.model.embed_tokens.weight
    if bench.lm.tokenizer:
        w_in = w_in[: bench.lm.tokenizer.size]
    seen: list[dict[str, float | None]] = []
    for group in bench.groups(rows, arm):
        tap = Tap(bench.feeders(arm.align or "ridge"))
        last = bench.last_turn(group, arm, CallOptions(align=tap))
        counts = {trace.latent_steps for q in range(len(group)) for trace in last.traces(q)}
        if tap.thoughts and len(counts) == 1:
            seen += [geometry(tap, counts.pop(), w_in)] * len(group)
    means: dict[str, float | None] = {}
    for name in seen[0] if seen else []:
        known = [value for one in seen if (value := one[name]) is not None]
        means[name] = sum(known) / len(known) if known else None
    return means
