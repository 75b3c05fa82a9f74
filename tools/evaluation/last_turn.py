"""The state of a call before the last agent's turn, when all other agents have finished.

This is the only file of tools/evaluation that depends on how `minimas.agents` splits a call into
the turns of the other agents and the last agent's turn. It does not use arms, rows or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minimas import LM, KVCache, Qwen3, Tokenizer
from minimas.agents import HandOver, LatentRun, choose_team, hand_over, hand_over_text
from minimas.agents import LastTurn as MethodsLastTurn
from minimas.layout import Layout
from minimas.nll import Loss, losses_after
from minimas.results import AgentTrace, Events, OnEvent, Result, Thought, run_to_end
from minimas.teams import SINGLE, Agent, Team
from minimas.text.tokenizer import PromptText
from minimas.turns import Run

from .layouts import Variant


class PrefillOnce:
    """Prompts that were prefilled into an empty KV cache, to be shared by several runs.

    Runs on the same questions with different maps or numbers of thoughts begin with equal prompts.
    Sharing changes only the measured time.
    """

    def __init__(self) -> None:
        self.prefilled: dict[Any, tuple[Tensor, KVCache]] = {}


@dataclass
class SharingRun(Run):
    """A run that reuses first prompts which other runs with the same `once` have prefilled.

    A map with the method `with_generators` is asked for the map of each turn. A random map gets one
    generator per row, that of the row's question.
    """

    once: PrefillOnce | None = None

    def prefill(self, ids: list[list[int]], cache: KVCache) -> tuple[Tensor, KVCache]:
        """Return the last hidden state of each row (R, 1, D), and the KV cache to continue from."""
        if self.once is None or any(cache.lengths):
            return super().prefill(ids, cache)
        key = self.lm, *map(tuple, ids)
        if key not in self.once.prefilled:
            self.once.prefilled[key] = super().prefill(ids, cache)
        hidden, cached = self.once.prefilled[key]
        return hidden, cached.fork()

    def think(
        self, align: Any, hidden: Tensor, cache: KVCache, steps: int
    ) -> Events[list[Thought]]:
        """Think from hidden (R, 1, D), and yield each thought. Returns all thoughts of the turn."""
        if hasattr(align, "with_generators"):
            generators = self.generators * (len(hidden) // len(self.questions))
            align = align.with_generators(generators)
        return (yield from super().think(align, hidden, cache, steps))


@dataclass
class VariantRun(LatentRun, SharingRun):
    """A run of `latent_mas` that can use one of the layouts for measurements."""

    variant: Variant | None = None

    def layouts(self, team: Team) -> list[Layout]:
        """Return the layout of the team's prompts in the conversation, one per question."""
        library = super().layouts(team)
        if self.variant is None:
            return library
        form = self.variant.form
        return [form(self.tokenizer, team, one.opening, one.prompts) for one in library]


def latent_turn(
    lm: LM,
    questions: Sequence[str],
    earlier: "LastTurn | None" = None,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> "LastTurn":
    """Run every agent except the last one, as `latent_mas` does. `settings` are its parameters.

    With `earlier` no agent runs: the last agent gets the KV cache that was handed over there, one
    row per question.
    """
    run = VariantRun(lm, questions, **settings)
    if earlier is None:
        working = run.shifted() if run.transfer == "shuffled" else run
        given = run_to_end(hand_over(working), on_event)
    else:
        assert earlier.given is not None, "text agents do not hand over a KV cache"
        given = earlier.given
    return LastTurn(run.last_turn(given), given, on_event)


def text_turn(
    lm: LM,
    questions: Sequence[str],
    team: Team | str | None,
    on_event: OnEvent | None = None,
    **settings: Any,
) -> "LastTurn":
    """Run every agent except the last one, as `text_mas` does, or as `single` if `team` is None."""
    run = SharingRun(lm, questions, **settings)
    chosen = choose_team(lm, team) if team else lm.teams.get("single", SINGLE)
    return LastTurn(run_to_end(hand_over_text(run, chosen), on_event), None, on_event)


class LastTurn:
    """The last agent, its prompts and the KV cache that it gets, one row per question.

    Call `answer` or `losses` only once, because they append to the cache.
    """

    def __init__(
        self,
        turn: MethodsLastTurn,
        given: HandOver | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        self.turn, self.given, self.on_event = turn, given, on_event
        self.model: Qwen3 = turn.run.lm.model
        self.tokenizer: Tokenizer = turn.run.tokenizer
        self.closing_tokens = len(turn.run.closing)  # of the text that closes a turn
        self.memory: KVCache = turn.cache
        self.held = slots(turn.cache)  # per question, before the turn
        self.prompts: list[PromptText] = turn.prompts
        self.agent: Agent = turn.agent
        # The run whose agents made the KV cache. In the shuffled arm it has other questions.
        self.handover_run = given.run if given and isinstance(given.run, LatentRun) else None
        self.latent_steps: int = turn.steps

    def traces(self, question: int) -> list[AgentTrace]:
        """Return the traces of the agents that have finished one question, in order."""
        count = len(self.prompts)
        return [trace for turn in self.turn.turns for trace in turn.traces[question::count]]

    def parts(self, question: int = 0) -> list[tuple[int, str, int, int]]:
        """Return the parts of the KV cache that the last agent gets for one question, in order.

        A part is (index of the agent, "prompt" | "thoughts" | "text", first slot, end slot). Parts
        without slots are left out. The beginning that all agents share belongs to the prompt of the
        first one. Tokens that close a turn belong to no part. Returns [] if no KV cache is handed
        over.
        """
        held = self.held[question]
        run, traces = self.handover_run, self.traces(question)
        if self.given is None or run is None or not held:
            return []
        whole = run.transfer != "latents"
        closing = self.closing_tokens if whole and run.closes_turns else 0
        shared = self.given.shared[question] if run.resolved_team.parallel else 0  # is stored once
        first = len(traces) - 1 if run.transfer == "last" else 0
        parts, end = list[tuple[int, str, int, int]](), held
        for agent in reversed(range(first, len(traces))):
            trace = traces[agent]
            sizes = {
                "text": trace.output_tokens if whole else 0,
                "thoughts": trace.latent_steps,
                "prompt": trace.prompt_tokens - shared if whole else 0,
            }
            end -= closing
            for what, size in sizes.items():
                start = 0 if (agent, what) == (first, "prompt") else end - size
                if start < end:
                    parts.append((agent, what, start, end))
                end = start
        return parts[::-1]

    def answer(self) -> list[Result]:
        """Return the results after the last agent has generated its answers."""
        return run_to_end(self.turn.answer(), self.on_event)

    def losses(
        self, texts: Sequence[Sequence[str]], memory: KVCache | None = None
    ) -> list[list[Loss]]:
        """Return the loss of each of `texts` as the answer of the last agent, per question.

        `memory` replaces the KV cache that the last agent gets.
        """
        turn = self.turn if memory is None else self.turn._replace(cache=memory)
        hidden, cache = turn.prefill_and_think()
        # The first texts of all questions are one batch, then the second texts, and so on. In one
        # batch, short options would be padded to the length of the solution. A question with fewer
        # texts repeats its last one.
        columns = []
        for i in range(max(map(len, texts))):
            column = [own[min(i, len(own) - 1)] for own in texts]
            columns.append(losses_after(turn.run, hidden, cache, column))
        found = zip(*columns, strict=True)
        return [list(row[: len(own)]) for row, own in zip(found, texts, strict=True)]


def slots(memory: KVCache) -> list[int]:
    """Return the number of slots of each row of a KV cache."""
    return list(memory.lengths)
