"""Arms: one way to answer each, and what comes of it on a batch of questions, as records.

An arm is a method with its settings; the control arms differ from the full one in a single setting. Batches are cut
once, in the data's order, and `shuffled` pairs question i with i + 1 of the whole data, so that a record depends
neither on the batch size nor on who computed it (in float32 and float64; 16-bit kernels change with the batch).

Does not know: files of results, resuming, ranks, statistics.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from feeders import Feeder, Feeders
from tasks import kind_of, option_of

from minimas import KVCache, Sampling, Team
from minimas.agents import Briefing, brief, brief_text
from minimas.answers import extract, grade
from minimas.load import LM
from minimas.nll import losses
from minimas.results import AgentTrace, Result, Watcher
from minimas.teams import TEAMS
from minimas.turns import Shared, behind

METHODS = ("single", "text_mas", "latent_mas")
METRICS = ("accuracy", "nll")
READS = {  # which settings a method reads; the others are left at None, so that a grid has no arm twice
    "single": (),
    "text_mas": ("team",),
    "latent_mas": ("team", "latent_steps", "align", "transfer", "close", "prefix", "layout"),
}
UNSEEN = (
    "latent_steps",
    "align",
    "close",
    "prefix",
    "layout",
)  # by the last agent, when nothing is handed over
VOTE = 0.7  # the temperature of samples that are voted on, where the run itself is greedy

Row = dict[str, Any]
Grader = Callable[[Row, str], "bool | None"]  # None: not graded, as code is without leave to run it


@dataclass(frozen=True)
class Arm:
    """A method and its settings, None where the method does not read one; `name` tells it from all others of a run."""

    name: str
    method: str = "latent_mas"
    metric: str = "accuracy"
    team: str | None = None
    latent_steps: int | None = None  # None: the agents' or the model's own number
    align: str | None = None
    transfer: str | None = None
    close: bool | None = None
    prefix: str | None = None  # of every agent but the last; None: the agents' own
    layout: str | None = None  # None: the team's own
    samples: int = 1  # answers to vote on


def grid(thinks_last: bool = False, **lists: Sequence[Any]) -> list[Arm]:
    """Every combination of the settings' values, by the names of `Arm`'s fields, without those that are the same.

    `thinks_last`: the last agent thinks too, so that how it does so tells arms without memory apart.
    """
    arms: dict[tuple[Any, ...], Arm] = {}
    for values in itertools.product(*lists.values()):
        given = dict(zip(lists, values, strict=True))
        read = {"method", "metric", *READS[given["method"]]}
        kept = {name: value for name, value in given.items() if name in read}
        dropped = UNSEEN if kept.get("transfer") == "none" and not thinks_last else ()
        kept |= {name: lists[name][0] for name in dropped if name in lists}
        if kept.get("latent_steps") == 0:
            kept.pop("align", None)  # nothing is thought, so no map is asked
        if kept.get("layout") == "turn":
            kept.pop("close", None)  # there is no turn to close
        # Lists of one say nothing that tells arms apart, nor does how a memory came about that is dropped.
        quiet = {"method", *dropped}
        told = [
            f"{name}={value}"
            for name, value in kept.items()
            if len(lists[name]) > 1 and name not in quiet
        ]
        arms.setdefault(tuple(kept.items()), Arm(" ".join([given["method"], *told]), **kept))
    return list(arms.values())


def gold_text(row: Row) -> str:
    """What the last agent should write: the solution, or of a choice its letter in the form it is asked for."""
    return (
        boxed(right_letter(row))
        if kind_of(row) == "choice"
        else str(row.get("solution") or row["answer"])
    )


def right_letter(row: Row) -> str:
    """The key of the right option; what a row without options says is right."""
    return option_of(str(row["answer"]), row.get("choices") or {}) or str(row["answer"])


def option_texts(row: Row) -> dict[str, str]:
    """Each option's letter -> what is written to choose it: the letter, or the text where options are not shown."""
    shown = kind_of(row) == "choice"
    return {
        letter: boxed(letter if shown else text)
        for letter, text in (row.get("choices") or {}).items()
    }


def boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


def judge(row: Row, text: str, prompt: str, grader: Grader) -> tuple[str | None, bool | None]:
    """The answer in a text, and whether it is right; `prompt` is the turn it was written behind."""
    said = behind(prompt, text)
    return extract(kind_of(row), said, row.get("choices")), grader(row, said)


def plain_grader(row: Row, text: str, verifies: bool = False) -> bool | None:
    """Rules for everything but code, which is not run; `verifies`: expressions by math-verify too."""
    kind = kind_of(row)
    return (
        None
        if kind == "code"
        else grade(kind, text, str(row["answer"]), row.get("choices"), verifies)
    )


