"""Run arms on batches of rows, and return the records.

A unit is one batch with one arm and one seed. Batches are made once, in the order of the data, and
`shuffled` pairs question i with question i + 1 of the whole data. So a record depends neither on
the batch size nor on the process that computes it. (This is true in float32 and float64. In 16
bits, the results of kernels change with the batch.) This module does not use result files, ranks or
statistics.

    B rows   K key-value heads   d head size
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from minimas import LM, Sampling, Team
from minimas.lens import Lens
from minimas.results import AgentEnd, AgentTrace, Event, OnEvent, Result
from minimas.teams import TEAMS

from .arms import Arm
from .feeders import Feeder, Feeders
from .grading import Grader, gold_text, judge, option_texts, right_letter
from .last_turn import LastTurn, PrefillOnce, latent_turn, slots, text_turn
from .layouts import VARIANTS
from .looking import Look
from .rows import Row, kind_of, own_team

VOTE_TEMPERATURE = 0.7  # for samples to vote on, if the run is greedy
USAGE = ("read", "thought", "written", "seconds")
Record = dict[str, Any]


@dataclass(frozen=True)
class CallOptions:
    """Settings of a call that are not part of the arm.

    `align` replaces the map of the arm. `once` shares prefilled first prompts between arms.
    """

    seed: int = 0
    sampling: Sampling | None = None
    on_event: OnEvent | None = None
    once: PrefillOnce | None = None
    align: Feeder | None = None


class Bench:
    """The model and the rows on which all arms are run."""

    def __init__(
        self,
        lm: LM,
        rows: Sequence[Row],
        batch_size: int,
        sampling: Sampling,
        grader: Grader,
        feeders: Feeders | None = None,
        models: dict[str, LM] | None = None,
    ) -> None:
        """Divide `rows` into batches. `feeders` makes the maps of arms (None: `Feeders(lm)`).

        `models` are the models that agents name.
        """
        self.models = models or {}
        self.lm, self.rows, self.sampling, self.grader = lm, rows, sampling, grader
        self.feeders = feeders or Feeders(lm)
        starts = range(0, len(rows), batch_size)
        self.batches = [range(start, min(start + batch_size, len(rows))) for start in starts]
        self._prefill = (-1, PrefillOnce())  # number of a batch, its first prompts

    def compute(self, batch: int, arm: Arm, seed: int, lens: Lens | None = None) -> list[Record]:
        """Return the records of one unit, in the order of the data.

        With a `lens`, the records also have thoughts and attention (see `looking`), and their
        seconds do not include computing these. Raises ValueError naming the arm and the ids of the
        questions if they cannot be run.
        """
        settings = asdict(arm)
        head = {"batch": batch, "arm": settings.pop("name"), **settings, "seed": seed}
        records: dict[int, Record] = {}
        for rows in self.groups(self.batches[batch], arm):
            try:
                if arm.metric == "nll":
                    measured = self._losses(batch, rows, arm, seed, lens)
                else:
                    measured = self._answers(rows, arm, seed, lens)
            except ValueError as error:
                ids = ", ".join(str(self.rows[i]["id"]) for i in rows)
                raise ValueError(f"{arm.name}, of the questions {ids}: {error}") from error
            for i, record in zip(rows, measured, strict=True):
                records[i] = {"id": self.rows[i]["id"]} | head | record
        return [records[i] for i in self.batches[batch]]

    def partner(self, i: int) -> int:
        """Return the index of the question whose KV cache question i gets in the shuffled arm."""
        return (i + 1) % len(self.rows)

    def groups(self, batch: range, arm: Arm) -> Iterator[list[int]]:
        """Yield groups of rows for one call: rows of one kind, or one row with its own team."""

        def group(i: int) -> tuple[Any, ...]:
            involved = [i, self.partner(i)] if arm.transfer == "shuffled" else [i]
            alone = any("team" in self.rows[j] for j in involved)
            return (*(kind_of(self.rows[j]) for j in involved), i if alone else -1)

        for _, rows in itertools.groupby(sorted(batch, key=group), key=group):
            yield list(rows)

    def last_turn(
        self, rows: Sequence[int], arm: Arm, options: CallOptions | None = None
    ) -> LastTurn:
        """Run every agent except the last one on rows for one call (see `groups`)."""
        options = options or CallOptions()

        def asked(chosen: Sequence[int]) -> dict[str, Any]:
            taken = [self.rows[i] for i in chosen]
            return {
                "questions": [row["question"] for row in taken],
                "kind": kind_of(taken[0]),
                "choices": [row.get("choices") for row in taken],
                "sampling": options.sampling or self.sampling,
                "seed": options.seed,
                "on_event": options.on_event,
                "once": options.once,
            }

        if arm.method != "latent_mas":
            chosen = self.team(rows[0], arm) if arm.method == "text_mas" else None
            return text_turn(self.lm, team=chosen, models=self.named_by(chosen), **asked(rows))
        align = options.align or self.feeders(arm.align or "ridge")
        thinking: dict[str, Any] = {"latent_steps": arm.latent_steps, "align": align}
        thinking["close"] = arm.close is not False
        thinking["variant"] = VARIANTS.get(arm.layout or "")
        team, transfer = self.team(rows[0], arm), arm.transfer or "full"
        if transfer == "shuffled":
            others = [self.partner(i) for i in rows]
            their_team = self.team(others[0], arm)
            theirs = thinking | self.mixed(their_team, arm)
            earlier = latent_turn(self.lm, team=their_team, **theirs, **asked(others))
            thinking |= self.mixed(team, arm)
            return latent_turn(self.lm, team=team, earlier=earlier, **thinking, **asked(rows))
        last = team.agents[-1]
        if transfer == "none" and "{question}" in team.opening + last.prompt:
            team = replace(team, agents=(last,))  # the others would have no effect
        thinking |= self.mixed(team, arm)
        return latent_turn(self.lm, team=team, transfer=transfer, **thinking, **asked(rows))

    def named_by(self, team: Team | None) -> dict[str, LM]:
        """Return the models that the agents of a team name, or {} for a single agent."""
        names = {agent.model for agent in team.agents} if team else set()
        return {name: lm for name, lm in self.models.items() if name in names}

    def mixed(self, team: Team, arm: Arm) -> dict[str, Any]:
        """Return the settings for a team of several models, or {} for a team of one model.

        Several models need a kind of map, because a map belongs to one model.
        """
        models = self.named_by(team)
        return {"models": models, "align": arm.align or "ridge"} if models else {}

    def team(self, i: int, arm: Arm) -> Team:
        """Return the team that answers row i: the row's own team, otherwise the arm's."""
        row, name = self.rows[i], arm.team or "sequential"
        if "team" in row:
            team = own_team(row)
        elif name.endswith(".json"):
            team = Team.from_json(name)
        else:
            team = self.lm.teams.get(name) or TEAMS[name]
        if arm.prefix is not None:
            *before, last = team.agents
            prefixed = (replace(agent, prefix=arm.prefix) for agent in before)
            team = replace(team, agents=(*prefixed, last))
        if arm.layout in VARIANTS:
            return VARIANTS[arm.layout].team(team)
        return team.with_layout(arm.layout)

    # -- answers ------------------------------------------------------------------------------

    def _answers(self, rows: list[int], arm: Arm, seed: int, lens: Lens | None) -> list[Record]:
        sampling = self.sampling
        if arm.samples > 1 and sampling.temperature == 0:
            sampling = replace(sampling, temperature=VOTE_TEMPERATURE)
        samples: list[list[Record]] = []
        for number in range(arm.samples):
            marks = Marks(lens)
            own_seed = seed if arm.samples == 1 else seed * 1_000_000 + number
            last = self.last_turn(rows, arm, CallOptions(own_seed, sampling, marks))
            look = Look(last, lens)
            results = last.answer()
            records = [self._answer(i, results[q], marks, q) for q, i in enumerate(rows)]
            look.add_to(records, [result.text for result in results])
            samples.append(records)
        return [vote(of_one_question) for of_one_question in zip(*samples, strict=True)]

    def _answer(self, i: int, result: Result, marks: "Marks", q: int) -> Record:
        row, traces = self.rows[i], result.agents
        answer, correct = judge(row, result.text, traces[-1].prompt, self.grader)
        return {
            "text": result.text,
            "answer": answer,
            "gold": row["answer"],
            "correct": correct,
            "finish_reason": result.finish_reason,
        } | usage(traces, marks.of(q, len(traces)))

    # -- losses -------------------------------------------------------------------------------

    def _losses(
        self, batch: int, rows: list[int], arm: Arm, seed: int, lens: Lens | None
    ) -> list[Record]:
        if self._prefill[0] != batch:
            self._prefill = (batch, PrefillOnce())
        marks, start, records = Marks(lens), time.perf_counter(), []
        options = CallOptions(seed, on_event=marks, once=self._prefill[1])
        last = self.last_turn(rows, arm, options)
        texts = [[gold_text(self.rows[i]), *option_texts(self.rows[i]).values()] for i in rows]
        look = Look(last, lens)
        found = last.losses(texts)
        seconds = (time.perf_counter() - start - marks.seconds) / len(rows)
        for q, (i, (gold, *option_losses)) in enumerate(zip(rows, found, strict=True)):
            row, traces = self.rows[i], last.traces(q)
            totals = [loss.total for loss in option_losses]
            by_letter = dict(zip(option_texts(row), totals, strict=True))
            answer = min(by_letter, key=by_letter.__getitem__) if by_letter else None
            record = {
                "answer": answer,
                "gold": row["answer"],
                "correct": right_letter(row) == answer if answer else None,
                "nll": gold.mean,
                "gold_tokens": gold.tokens,
                "options": by_letter,
            }
            prompt = last.prompts[q]
            read = len(last.tokenizer.encode_turn(prompt)) + last.turn.run.prefilled[q]
            own = AgentTrace(read, last.latent_steps, name=last.agent.name, prompt=prompt.text)
            total = usage([*traces, own], marks.of(q, len(traces)))
            records.append(record | total | {"seconds": seconds})
        look.add_to(records, [gold for gold, *_ in texts])
        return records


def samples_in_same_time(bench: Bench, full: Arm) -> int:
    """Return how many answers a single agent generates in the time of a team, at least 2.

    Both are timed on the first batch, after a warm-up.
    """
    seconds = {}
    for _ in ("warm-up", "timed"):
        for arm in (Arm("single", method="single"), full):
            start = time.perf_counter()
            bench.compute(0, arm, 0)
            seconds[arm.method] = time.perf_counter() - start
    return max(2, round(seconds[full.method] / seconds["single"]))


def vote(samples: Sequence[Record]) -> Record:
    """Return the record of the first sample with the most frequent answer, with summed usage."""
    if len(samples) == 1:
        return samples[0]
    counts = Counter(sample["answer"] for sample in samples if sample["answer"] is not None)
    # Counter keeps the order of first appearance, so of equally frequent answers the first wins.
    chosen = counts.most_common(1)[0][0] if counts else None
    winner = next(sample for sample in samples if sample["answer"] == chosen)
    totals = {name: sum(sample[name] for sample in samples) for name in USAGE}
    return winner | totals | {"votes": dict(counts)}


def usage(traces: Sequence[AgentTrace], marks: Sequence[list[float]]) -> Record:
    """Return prompt tokens, latent steps, generated tokens and seconds, in total and per agent.

    Each agent also has its exact prompt and the mark of its KV cache (None: not known).
    """
    agents = [
        {
            "name": trace.name,
            "prompt": trace.prompt,
            "text": trace.text,
            "read": trace.prompt_tokens,
            "thought": trace.latent_steps,
            "written": trace.output_tokens,
            "seconds": trace.seconds,
            "memory_bytes": trace.memory_bytes,
            "mark": mark,
        }
        for trace, mark in itertools.zip_longest(traces, marks)
    ]
    total: Record = {name: sum(agent[name] for agent in agents) for name in USAGE}
    total["memory_bytes"] = max(agent["memory_bytes"] for agent in agents)
    return total | {"agents": agents}


class Marks:
    """Collects a mark of the KV cache of each agent, to compare caches of two runs.

    A mark is the mean absolute value of the keys, and that of the values, in the last slot of all
    layers. The last slot depends on all slots before it, so a cache that differs anywhere has
    another mark. Events are passed on to a `lens`, and `seconds` is the time that the lens needed.
    """

    def __init__(self, lens: Lens | None = None) -> None:
        self.turns: list[list[list[float]]] = []
        self.lens, self.seconds = lens, 0.0

    def __call__(self, event: Event) -> None:
        """Add the marks of the KV cache of one turn, one per trace."""
        if self.lens:
            start = time.perf_counter()
            self.lens(event)
            self.seconds += time.perf_counter() - start
        if not isinstance(event, AgentEnd):
            return
        memory = event.memory
        rows = torch.arange(len(memory.lengths), device=memory.device)
        last = torch.tensor(slots(memory), device=memory.device).sub(1).clamp(min=0)
        pairs = []
        for stores in (memory.keys, memory.values):
            ends = torch.stack([store[rows, :, last] for store in stores])  # (layers, B, K, d)
            pairs.append(ends.to(torch.float64).abs().mean((0, 2, 3)).tolist())
        self.turns.append([[float(f"{x:.6g}") for x in pair] for pair in zip(*pairs, strict=True)])

    def of(self, question: int, agents: int) -> list[list[float]]:
        """Return the marks of one question, one per agent.

        A turn has a row for each question of each of its agents.
        """
        questions = sum(map(len, self.turns)) // max(agents, 1)
        if questions == 0:
            return []
        return [mark for turn in self.turns for mark in turn[question::questions]]


def same_mark(
    a: Sequence[float] | None, b: Sequence[float] | None, tolerance: float = 1e-4
) -> bool:
    """Return True if two marks belong to equal KV caches, up to rounding."""
    if a is None or b is None:
        return a == b
    pairs = zip(a, b, strict=True)
    return all(math.isclose(x, y, rel_tol=tolerance, abs_tol=1e-12) for x, y in pairs)
