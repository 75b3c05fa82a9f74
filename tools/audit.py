"""Does the memory do anything? The arms of an audit, what explains their difference, and a verdict in one sentence.

Every arm is the full one with a single thing changed, so that a difference has one cause:

    full             the team as it is                     one step         one thought each
    thoughts only    the next agent sees no prompts        random map       as many slots, thoughts of no direction
    prompts only     no thoughts (0 steps)                 a kind of map    another feeder, see tools/feeders.py
    none             the memory is dropped                 single           one agent, no team
    shuffled         the memory of another question        same seconds     that agent's vote over several samples

The thoughts' effect is full against prompts only; the prompts', prompts only against none. Gold NLL finds small
effects, but rewards whatever brings the solution's words near; accuracy says what they are worth, and needs many
questions. Neither can show that thoughts are useless for other questions or models.

Does not know: how an arm is computed (arms.py), files of results.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from arms import Arm, gold_text
from ledger import Record, files, read_head, write_whole
from stats import paired
from torch import Tensor

from minimas import Aligner, KVCache
from minimas.agents import Briefing
from minimas.nll import losses
from minimas.text.tokenizer import Turn

if TYPE_CHECKING:
    from evaluate import Evaluation

FEEDERS = ("prenorm", "mean", "fitted", "soft", "gumbel", "token", "pause")
HOST = "pause"  # the transplant's host: the same slots, no thought in them
ALPHA = 0.01  # below it an effect is "found"
AGAINST = ("full", "prompts only", "none")
LOOKED_AT = 4  # questions for the diagnostics
LIMITS = (
    "The loss finds small effects but rewards whatever brings the solution's words near, as a copy in memory does; "
    "accuracy says what an effect is worth, and needs many questions. Neither speaks of other questions or models."
)
DIAGNOSTICS = "diagnostics.json"  # in the run's folder
SAME_SECONDS = "same seconds"


def arms(evaluation: "Evaluation") -> list[Arm]:
    """The audit's arms, for each metric, in an order in which a cut-short batch has the main ones."""
    args = evaluation.args
    for name in ("team", "latent_steps", "transfer", "close", "prefix", "layout", "method"):
        values, only = (
            getattr(args, name),
            {"transfer": ["full"], "method": ["latent_mas"]}.get(name),
        )
        if len(values) > 1 or (only and values != only):
            flag = f"{name} (--{name.replace('_', '-')})"
            raise ValueError(
                f"{flag}: found {values}, expected {only or 'a single value'} in an audit"
            )
    align, maps = args.align[0], args.align[1:] or FEEDERS
    team, steps, close = args.team[0], args.latent_steps[0], args.close[0]
    how = {"close": close, "prefix": args.prefix[0], "layout": args.layout[0]}
    full = Arm("full", team=team, latent_steps=steps, align=align, transfer="full", **how)
    several = [
        full,
        replace(full, name="prompts only", latent_steps=0),
        replace(full, name="none", transfer="none"),
        replace(full, name="shuffled", transfer="shuffled"),
        replace(full, name="thoughts only", transfer="latents"),
        replace(full, name="one step", latent_steps=1),
        replace(full, name="random map", align="random"),
        *(replace(full, name=kind, align=kind) for kind in maps if kind != align),
        Arm("single", method="single"),
    ]
    found = [
        replace(arm, name=f"{metric}: {arm.name}", metric=metric)
        for metric in args.metric
        for arm in several
    ]
    names = [*(arm.name for arm in several), SAME_SECONDS]
    chosen = names if args.arms is None else args.arms
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(
            f"arms (--arms): found {unknown[0]!r}, expected some of {', '.join(names)}"
        )
    if "accuracy" in args.metric and SAME_SECONDS in chosen:
        samples = args.samples or same_seconds(evaluation, found)
        found.append(Arm(f"accuracy: {SAME_SECONDS}", method="single", samples=samples))
    return [arm for arm in found if arm.name.split(": ", 1)[1] in chosen]


