"""One turn of agents side by side: read the prompt behind the memory, think, write if it is one's turn to, close.

Everything a call's turns have in common is a `Run`, checked at the door. Does not know: which agent comes after which,
and what is handed over, beyond cutting a memory to what the next one may see.

    B questions   D hidden
"""

import copy
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import prompts
from .answers import KINDS, extract
from .core.cache import KVCache
from .core.latent import think
from .core.model import prefill
from .layout import LAYOUTS, ChatLayout
from .load import LM
from .results import AgentTrace, Result, Watcher
from .teams import TEAMS, Agent, Team
from .text.generate import GeneratedText, Sampling, generator, stream
from .text.tokenizer import Turn, is_text

# What was read into empty memory: the ids of all rows -> the last states and the memory.
Shared = dict[tuple[tuple[int, ...], ...], tuple[Tensor, KVCache]]


@dataclass
class Run:
    """One call of a method: what is the same for all of its agents, checked at the door."""

    lm: LM
    questions: Sequence[str]
    kind: str
    choices: Any
    sampling: Sampling
    seed: int
    watcher: Watcher
    shared: Shared | None = None

    def __post_init__(self) -> None:
        if self.lm.tokenizer is None:
            raise ValueError(f"{self.lm.no_tokenizer}: questions are text")
        self.tokenizer = self.lm.tokenizer
        if isinstance(self.questions, str) or not self.questions:
            raise ValueError(
                f"questions: found {self.questions!r}, expected a list of at least one text"
            )
        for i, question in enumerate(self.questions, start=1):
            if not isinstance(question, str) or not question.strip() or not is_text(question):
                raise ValueError(
                    f"question {i}: found {question!r:.80}, expected a text that is not empty"
                )
        if self.kind not in KINDS:
            raise ValueError(
                f"kind (--kind): found {self.kind!r}, expected one of {', '.join(KINDS)}"
            )
        if self.choices is None or isinstance(self.choices, Mapping):
            self.choices = [self.choices] * len(self.questions)
        if len(self.choices) != len(self.questions) or any(
            c is not None and not c for c in self.choices
        ):
            raise ValueError(
                f"choices: found {self.choices!r:.80}, expected a dict letter -> text for each question"
            )
        self.end_ids, self.closing = self.lm.end_ids, self.tokenizer.encode(self.tokenizer.turn_end)
        self.generators = [generator(self.seed, question) for question in self.questions]

    def rolled(self) -> "Run":
        """The same run with question i + 1 in the place of question i."""
        other = copy.copy(self)
        for field in ("questions", "choices", "generators"):
            first, *rest = getattr(self, field)
            setattr(other, field, [*rest, first])
        return other

    def fill(self, prompt: str, q: int, context: str = "") -> str:
        """Return a prompt with question q, its context and the form of its answer filled in."""
        options = (self.choices[q] or {}) if self.kind == "choice" else {}
        asked = self.questions[q] + "".join(
            prompts.OPTION.format(letter=k, text=v) for k, v in options.items()
        )
        fill = {"{question}": asked, "{context}": context, "{form}": prompts.FORMS[self.kind]}
        # In one pass, so that a question that holds "{context}" stays a question.
        text = re.sub("|".join(map(re.escape, fill)), lambda match: fill[match.group()], prompt)
        # The blank lines around an earlier agent's text are not for the start of a prompt.
        return text.lstrip("\n") if prompt.startswith("{context}") else text

    def layouts(self, team: Team) -> list[ChatLayout]:
        """Return where the team's prompts stand, for every question."""
        layout = LAYOUTS[team.layout]
        return [
            layout(
                self.tokenizer,
                team,
                self.fill(team.opening, q),
                [self.fill(a.prompt, q) for a in team.agents],
            )
            for q in range(len(self.questions))
        ]

    def require_room(
        self, agent: Agent, held: int, reads: int, thinks: int, writes: bool, closes: bool
    ) -> int:
        """The slots held after an agent's turn at most; raises ValueError if the model's context is shorter."""
        limit, wrote = (
            self.lm.model.config.max_position_embeddings,
            self.sampling.max_new_tokens if writes else 0,
        )
        if (needed := held + reads + thinks + wrote + (len(self.closing) if closes else 0)) > limit:
            raise ValueError(
                f"{agent.name}: {held} slots of memory, a prompt of {reads} tokens, {thinks} thoughts (--latent-steps)"
                f" and {wrote} tokens to write (--max-new-tokens) make {needed}, expected {limit} or fewer, the context"
            )
        return needed

    def encoded(
        self,
        agents: Sequence[Agent],
        turns: Sequence[Turn],
        memory: KVCache,
        steps: int,
        writes: bool,
        closes: bool,
    ) -> list[list[int]]:
        """The ids of turns that take place side by side, all questions of the first agent, of the second …"""
        ids = [self.tokenizer.encode_turn(turn) for turn in turns]
        for row, (held, row_ids) in enumerate(zip(memory.lengths, ids, strict=True)):
            self.require_room(
                agents[row // len(self.questions)], held, len(row_ids), steps, writes, closes
            )
        return ids

    def act(
        self,
        agents: Sequence[Agent],
        turns: Sequence[Turn],
        memory: KVCache,
        steps: int = 0,
        align: Any = None,
        writes: bool = True,
        final: bool = False,
        closes: bool = False,
        head: Tensor | None = None,
    ) -> "Acted":
        """Let `agents` take one turn side by side, as rows of one batch: all questions of the first, of the second …"""
        model, B, start, held = (
            self.lm.model,
            len(self.questions),
            self._clock(),
            torch.as_tensor(memory.lengths),
        )
        ids = self.encoded(agents, turns, memory, steps, writes, closes)
        self.watcher.begin(" + ".join(agent.name for agent in agents), sum(map(len, ids)), steps)
        hidden, memory = self.prefill(ids, memory)
        read_until = torch.as_tensor(memory.lengths)
        if align is not None:
            align = self.drawing(align, len(agents))

            def watched(hidden: Tensor) -> Tensor:
                self.watcher.thought()
                return align(hidden)  # type: ignore[no-any-return]

            _, hidden = think(model, watched, hidden, memory, steps)
        written, hands_over = (
            [GeneratedText("", [], "stop")] * len(ids),
            align is not None and not final,
        )
        if writes:
            how = self.sampling, self.end_ids, self.generators * len(agents)
            pieces = stream(model, self.tokenizer, hidden, memory, *how, ids, remember=hands_over)
            for row, piece, done in pieces:
                if final and piece:
                    self.watcher.text(row, piece)
                if done is not None:
                    written[row] = done
        if closes:
            # Left open, the next agent's system message would stand inside this one's answer.
            prefill(model, [self.closing] * len(ids), memory)
        seconds, ends = (self._clock() - start) / len(ids), len(self.closing) if closes else 0
        traces = []
        for row, (turn, read_ids, out) in enumerate(zip(turns, ids, written, strict=True)):
            unfed = (
                out.finish_reason == "length" and not hands_over
            )  # the last token, which nobody needs in the cache
            slots = int(read_until[row]) + steps + len(out.ids) - unfed + ends
            bill = (len(read_ids), steps, len(out.ids), seconds, slots * memory.slot_nbytes)
            traces.append(
                AgentTrace(*bill, name=agents[row // B].name, prompt=turn.text, text=out.text)
            )
        self.watcher.memory(memory)
        for first in range(0, len(traces), B):
            self.watcher.end(traces[first : first + B])
        head = torch.zeros_like(held) if head is None else head
        return Acted(memory, held, head, read_until, steps, traces, written)

    def prefill(self, ids: list[list[int]], memory: KVCache) -> tuple[Tensor, KVCache]:
        """Each row's last state, and the memory that was read into: another one, where `shared` had it already."""
        if self.shared is None or any(memory.lengths):
            return prefill(self.lm.model, ids, memory), memory
        key = tuple(map(tuple, ids))
        if key not in self.shared:
            self.shared[key] = prefill(self.lm.model, ids, memory), memory
        hidden, kept = self.shared[key]
        return hidden, kept.fork()

    def drawing(self, align: Any, agents: int) -> Any:
        """`align` itself; one that draws does so from each question's own source, for so many agents side by side."""
        return align.drawing(self.generators * agents) if hasattr(align, "drawing") else align

    def _clock(self) -> float:
        if self.lm.model.device.type == "cuda":
            torch.cuda.synchronize(
                self.lm.model.device
            )  # kernels are queued, not done, when a call returns
        return time.perf_counter()

    def results(self, acts: Sequence[tuple[list[AgentTrace], list[GeneratedText]]]) -> list[Result]:
        """One result for each question, from all agents' turns in order."""
        B, results = len(self.questions), []
        for q, (question, out) in enumerate(zip(self.questions, acts[-1][1], strict=True)):
            traces = [trace for trace_list, _ in acts for trace in trace_list[q::B]]
            answer = extract(self.kind, behind(traces[-1].prompt, out.text), self.choices[q])
            results.append(Result(question, out.text, answer, out.finish_reason, traces))
        return results


def choose_team(lm: LM, team: str | Team) -> Team:
    """Return a team given by name: the folder's own first, then the generic one. A Team is returned as it is."""
    if isinstance(team, Team):
        return team
    if team not in lm.teams.keys() | TEAMS.keys():
        raise ValueError(
            f"team (--team): found {team!r}, expected a Team or one of {', '.join(TEAMS)}"
        )
    return lm.teams.get(team) or TEAMS[team]()


def behind(prompt: str, text: str) -> str:
    """A text with the `<think>` that its prompt, by a prefix or the template, has opened for it."""
    return ("<think>" if prompt.rstrip().endswith("<think>") else "") + text


class Acted(NamedTuple):
    """One turn of one or more agents: the memory after it, and which of its slots are whose."""

    memory: KVCache
    held: Tensor  # (rows,) slots before the turn
    head: Tensor  # (rows,) slots of the layout's head, which every hand-over keeps
    read_until: Tensor  # (rows,) slots after the prompt; the thoughts follow
    steps: int
    traces: list[AgentTrace]
    written: list[GeneratedText]

    def hand_over(self, transfer: str) -> KVCache:
        """The memory as the next agent sees it."""
        start = torch.maximum(self.held, self.head)  # what this turn added comes after it
        if transfer == "none":
            return self.memory.truncate(0)
        if transfer == "last":
            return KVCache.concat(
                [
                    self.memory.truncate(self.head),
                    self.memory.keep_last(torch.as_tensor(self.memory.lengths) - start),
                ]
            )
        if transfer == "latents":
            thoughts = self.memory.truncate(self.read_until + self.steps).keep_last(self.steps)
            return KVCache.concat([self.memory.truncate(start), thoughts])
        return self.memory


def stages(team: Team, alike: Callable[[Agent], Any]) -> Iterator[tuple[list[int], bool, bool]]:
    """Yield (numbers of the agents of one batch, whether from an empty cache, whether the last). The experts of a
    parallel team share a batch as far as `alike` gives the same for them.
    """
    last = len(team.agents) - 1
    if team.parallel:
        groups = itertools.groupby(range(last), key=lambda i: alike(team.agents[i]))
        yield from ((list(group), True, False) for _, group in groups)
    else:
        yield from (([i], False, False) for i in range(last))
    yield [last], False, True


def require_context(
    run: Run, thinking: Run, team: Team, steps: Callable[..., int], transfer: str
) -> None:
    """Raise ValueError before the first turn if the last one, or any between, does not fit into the context."""
    for own, others in zip(run.layouts(team), thinking.layouts(team), strict=True):
        held = head = 0
        for numbers, alone, final in stages(team, alike=lambda agent: None):
            layout = own if final else others
            for i in numbers:
                agent, before = team.agents[i], 0 if alone else held
                reads = len(run.tokenizer.encode_turn(layout.prompt(i, first=before == 0)))
                head = head if before else layout.head_tokens(i)
                writes, thinks = final or agent.writes, steps(agent, final)
                after = run.require_room(
                    agent, before, reads, thinks, writes, layout.closes_turns and not final
                )
                added = thinks if transfer == "latents" else after - max(before, head)
                kept = head if transfer == "last" else max(held, head)
                held = 0 if transfer == "none" else kept + added
