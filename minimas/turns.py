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
from .cache import KVCache
from .generate import Sampling, Written, generator, read, stream
from .latent import think
from .load import LM
from .results import AgentTrace, Result, Watcher
from .teams import TEAMS, Agent, Team
from .tokenizer import Turn, is_text

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
            raise ValueError(f"questions: found {self.questions!r}, expected a list of at least one text")
        for i, question in enumerate(self.questions, start=1):
            if not isinstance(question, str) or not question.strip() or not is_text(question):
                raise ValueError(f"question {i}: found {question!r:.80}, expected a text that is not empty")
        if self.kind not in KINDS:
            raise ValueError(f"kind (--kind): found {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.choices is None or isinstance(self.choices, Mapping):
            self.choices = [self.choices] * len(self.questions)
        if len(self.choices) != len(self.questions) or any(c is not None and not c for c in self.choices):
            raise ValueError(f"choices: found {self.choices!r:.80}, expected a dict letter -> text for each question")
        self.end_ids, self.closing = self.lm.end_ids, self.tokenizer.encode(self.tokenizer.turn_end)
        self.generators = [generator(self.seed, question) for question in self.questions]

    def rolled(self) -> "Run":
        """The same run with question i + 1 in the place of question i."""
        other = copy.copy(self)
        for field in ("questions", "choices", "generators"):
            first, *rest = getattr(self, field)
            setattr(other, field, [*rest, first])
        return other

    def team(self, team: str | Team) -> Team:
        """A team given by name: the folder's own first, then the generic one."""
        if isinstance(team, Team):
            return team
        if team not in self.lm.teams.keys() | TEAMS.keys():
            raise ValueError(f"team (--team): found {team!r}, expected a Team or one of {', '.join(TEAMS)}")
        return self.lm.teams.get(team) or TEAMS[team]()

    def turn(self, agent: Agent, q: int, context: str = "") -> Turn:
        """Agent's turn on question q, up to the open assistant turn."""
        options = (self.choices[q] or {}) if self.kind == "choice" else {}
        asked = self.questions[q] + "".join(prompts.OPTION.format(letter=k, text=v) for k, v in options.items())
        fill = {"{question}": asked, "{context}": context, "{form}": prompts.FORMS[self.kind]}
        # In one pass, so that a question that holds "{context}" stays a question.
        text = re.sub("|".join(map(re.escape, fill)), lambda match: fill[match.group()], agent.prompt)
        return self.tokenizer.turn(text, agent.system, agent.prefix)

    def turns(self, agent: Agent) -> list[Turn]:
        """Agent's turn on every question."""
        return [self.turn(agent, q) for q in range(len(self.questions))]

    def require_room(self, agent: Agent, held: int, reads: int, thinks: int, writes: bool, closes: bool) -> int:
        """The slots held after an agent's turn at most; raises ValueError if the model's context is shorter."""
        limit, wrote = self.lm.model.config.max_position_embeddings, self.sampling.max_new_tokens if writes else 0
        if (needed := held + reads + thinks + wrote + (len(self.closing) if closes else 0)) > limit:
            raise ValueError(
                f"{agent.name}: {held} slots of memory, a prompt of {reads} tokens, {thinks} thoughts (--latent-steps)"
                f" and {wrote} tokens to write (--max-new-tokens) make {needed}, expected {limit} or fewer, the context"
            )
        return needed

    def encoded(
        self, agents: Sequence[Agent], turns: Sequence[Turn], memory: KVCache, steps: int, writes: bool, closes: bool
    ) -> list[list[int]]:
        """The ids of turns that take place side by side, all questions of the first agent, of the second …"""
        ids = [self.tokenizer.encode_turn(turn) for turn in turns]
        for row, (held, row_ids) in enumerate(zip(memory.lengths.tolist(), ids, strict=True)):
            self.require_room(agents[row // len(self.questions)], held, len(row_ids), steps, writes, closes)
        return ids

    def act(
        self, agents: Sequence[Agent], turns: Sequence[Turn], memory: KVCache, steps: int = 0, align: Any = None,
        writes: bool = True, final: bool = False, closes: bool = False,
    ) -> "Acted":
        """Let `agents` take one turn side by side, as rows of one batch: all questions of the first, of the second …"""
        model, B, start, held = self.lm.model, len(self.questions), self._clock(), memory.lengths
        ids = self.encoded(agents, turns, memory, steps, writes, closes)
        self.watcher.begin(" + ".join(agent.name for agent in agents), sum(map(len, ids)), steps)
        hidden, memory = self.read(ids, memory)
        read_until = memory.lengths
        if align is not None:
            align = self.drawing(align, len(agents))

            def watched(hidden: Tensor) -> Tensor:
                self.watcher.thought()
                return align(hidden)  # type: ignore[no-any-return]

            _, hidden = think(model, watched, hidden, memory, steps)
        written = [Written("", [], "stop")] * len(ids)
        if writes:
            sources = self.generators * len(agents)
            how, hands_over = (self.sampling, self.end_ids, sources), align is not None and not final
            pieces = stream(model, self.tokenizer, hidden, memory, *how, ids, remember=hands_over)
            for row, piece, done in pieces:
                if final and piece:
                    self.watcher.text(row, piece)
                if done is not None:
                    written[row] = done
        if closes:
            # Left open, the next agent's system message would stand inside this one's answer.
            read(model, [self.closing] * len(ids), memory)
        seconds, sizes = (self._clock() - start) / len(ids), (memory.lengths * memory.slot_nbytes).tolist()
        traces = []
        for row, (turn, read_ids, out, size) in enumerate(zip(turns, ids, written, sizes, strict=True)):
            bill = (len(read_ids), steps, len(out.ids), seconds, size)
            traces.append(AgentTrace(*bill, name=agents[row // B].name, prompt=turn.text, text=out.text))
        self.watcher.memory(memory)
        for first in range(0, len(traces), B):
            self.watcher.end(traces[first : first + B])
        return Acted(memory, held, read_until, steps, traces, written)

    def read(self, ids: list[list[int]], memory: KVCache) -> tuple[Tensor, KVCache]:
        """Each row's last state, and the memory that was read into: another one, where `shared` had it already."""
        if self.shared is None or bool(memory.lengths.any()):
            return read(self.lm.model, ids, memory), memory
        key = tuple(map(tuple, ids))
        if key not in self.shared:
            self.shared[key] = read(self.lm.model, ids, memory), memory
        hidden, kept = self.shared[key]
        return hidden, kept.fork()

    def drawing(self, align: Any, agents: int) -> Any:
        """`align` itself; one that draws does so from each question's own source, for so many agents side by side."""
        return align.drawing(self.generators * agents) if hasattr(align, "drawing") else align

    def _clock(self) -> float:
        if self.lm.model.device.type == "cuda":
            torch.cuda.synchronize(self.lm.model.device)  # kernels are queued, not done, when a call returns
        return time.perf_counter()

    def results(self, acts: Sequence[tuple[list[AgentTrace], list[Written]]]) -> list[Result]:
        """One result for each question, from all agents' turns in order."""
        B, results = len(self.questions), []
        for q, (question, out) in enumerate(zip(self.questions, acts[-1][1], strict=True)):
            traces = [trace for trace_list, _ in acts for trace in trace_list[q::B]]
            answer = extract(self.kind, behind(traces[-1].prompt, out.text), self.choices[q])
            results.append(Result(question, out.text, answer, out.finish_reason, traces))
        return results


def behind(prompt: str, text: str) -> str:
    """A text with the `<think>` that its prompt, by a prefix or the template, has opened for it."""
    return ("<think>" if prompt.rstrip().endswith("<think>") else "") + text


class Acted(NamedTuple):
    """One turn of one or more agents: the memory after it, and which of its slots are whose."""

    memory: KVCache
    held: Tensor  # (rows,) slots before the turn
    read_until: Tensor  # (rows,) slots after the prompt; the thoughts follow
    steps: int
    traces: list[AgentTrace]
    written: list[Written]

    def hand_over(self, transfer: str) -> KVCache:
        """The memory as the next agent sees it."""
        if transfer == "none":
            return self.memory.truncate(0)
        if transfer == "last":
            return self.memory.keep_last(self.memory.lengths - self.held)
        if transfer == "latents":
            thoughts = self.memory.truncate(self.read_until + self.steps).keep_last(self.steps)
            return KVCache.concat([self.memory.truncate(self.held), thoughts])
        return self.memory


def stages(team: Team, alike: Callable[[Agent], Any]) -> Iterator[tuple[list[Agent], bool, bool]]:
    """Yield (agents of one batch, whether from empty memory, whether the last). The experts of a parallel team share a
    batch as far as `alike` gives the same for them.
    """
    *before, last = team.agents
    if team.parallel:
        yield from ((list(group), True, False) for _, group in itertools.groupby(before, key=alike))
    else:
        yield from (([agent], False, False) for agent in before)
    yield [last], False, True


def require_context(run: Run, thinking: Run, team: Team, steps: Callable[..., int], transfer: str) -> None:
    """Raise ValueError before the first turn if the last one, or any between, does not fit into the context."""
    for q in range(len(run.questions)):
        held = 0
        for agents, alone, final in stages(team, alike=lambda agent: None):
            asked = run if final else thinking
            for agent in agents:
                reads, before = len(run.tokenizer.encode_turn(asked.turn(agent, q))), 0 if alone else held
                writes, thinks = final or agent.writes, steps(agent, final)
                after = run.require_room(agent, before, reads, thinks, writes, closes=not final)
                added = {"latents": thinks, "none": 0}.get(transfer, after - before)
                held = added if transfer == "last" else held + added