def same_seconds(evaluation: "Evaluation", several: Sequence[Arm]) -> int:
    """How many answers a single agent writes in a team's time, two at least: as a run's head says, else timed on the
    first batch.
    """
    for path in files(evaluation.folder):
        for arm in (read_head(path) or {}).get("arms", []):
            if arm["name"] == f"accuracy: {SAME_SECONDS}":
                return int(arm["samples"])
    if evaluation.ranks > 1:
        raise ValueError(
            "samples (--samples): found no number, expected one where several ranks share an audit"
        )
    seconds = {}
    for name in (
        "accuracy: single",
        "accuracy: full",
        "accuracy: single",
        "accuracy: full",
    ):  # the first is a warm-up
        [arm] = [arm for arm in several if arm.name == name]
        start = time.perf_counter()
        evaluation.bench.compute(0, arm, 0)
        seconds[name] = time.perf_counter() - start
    return max(2, round(seconds["accuracy: full"] / seconds["accuracy: single"]))


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(found: Sequence[Record], metric: str, first: str, second: str) -> Record | None:
    """The paired difference of two arms, first − second, over the questions and seeds that both have; None: none."""
    field = "nll" if metric == "nll" else "correct"
    values: list[dict[tuple[str, int], float]] = []
    for arm in (first, second):
        mine = [r for r in found if r["arm"] == f"{metric}: {arm}" and r.get(field) is not None]
        values.append({(r["id"], r["seed"]): float(r[field]) for r in mine})
    return paired(*values, exact=metric == "accuracy")


def comparisons(found: Sequence[Record]) -> Record:
    """Every arm against full, prompts only and none, by metric."""
    names = dict.fromkeys(tuple(r["arm"].split(": ", 1)) for r in found)
    return {
        f"{metric}: {arm} − {other}": line
        for metric, arm in names
        for other in AGAINST
        if arm != other and (line := compare(found, metric, arm, other)) is not None
    }


def verdict(found: Sequence[Record]) -> str:
    """What the audit says, in one sentence."""
    thoughts = compare(found, "nll", "full", "prompts only")
    prompts = compare(found, "nll", "prompts only", "none")
    by_thoughts, by_memory = (
        compare(found, "accuracy", "full", other) for other in ("prompts only", "none")
    )
    parts = [_thoughts(found, thoughts, by_thoughts)] if thoughts else []
    parts += (
        [_prompts(prompts, "it" if thoughts else "the loss of the right answer")] if prompts else []
    )
    parts += [_answers("the thoughts", "them", "they", by_thoughts)] if by_thoughts else []
    parts += [_answers("the memory", "it", "it", by_memory)] if by_memory else []
    if not parts:
        return "Nothing can be said: of the arms full, prompts only and none no two are there."
    n = next(line["n"] for line in (thoughts, prompts, by_thoughts, by_memory) if line)
    return f"On these {n} questions {'; '.join(parts)}."


def _answers(what: str, it: str, they: str, line: Record) -> str:
    shares = f"with {what} {line['first']:.0%} of the answers are right, without {it} {line['second']:.0%}"
    does = ("help" if line["mean"] > 0 else "harm") + ("" if they == "they" else "s")
    return f"{shares}: {f'{they} {does}' if line['p'] < ALPHA else 'no difference is found'} ({_p(line)})"