class Bench:
    """The data and the model that all arms are run on."""

    def __init__(
        self,
        lm: LM,
        rows: Sequence[Row],
        batch_size: int,
        sampling: Sampling,
        grader: Grader,
        feeder: Feeders | None = None,
    ) -> None:
        """`feeder` makes the arms' maps (None: the model's, measured on the text in tools/)."""
        self.lm, self.rows, self.sampling, self.grader = lm, rows, sampling, grader
        self.feeder = feeder or Feeders(lm)
        self.batches = [
            range(i, min(i + batch_size, len(rows))) for i in range(0, len(rows), batch_size)
        ]
        self._shared: tuple[int, Shared] = (-1, {})

    def compute(self, batch: int, arm: Arm, seed: int) -> list[dict[str, Any]]:
        """The records of one unit, in the data's order."""
        records: dict[int, dict[str, Any]] = {}
        for rows in self.alike(self.batches[batch], arm):
            try:
                made = (
                    self._losses(batch, rows, arm, seed)
                    if arm.metric == "nll"
                    else self._answers(rows, arm, seed)
                )
            except ValueError as error:
                ids = ", ".join(str(self.rows[i]["id"]) for i in rows)
                raise ValueError(f"{arm.name}, of the questions {ids}: {error}") from error
            for i, record in zip(rows, made, strict=True):
                settings = asdict(arm)
                head = {
                    "id": self.rows[i]["id"],
                    "batch": batch,
                    "arm": settings.pop("name"),
                    **settings,
                    "seed": seed,
                }
                records[i] = head | record
        return [records[i] for i in self.batches[batch]]

    def partner(self, i: int) -> int:
        """The question whose memory question i gets in the shuffled arm."""
        return (i + 1) % len(self.rows)

    def alike(self, batch: range, arm: Arm) -> Iterator[list[int]]:
        """A batch in groups that one call can take: of one kind, and alone where a row has a team of its own."""

        def group(i: int) -> tuple[Any, ...]:
            involved = [i, self.partner(i)] if arm.transfer == "shuffled" else [i]
            alone = any("team" in self.rows[j] for j in involved)
            return (*(kind_of(self.rows[j]) for j in involved), i if alone else -1)

        for _, rows in itertools.groupby(sorted(batch, key=group), key=group):
            yield list(rows)

    # -- the memory that the last agent gets ---------------------------------------------------------------------------

    def brief(
        self,
        rows: Sequence[int],
        arm: Arm,
        seed: int = 0,
        watcher: Watcher | None = None,
        sampling: Sampling | None = None,
        shared: Shared | None = None,
        align: Feeder | None = None,
    ) -> Briefing:
        """Let everybody but the last agent work on some rows that one call can take.

        `shared` keeps what can be used for another arm; `align` is a map to use in the place of the arm's.
        """

        def asked(chosen: Sequence[int]) -> dict[str, Any]:
            several = [self.rows[i] for i in chosen]
            choices = [row.get("choices") for row in several]
            questions = {
                "questions": [row["question"] for row in several],
                "kind": kind_of(several[0]),
            }
            how = {
                "sampling": sampling or self.sampling,
                "seed": seed,
                "watcher": watcher,
                "shared": shared,
            }
            return questions | {"choices": choices} | how

        if arm.method != "latent_mas":
            team = self.team(rows[0], arm) if arm.method == "text_mas" else None
            return brief_text(self.lm, team=team, **asked(rows))
        align = self.feeder(arm.align or "ridge") if align is None else align
        thinking = {"latent_steps": arm.latent_steps, "align": align}
        thinking["close"] = arm.close is not False
        team, transfer = self.team(rows[0], arm), arm.transfer or "full"
        if arm.transfer == "shuffled":
            others = [self.partner(i) for i in rows]
            handed = brief(self.lm, team=self.team(others[0], arm), **thinking, **asked(others))
            return brief(self.lm, team=team, handed=handed, **thinking, **asked(rows))
        if arm.transfer == "none":
            team = replace(team, agents=team.agents[-1:])  # the others are not seen
        return brief(self.lm, team=team, transfer=transfer, **thinking, **asked(rows))

    def team(self, i: int, arm: Arm) -> Team:
        row, name = self.rows[i], arm.team or "sequential"
        if "team" in row:
            team = Team.from_dict(row["team"], f"{row['id']}: team")
        else:
            team = (
                Team.from_json(name)
                if name.endswith(".json")
                else self.lm.teams.get(name) or TEAMS[name]()
            )
        if arm.prefix is not None:
            *before, last = team.agents
            team = replace(
                team, agents=(*(replace(agent, prefix=arm.prefix) for agent in before), last)
            )
        return team.with_layout(arm.layout)

    # -- what is measured behind it ------------------------------------------------------------------------------------

    def _answers(self, rows: list[int], arm: Arm, seed: int) -> list[dict[str, Any]]:
        sampling = self.sampling
        if arm.samples > 1 and sampling.temperature == 0:
            sampling = replace(sampling, temperature=VOTE)
        drawn: list[list[dict[str, Any]]] = []
        for sample in range(arm.samples):
            marks = Marks()
            own_seed = seed if arm.samples == 1 else seed * 1_000_000 + sample
            results = self.brief(rows, arm, own_seed, marks, sampling).answer()
            drawn.append([self._answer(i, results[q], marks, q) for q, i in enumerate(rows)])
        return [vote([sample[q] for sample in drawn]) for q in range(len(rows))]

    def _answer(self, i: int, result: Result, marks: "Marks", q: int) -> dict[str, Any]:
        row = self.rows[i]
        answer, correct = judge(row, result.text, result.agents[-1].prompt, self.grader)
        said = {"text": result.text, "answer": answer, "gold": row["answer"], "correct": correct}
        return (
            said
            | {"finish_reason": result.finish_reason}
            | bill(result.agents, marks.of(q, len(result.agents)))
        )

    def _losses(self, batch: int, rows: list[int], arm: Arm, seed: int) -> list[dict[str, Any]]:
        if self._shared[0] != batch:
            self._shared = (batch, {})
        marks, start = Marks(), time.perf_counter()
        briefing = self.brief(rows, arm, seed, marks, shared=self._shared[1])
        texts = [[gold_text(self.rows[i]), *option_texts(self.rows[i]).values()] for i in rows]
        found = losses(briefing, texts)
        seconds, records = (time.perf_counter() - start) / len(rows), []
        for q, (i, (gold, *options)) in enumerate(zip(rows, found, strict=True)):
            row, traces = (
                self.rows[i],
                [trace for act, _ in briefing.acts for trace in act[q :: len(rows)]],
            )
            by_letter = dict(zip(option_texts(row), (loss.total for loss in options), strict=True))
            answer = min(by_letter, key=by_letter.__getitem__) if by_letter else None
            correct = right_letter(row) == answer if answer else None
            said = {"answer": answer, "gold": row["answer"], "correct": correct}
            said |= {"nll": gold.mean, "gold_tokens": gold.tokens, "options": by_letter}
            turn, name = briefing.turns[q], briefing.agent.name
            read = len(briefing.run.tokenizer.encode_turn(turn))
            last = AgentTrace(read, briefing.steps, 0, 0.0, 0, name=name, prompt=turn.text)
            total = bill([*traces, last], marks.of(q, len(traces)))
            records.append(said | total | {"seconds": seconds})
        return records


