"""One turn of agents side by side: prefill the prompts, think, decode, close the chat turn.

A `Run` is one call of a method. It checks the caller's arguments, fills in the prompts, and takes
the turns. A turn is one batch: its rows are all questions of the first agent, then all questions of
the second, and so on. This file does not depend on which agents work, and in which order.

    B questions   R rows, B per agent   D hidden
"""

import copy
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from . import prompts
from .answers import KINDS, extract
from .core.cache import KVCache
from .core.errors import ContextError, ParameterError
from .core.model import prefill
from .core.rollout import Thought, rollout
from .layout import Layout, TurnLayout
from .load import LM, text_tokenizer
from .results import AgentEnd, AgentStart, AgentTrace, Events, Piece, Result
from .teams import Agent, Team
from .text.generate import GeneratedText, Sampling, generator, stream
from .text.tokenizer import PromptText, is_text


class TurnResult(NamedTuple):
    """One turn of one or more agents: what was fed, and the KV cache after it."""

    lm: LM
    cache: Any  # a KVCache, or None once it is handed over
    hidden: Tensor  # (R, 1, D): the state after the prompt and the thoughts
    ids: list[list[int]]  # token ids of the prompts, per row
    thoughts: list[Thought]
    start: list[int]  # slots per row before the turn
    prompt_end: list[int]  # slots per row after the prompt
    thoughts_end: list[int]  # slots per row after the thoughts
    traces: list[AgentTrace]
    outputs: list[GeneratedText]

    def for_next_agent(self, transfer: str, shared: list[int]) -> tuple[KVCache, list[int]]:
        """Return the cache that the next agent gets, and how many of its slots per row are shared.

        `shared` counts the slots per row that no transfer cuts: the memory and the preamble. Only
        this turn is left to cut, because earlier turns were cut when they ended.
        """
        cache = self.cache
        # The first turn prefilled the preamble too: the slots to cut begin after it.
        own_start = list(map(max, self.start, shared))
        if transfer == "none":  # only the memory is left, as every turn starts after it
            return cache.truncate(self.start), self.start
        if transfer == "last":
            cache = cache.drop(shared, own_start)
        if transfer == "latents":
            cache = cache.truncate(self.thoughts_end).drop(own_start, self.prompt_end)
        return cache, shared