def _thoughts(found: Sequence[Record], line: Record, answers: Record | None) -> str:
    """Of the loss, and what it is worth: a loss that the answers contradict is not called harm or help."""
    if line["p"] >= ALPHA:
        return f"no effect of the thoughts on the loss of the right answer is found ({_number(line)}, {_p(line)})"
    moved = f"the loss of the right answer by {_number(line)} ({_p(line)})"
    if answers and answers["p"] < ALPHA and (answers["mean"] > 0) == (line["mean"] > 0):
        return f"the thoughts {'raised' if line['mean'] > 0 else 'lowered'} {moved}, and the answers say the opposite"
    if line["mean"] > 0:
        return f"the thoughts raised {moved}: with this model they harm"
    said, other = (
        f"the thoughts lowered {moved}: with this model they help",
        compare(found, "nll", "full", "shuffled"),
    )
    if other is None:
        return said
    if other["p"] < ALPHA and other["mean"] < 0:
        return f"{said}, and another question's memory does not so well"
    return f"{said}, but no difference to another question's memory is found"


def _prompts(line: Record, it: str) -> str:
    if line["p"] >= ALPHA:
        return f"of the prompts' memory no effect is found ({_number(line)}, {_p(line)})"
    return f"the prompts' memory {'raises' if line['mean'] > 0 else 'lowers'} {it} by {_number(line)} ({_p(line)})"


def _number(line: Record) -> str:
    return f"{abs(line['mean']):.3g} ± {line['error']:.2g}"


def _p(line: Record) -> str:
    return "p < 0.001" if line["p"] < 0.001 else f"p = {line['p']:.2g}"


# -- explaining -------------------------------------------------------------------------------------------------------


def attention(briefing: Briefing, gold: str) -> Record:
    """The last agent's attention, as it reads its turn and a solution, to each part of the memory it was given.

    For one question: part -> [layer 0, 1, …], means over heads and positions; what is left to 1 goes to its own turn.
    """
    parts, model, run = segments(briefing), briefing.run.lm.model, briefing.run
    ids = run.tokenizer.encode_turn(briefing.turns[0]) + run.tokenizer.encode_turn(
        Turn(gold, ((0, len(gold)),))
    )
    shares: list[list[float]] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).float()  # (1, K, H/K · T, S)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        weight = scores.softmax(-1).mean((0, 1, 2))  # (S,)
        shares.append([float(weight[start:end].sum()) for _, start, end in parts])
        return plain(q, k, v, attn_mask=attn_mask)

    plain = F.scaled_dot_product_attention
    with replaced(F, "scaled_dot_product_attention", watched):
        model(model.embed(torch.tensor([ids], device=model.device)), briefing.memory.fork())
    return {
        name: list(layers)
        for (name, _, _), layers in zip(parts, zip(*shares, strict=True), strict=True)
    }


def segments(briefing: Briefing) -> list[tuple[str, int, int]]:
    """(part, first slot, slot behind) of one question's full memory: each agent's prompt, thoughts, written text."""
    closing = len(briefing.run.closing)
    held = int(briefing.memory.lengths[0])
    parts, at = [], 0
    traces = [trace for act, _ in briefing.acts for trace in act]
    for trace in traces:
        sizes = {
            "prompt": trace.prompt_tokens,
            "thoughts": trace.latent_steps,
            "text": trace.output_tokens,
        }
        for what, size in sizes.items():
            if size:
                parts.append((f"{trace.name}: {what}", at, at + size))
            at += size
        at += (
            closing
            if held > sum(t.prompt_tokens + t.latent_steps + t.output_tokens for t in traces)
            else 0
        )
    if at != held:
        raise ValueError(f"memory: found {held} slots, expected {at}: only a full memory has parts")
    return parts


def transplant(
    host: KVCache, donor: KVCache, slots: Sequence[int], layers: Sequence[int]
) -> KVCache:
    """A copy of `host` with some slots of the donor's, in some layers; slot by slot, so that no key has to move."""
    mine, theirs = host.lengths, donor.lengths
    if mine != theirs:
        raise ValueError(f"memories: found {mine} and {theirs} slots, expected the same")
    new = host.fork()
    for layer in layers:
        for into, out in ((new.keys, donor.keys), (new.values, donor.values)):
            into[layer][:, :, list(slots)] = out[layer][:, :, list(slots)]
    return new