def vote(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of the first sample with the most frequent answer, under the bill of all of them."""
    if len(samples) == 1:
        return samples[0]
    counts = Counter(sample["answer"] for sample in samples if sample["answer"] is not None)
    # The earliest among equals: Counter keeps the order in which answers first came.
    chosen = counts.most_common(1)[0][0] if counts else None
    winner = next(sample for sample in samples if sample["answer"] == chosen)
    totals = {
        name: sum(sample[name] for sample in samples)
        for name in ("read", "thought", "written", "seconds")
    }
    return winner | totals | {"votes": dict(counts)}


def bill(traces: Sequence[AgentTrace], marks: Sequence[list[float]]) -> dict[str, Any]:
    """What was read, thought and written, in all and by each agent, with its exact prompt and its memory's mark."""
    agents = []
    for trace, mark in itertools.zip_longest(traces, marks):
        tokens = {
            "read": trace.prompt_tokens,
            "thought": trace.latent_steps,
            "written": trace.output_tokens,
        }
        said = {
            "name": trace.name,
            "prompt": trace.prompt,
            "text": trace.text,
            **tokens,
            "seconds": trace.seconds,
        }
        agents.append(said | {"memory_bytes": trace.memory_bytes, "mark": mark})
    total = {
        name: sum(agent[name] for agent in agents)
        for name in ("read", "thought", "written", "seconds")
    }
    return total | {
        "memory_bytes": max(agent["memory_bytes"] for agent in agents),
        "agents": agents,
    }


class Marks(Watcher):
    """Notes a mark of each agent's memory: the mean size of the last slot's keys and values over all layers.

    The last slot has seen all before it, so a memory that differs anywhere has another mark, at the price of one slot.
    """

    def __init__(self) -> None:
        self.turns: list[list[list[float]]] = []

    def memory(self, memory: KVCache) -> None:
        last = (torch.tensor(memory.lengths) - 1).clamp(min=0).to(memory.device)
        rows = torch.arange(len(last), device=memory.device)
        pairs = []
        for stores in (memory.keys, memory.values):
            slots = torch.stack([store[rows, :, last] for store in stores])  # (layers, B, K, d)
            pairs.append(slots.to(torch.float64).abs().mean((0, 2, 3)).tolist())
        self.turns.append([[float(f"{x:.6g}") for x in pair] for pair in zip(*pairs, strict=True)])

    def of(self, q: int, agents: int) -> list[list[float]]:
        """The marks of one question, agent by agent; a turn has a row for each question of each of its agents."""
        questions = sum(map(len, self.turns)) // max(agents, 1)
        return [mark for turn in self.turns for mark in turn[q::questions]] if questions else []


def same_mark(
    a: Sequence[float] | None, b: Sequence[float] | None, tolerance: float = 1e-4
) -> bool:
    """Whether two marks are of one memory, up to rounding."""
    if a is None or b is None:
        return a == b
    return all(
        math.isclose(x, y, rel_tol=tolerance, abs_tol=1e-12) for x, y in zip(a, b, strict=True)
    )