@dataclass
class Run:
    """One call of a method: what is the same for all of its agents.

    For the fields, see the parameters of `latent_mas`. `choices` becomes a list, one per question.
    Raises ValueError naming the parameter or question, what was found and what was expected.
    """

    lm: LM
    questions: Sequence[str]
    kind: str = "free"
    choices: Any = None
    sampling: Sampling | None = None
    seed: int = 0
    memory: KVCache | None = None
    keep_memory: bool = False
    continues: bool = False
    models: Any = None

    # Without annotations, because these are not parameters.
    seconds = 0.0  # that `mixed.receive` took to prefill the turns of other models
    auto_steps = False  # whether rows stop thinking where their turn would end

    def __post_init__(self) -> None:
        self.tokenizer = text_tokenizer(self.lm)
        listed = isinstance(self.questions, Sequence) and not isinstance(self.questions, str)
        if not listed or not self.questions:
            raise ValueError(
                f"questions: found {self.questions!r}, expected a list of at least one text"
            )
        for i, question in enumerate(self.questions, start=1):
            if not is_text(question):
                raise ValueError(
                    f"question {i}: found {question!r:.80}, expected UTF-8 text that is not blank"
                )
        B = len(self.questions)
        if self.kind not in KINDS:
            raise ParameterError("kind", f"found {self.kind!r}, expected one of {', '.join(KINDS)}")
        if isinstance(self.choices, Mapping | None):
            self.choices = [self.choices] * B
        if (
            not isinstance(self.choices, Sequence)
            or len(self.choices) != B
            or not all(isinstance(one, Mapping | None) and one != {} for one in self.choices)
        ):
            raise ValueError(
                f"choices: found {self.choices!r:.80}, "
                "expected a dict letter -> text for each question"
            )
        self.used_sampling = self.sampling or self.lm.sampling
        if not isinstance(self.used_sampling, Sampling):
            raise ParameterError("sampling", f"found {self.sampling!r:.80}, expected a Sampling")
        self.closing = self.tokenizer.encode(self.tokenizer.turn_end)
        self.generators = [generator(self.seed, question) for question in self.questions]
        self.prefilled = [0] * B  # slots that `mixed.receive` filled: they count as prompt tokens
        memory = self.memory or self.lm.model.new_cache(1)
        if not isinstance(memory, KVCache) or len(memory.lengths) not in (1, B):
            raise ParameterError(
                "memory",
                f"found {memory!r:.80}, expected a KVCache with 1 row or {B}, one per question",
            )
        memory.set_owner(self.lm.model)
        self.memory = memory
        self.memory_rows = [0] * B if len(memory.lengths) == 1 else list(range(B))
        self.memory_lengths = [memory.lengths[row] for row in self.memory_rows]
        self.continues &= any(self.memory_lengths)

    def with_model_of(self, agent: Agent) -> Self:
        """Return a copy of this run with the agent's model, but the call's prompts and sampling."""
        other = copy.copy(self)
        if agent.model:
            other.lm = self.models[agent.model]
            # Empty, like the call's own: `require_models` refuses models with a memory.
            other.memory = other.lm.model.new_cache(1)
        return other

    def new_cache(self, agents: int = 1) -> KVCache:
        """Return a copy of `memory`, or an empty KV cache: one row per agent and question."""
        assert self.memory is not None
        return self.memory.select(self.memory_rows * agents)

    def is_new(self, cache: KVCache) -> bool:
        """Return whether nothing was added to a cache from `new_cache`.

        Its lengths tell, because every turn adds slots and no transfer cuts into the memory. The
        rows of the first agent stand for those of all agents.
        """
        return cache.lengths[: len(self.questions)] == self.memory_lengths

    def fill(self, prompt: str, q: int, context: str = "") -> str:
        """Return a prompt with question `q`, `context` and the form of the answer filled in."""
        options = (self.choices[q] or {}) if self.kind == "choice" else {}
        lines = [prompts.OPTION.format(letter=key, text=text) for key, text in options.items()]
        values = {
            "{question}": self.questions[q] + "".join(lines),
            "{context}": context,
            "{form}": prompts.FORMS[self.kind],
        }
        # In one pass, so that "{context}" inside a question is not replaced.
        text = re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], prompt)
        # A prompt must not start with the blank lines that separate {context} from other text.
        return text.lstrip("\n") if prompt.startswith("{context}") else text

    def layouts(self, team: Team) -> list[Layout]:
        """Return the team's layout, with all prompts filled in, for each question."""
        layout = TurnLayout if team.layout == "turn" else Layout
        return [
            layout(
                self.tokenizer,
                team,
                self.fill(team.opening, q),
                [self.fill(agent.prompt, q) for agent in team.agents],
                self.continues,
            )
            for q in range(len(self.questions))
        ]

    def require_context(
        self, agent: Agent, start: int, tokens: int, steps: int, decodes: bool, closes: bool
    ) -> int:
        """Return the maximum number of slots after an agent's turn that starts with `start` slots.

        Raises ContextError naming the agent and the flags if the model's context is shorter.
        """
        limit = self.lm.model.config.max_position_embeddings
        generated = self.used_sampling.max_new_tokens if decodes else 0
        needed = start + tokens + steps + generated + closes * len(self.closing)
        if needed > limit:
            raise ContextError(
                f"{agent.name}: {start} slots of working memory, a prompt of {tokens} tokens, "
                f"{steps} thoughts (--latent-steps), {generated} new tokens (--max-new-tokens) and "
                f"the turn's end make {needed}, expected at most {limit} (the context)"
            )
        return needed

    def prefill(self, ids: list[list[int]], cache: KVCache) -> tuple[Tensor, KVCache]:
        """Prefill one prompt per row. Returns each row's last state (R, 1, D) and the KV cache.

        The cache is returned, because in an evaluation runs share equal first prompts: there a
        subclass returns a copy of a cache that already holds them.
        """
        return prefill(self.lm.model, ids, cache), cache

    def turn(
        self,
        agents: Sequence[Agent],
        texts: Sequence[PromptText],
        cache: KVCache,
        steps: int = 0,
        align: Any = None,
        decodes: bool = True,
        final: bool = False,
        keeps_cache: bool = False,
        closes: bool = False,
    ) -> Events[TurnResult]:
        """Let `agents` take one turn side by side: prefill, think, decode, close the chat turn.

        `texts` holds one prompt per row. `final` marks the last agent's turn. With `keeps_cache`
        all generated tokens are in the cache afterwards. `closes` appends the chat turn's end.
        """
        began = self.clock() - self.seconds  # the agent's time includes that of `mixed.receive`
        start = list(cache.lengths)
        ids = [self.tokenizer.encode_turn(text) for text in texts]
        workers = [agent for agent in agents for _ in self.questions]  # one per row
        for agent, filled, row_ids in zip(workers, start, ids, strict=True):
            self.require_context(agent, filled, len(row_ids), steps, decodes, closes)
        name = " + ".join(agent.name for agent in agents)
        prompt_tokens = list(map(add, self.prefilled * len(agents), map(len, ids)))
        yield AgentStart(name, sum(prompt_tokens), steps)

        hidden, cache = self.prefill(ids, cache)  # (R, 1, D)
        prompt_end = list(cache.lengths)
        thoughts = yield from self.think(align, hidden, cache, steps)
        hidden = thoughts[-1].after if thoughts else hidden
        thoughts_end = list(cache.lengths)
        outputs = [GeneratedText("", [], "stop")] * len(ids)
        if decodes:
            outputs = yield from self.decode(hidden, cache, ids, final, keeps_cache)
        if closes:  # otherwise the next prompt would continue the open assistant turn
            self.prefill([self.closing] * len(ids), cache)
        seconds = (self.clock() - began) / len(ids)
        traces = []
        for row, out in enumerate(outputs):
            # A last token at the length limit is fed only if the cache is used afterwards.
            unfed = out.finish_reason == "length" and not keeps_cache
            slots = thoughts_end[row] + len(out.ids) - unfed + closes * len(self.closing)
            count = thoughts_end[row] - prompt_end[row]
            usage = (prompt_tokens[row], count, len(out.ids), seconds, slots * cache.slot_nbytes)
            traces.append(AgentTrace(*usage, workers[row].name, texts[row].text, out.text))
        yield AgentEnd(name, traces, cache)
        return TurnResult(
            self.lm, cache, hidden, ids, thoughts, start, prompt_end, thoughts_end, traces, outputs
        )

    def think(
        self, align: Any, hidden: Tensor, cache: KVCache, steps: int
    ) -> Events[list[Thought]]:
        """Think from hidden (R, 1, D), and yield each thought. Returns all thoughts of the turn.

        In an evaluation, a subclass gives each row a random map of its own.
        """
        until = self.ends_turn if self.auto_steps else None
        thoughts = []
        for thought in rollout(self.lm.model, align, hidden, cache, steps, until):
            yield thought
            thoughts.append(thought)
        return thoughts

    def ends_turn(self, hidden: Tensor, thoughts: Tensor) -> Tensor:
        """Return whether the likeliest next token would end the turn, (R,) bool.

        It is always False before the first thought is fed. `thoughts` includes the one that is
        about to be fed.
        """
        tokens = self.lm.model.logits(hidden)[:, 0].argmax(-1)
        ends = torch.zeros_like(tokens, dtype=torch.bool)
        for end_id in self.lm.end_ids:  # a tensor of them would be copied to the GPU in each step
            ends |= tokens == end_id
        return ends & (thoughts.shape[1] > 1)

    def results(self, turns: Sequence[TurnResult]) -> list[Result]:
        """Return one result per question, from all agents' turns in order."""
        results = []
        for q, (question, out) in enumerate(zip(self.questions, turns[-1].outputs, strict=True)):
            traces = [trace for turn in turns for trace in turn.traces[q :: len(self.questions)]]
            results.append(
                Result(
                    question,
                    out.text,
                    extract(
                        self.kind, with_opened_think(traces[-1].prompt, out.text), self.choices[q]
                    ),
                    out.finish_reason,
                    traces,
                    turns[-1].cache.select([q]) if self.keep_memory else None,
                )
            )
        return results

    def decode(
        self,
        hidden: Tensor,
        cache: KVCache,
        ids: list[list[int]],
        final: bool = False,
        keeps_cache: bool = False,
    ) -> Events[list[GeneratedText]]:
        """Generate text from hidden (R, 1, D), and yield each piece. Returns each row's text.

        For `ids`, the prompts' tokens, and `keeps_cache`, see `text.generate.decode`.
        """
        outputs: dict[int, GeneratedText] = {}
        B = len(self.questions)
        pieces = stream(
            self.lm.model, self.tokenizer, hidden, cache, self.used_sampling, self.lm.end_ids,
            self.generators * (len(ids) // B), ids, keeps_cache,
        )  # fmt: skip
        for row, piece, done in pieces:
            if piece or done is None:
                yield Piece(row % B, piece, final)
            if done is not None:
                outputs[row] = done
        return [outputs[row] for row in range(len(ids))]

    def clock(self) -> float:
        """Wait until the model's device has finished its work, and return the time in seconds."""
        if self.lm.model.device.type == "cuda":
            torch.cuda.synchronize(self.lm.model.device)  # a call returns before its kernels end
        elif self.lm.model.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def with_opened_think(prompt: str, text: str) -> str:
    """Return a generated text, with `<think>` before it if its prompt ends with that tag."""
    return ("<think>" if prompt.rstrip().endswith("<think>") else "") + text