def transplants(host: Briefing, donor: Briefing, gold: str) -> Record:
    """Gold NLL of one question with the donor's thoughts in the host's memory: in no, all, or some of the layers."""
    slots = [
        slot for name, a, b in segments(host) if name.endswith("thoughts") for slot in range(a, b)
    ]
    every = range(len(host.memory.keys))
    memories = {
        "host": host.memory.fork(),
        "all layers": transplant(host.memory, donor.memory, slots, every),
        "layer 0": transplant(host.memory, donor.memory, slots, every[:1]),
        "all but layer 0": transplant(host.memory, donor.memory, slots, every[1:]),
        "donor": donor.memory.fork(),
    }
    return {
        name: losses(host._replace(memory=memory), [[gold]])[0][0].mean
        for name, memory in memories.items()
    }


class Tap:
    """A map that notes what goes in and what comes out: states and thoughts, (B, 1, D) each step."""

    def __init__(self, align: Callable[[Tensor], Tensor]) -> None:
        self.align = self.drawn = align
        self.states: list[Tensor] = []
        self.thoughts: list[Tensor] = []

    def drawing(self, generators: Sequence[torch.Generator]) -> "Tap":
        self.drawn = (
            self.align.drawing(generators) if hasattr(self.align, "drawing") else self.align
        )
        return self

    def __call__(self, hidden: Tensor) -> Tensor:
        self.states.append(hidden)
        self.thoughts.append(self.drawn(hidden))
        return self.thoughts[-1]


def walk(tap: Tap, w_in: Tensor) -> dict[str, Tensor]:
    """Of each thought (B, n), n those of all agents: norms, the cosine to the nearest of the tokens `w_in` (V, D)
    and, from the second thought on, to the one before.
    """
    wide = torch.promote_types(tap.thoughts[0].dtype, torch.float32)
    states, thoughts = (
        torch.cat(kept, 1).to(wide) for kept in (tap.states, tap.thoughts)
    )  # (B, n, D)
    raw, align = thoughts, tap.align
    if isinstance(align, Aligner):
        raw = Aligner(align.matrix, None, align.scale, align.shift)(states)
    unit, tokens = F.normalize(thoughts, dim=-1), F.normalize(w_in.to(wide), dim=-1)
    return {
        "state norm": states.norm(dim=-1),
        "norm before rescaling": raw.norm(dim=-1),
        "norm": thoughts.norm(dim=-1),
        "cosine to the nearest token": (unit @ tokens.T).amax(-1),
        "successive cosine": (unit[:, 1:] * unit[:, :-1]).sum(-1),
    }


def geometry(tap: Tap, steps: int, w_in: Tensor) -> Record:
    """The means of a walk over all thoughts of agents with `steps` each; None where there is nothing to take one of."""
    values = walk(tap, w_in)
    following = values["successive cosine"]
    within = [i for i in range(following.shape[1]) if (i + 1) % steps]  # not across agents
    values["successive cosine"] = following[:, within]
    return {name: float(value.mean()) if value.numel() else None for name, value in values.items()}


def diagnose(evaluation: "Evaluation") -> Record:
    """Attention, transplant and geometry on the first questions, in the arms that have thoughts."""
    bench, rows = evaluation.bench, range(min(LOOKED_AT, len(evaluation.rows)))
    several = {
        arm.name.split(": ", 1)[1]: arm for arm in evaluation.arms if arm.method == "latent_mas"
    }
    full = several.get("full")  # metric and name play no part here
    if full is None or not _thinks(evaluation, full):
        return {}

    found: Record = {"questions": len(rows), "attention": {}, "geometry": {}}
    host = replace(full, align=HOST)
    attended, moved = [], []
    for i in rows:
        gold = gold_text(evaluation.rows[i])
        donor = bench.brief([i], full)
        attended.append(attention(donor, gold))
        moved.append(transplants(bench.brief([i], host), donor, gold))
    names = list(dict.fromkeys(name for one in attended for name in one))
    for name in names:
        layers = [one[name] for one in attended if name in one]
        found["attention"][name] = [
            sum(values) / len(layers) for values in zip(*layers, strict=True)
        ]
    found["transplant"] = {name: sum(one[name] for one in moved) / len(moved) for name in moved[0]}
    w_in = evaluation.lm.model.model.embed_tokens.weight
    w_in = w_in[: evaluation.lm.tokenizer.size] if evaluation.lm.tokenizer else w_in
    for name, arm in several.items():
        if arm.transfer == "full" and arm.latent_steps != 0:
            seen = []
            for some in bench.alike(rows, arm):
                tap = Tap(bench.feeder(arm.align or "ridge"))
                counts = {
                    t.latent_steps for act, _ in bench.brief(some, arm, align=tap).acts for t in act
                }
                seen += (
                    [geometry(tap, counts.pop(), w_in)] * len(some)
                    if tap.thoughts and len(counts) == 1
                    else []
                )
            if seen:
                found["geometry"][name] = {
                    what: mean_of_known([one[what] for one in seen]) for what in seen[0]
                }
    return found


def mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _thinks(evaluation: "Evaluation", arm: Arm) -> bool:
    return (evaluation.lm.default_steps if arm.latent_steps is None else arm.latent_steps) > 0


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put `value` into the place of an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# -- reporting --------------------------------------------------------------------------------------------------------


def report(evaluation: "Evaluation", found: Sequence[Record]) -> tuple[Record, str]:
    """The audit's numbers, and as Markdown with the verdict as its last line."""
    compared, sentence, kept = comparisons(found), verdict(found), evaluation.folder / DIAGNOSTICS
    if (
        not kept.exists()
    ):  # minutes of work on a real model, which a report written again need not repeat
        write_whole(kept, json.dumps(diagnose(evaluation), indent=1) + "\n")
    seen = json.loads(kept.read_text(encoding="utf-8"))
    lines = [
        "Paired differences of each arm to three others, with a bootstrap interval (a lower loss is better):",
        "",
    ]
    lines += [
        f"| | {' | '.join(f'− {other}' for other in AGAINST)} |",
        "| --- " * (len(AGAINST) + 1) + "|",
    ]
    for row in dict.fromkeys(name.split(" − ")[0] for name in compared):
        cells = [_cell(row, compared.get(f"{row} − {other}")) for other in AGAINST]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    if seen:
        lines += ["", f"On the first {seen['questions']} questions:", ""]
        lines += ["| the last agent attends to | layer 0 | mean of all |", "| --- | --- | --- |"]
        lines += [
            f"| {name} | {v[0]:.3f} | {sum(v) / len(v):.3f} |"
            for name, v in seen["attention"].items()
        ]
        lines += ["", f"| full's thoughts in the memory of {HOST} | gold NLL |", "| --- | --- |"]
        lines += [f"| {name} | {value:.3f} |" for name, value in seen["transplant"].items()]
        heads = list(next(iter(seen["geometry"].values()), {}))
        lines += ["", f"| thoughts of | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
        for name, values in seen["geometry"].items():
            lines.append(
                f"| {name} | {' | '.join('' if v is None else f'{v:.3f}' for v in values.values())} |"
            )
    lines += [
        "",
        f"p below {ALPHA:g} counts as found; with many arms, read single ones with care. {LIMITS}",
        "",
        sentence,
    ]
    return {"comparisons": compared, "diagnostics": seen, "verdict": sentence}, "\n".join(lines)


def _cell(row: str, line: Record | None) -> str:
    if line is None:
        return ""
    scale, unit = (1, "") if row.startswith("nll") else (100, " points")
    low, mean, high = (f"{scale * line[k]:+.3g}" for k in ("low", "mean", "high"))
    return f"{mean}{unit} [{low}, {high}], {_p(line)}"
