"""Three methods for a team of agents: single, text_mas and latent_mas.

Each method is a loop over agents: prefill the prompt, think, hand over. The last agent decodes the
answer. The methods differ in what is handed over: nothing, text, or the KV cache of all earlier
agents (LatentMAS, arXiv 2511.20639, section 3). `turns.Run.turn` is one step of each loop. This
file does not depend on attention, on how a thought is made, or on printing.

    thought     one latent step
    turn        what agents do in one call of `Run.turn`: prefill, think and perhaps decode
    chat turn   one message of the chat template, from its header to its end
    row         one question of one agent
    slot        one position of the KV cache
    memory      the KV cache that the caller passes in; it comes before everything else
    preamble    what all prompts begin with in layout "turn": system message, header and opening
    shared      slots that no transfer cuts: the memory and the preamble

    B questions   R rows, B per agent   D hidden
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple

from torch import Tensor

from . import prompts
from .core.cache import KVCache
from .core.errors import ParameterError
from .core.rollout import Align
from .layout import user_text
from .load import LM
from .mixed import MAPS, receive, require_models
from .results import Event, Events, OnEvent, Result, run_to_end
from .teams import SINGLE, TEAMS, Agent, Team
from .text.generate import Sampling
from .text.tokenizer import PromptText
from .turns import Run, TurnResult

TRANSFERS = ("full", "latents", "last", "none", "shuffled")
AUTO_STEPS = 40  # limit per agent for latent_steps="auto", unless the agent has its own


def single(
    lm: LM,
    questions: Sequence[str],
    kind: str = "free",
    choices: Any = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    on_event: OnEvent | None = None,
    memory: KVCache | None = None,
    keep_memory: bool = False,
    continues: bool = False,
) -> list[Result]:
    """Let a single agent answer each question: the baseline. Parameters: see `latent_mas`."""
    return call("single", **locals())  # locals(): all parameters, by name


def text_mas(
    lm: LM,
    questions: Sequence[str],
    team: str | Team = "sequential",
    kind: str = "free",
    choices: Any = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    on_event: OnEvent | None = None,
    memory: KVCache | None = None,
    keep_memory: bool = False,
    continues: bool = False,
    models: Mapping[str, LM] | None = None,
) -> list[Result]:
    """Let the agents hand over text, which replaces `{context}` in the prompts of later agents.

    A prompt without `{context}` follows the earlier turns, as in a conversation. Parameters and
    errors: see `latent_mas`. A prompt depends on the texts before it. If it does not fit, or if the
    chat template refuses it, the error comes only when it is the agent's turn.
    """
    return call("text_mas", **locals())


def latent_mas(
    lm: LM,
    questions: Sequence[str],
    team: str | Team = "sequential",
    latent_steps: int | str | None = None,
    align: str | Align = "ridge",
    kind: str = "free",
    choices: Any = None,
    sampling: Sampling | None = None,
    transfer: str = "full",
    seed: int = 0,
    on_event: OnEvent | None = None,
    close: bool = True,
    layout: str | None = None,
    memory: KVCache | None = None,
    keep_memory: bool = False,
    continues: bool = False,
    models: Mapping[str, LM] | None = None,
) -> list[Result]:
    """Let agents think in latent space and hand over their KV cache; the last one decodes.

    `latent_steps` is the number of thoughts per agent (None: the agent's own, else the model
    folder's, else 40). The last agent thinks only if its own `latent_steps` is above 0; a number in
    the call then replaces that. With "auto", a row stops where the likeliest next token would end
    the turn, after at least one thought and at most the agent's own number, else 40. `align` is a
    kind of map (see `Aligner.from_model`), a FILE.safetensors that holds one, or any callable from
    hidden states to embeddings. An earlier agent also decodes if its `writes` is set, see `Agent`.

    `kind` ("math", "choice", "code", "free") and `choices` (a dict letter -> text, or one per
    question) set the form of the answer and how it is extracted. `sampling=None`: the model's own.
    `on_event` is called with every event (see `results`); to iterate over events, use `stream`.
    `transfer` is what the next agent gets after the memory: "full" (prompts and thoughts, the
    paper), "latents" (the preamble and all thoughts), "last" (the preamble and what the previous
    agent added; after parallel agents, the last of them), or, as controls, "none" or "shuffled"
    (question i gets the cache of question i + 1, the last one that of the first).
    `layout` is "turn" or "chat", see `Team` (None: the team's own). `close=False` does not close
    the chat turns of the earlier agents, as in the authors' code.

    `memory` is a KV cache after which every agent starts, such as one from `remember`. It has one
    row for all questions or one per question, and is copied, not prefilled again. `keep_memory`
    puts the KV cache after the answer into `Result.memory`, for the next call. `continues` renders
    the prompts as later turns of the conversation in `memory`, without a second system message.

    `models` maps each name in an agent's `model` to another model with the same tokenizer. Between
    two models, the input is handed over and prefilled again (see `mixed`).

    Raises ValueError naming the parameter, question or file, what was found and what was expected,
    before any work starts. What `align` returns, and that states are finite, is checked per step.
    """
    return call("latent_mas", **locals())


def stream(
    lm: LM, questions: Sequence[str], method: str = "latent_mas", **settings: Any
) -> Iterator[Event | Result]:
    """Yield each event of a method's call as it happens, and a `Result` per question at the end.

    `settings` are the other parameters of the method, without `on_event`. Raises the same errors as
    the method, when the first event is requested.
    """
    results = yield from work(method, lm=lm, questions=questions, **settings)
    yield from results


def call(method: str, on_event: OnEvent | None, **settings: Any) -> list[Result]:
    """Run a method and return its results; `settings` are its other parameters by name."""
    return run_to_end(work(method, **settings), on_event)


def work(method: str, **settings: Any) -> Events[list[Result]]:
    """Run a method as a generator, which yields its events and returns its results."""
    if method == "latent_mas":
        run = LatentRun(**settings)
        # Shuffled: all agents but the last work on question i + 1, and question i gets the cache.
        handover = yield from hand_over(run.shifted() if run.transfer == "shuffled" else run)
        last = run.last_turn(handover)
    elif method == "text_mas":
        team = settings.pop("team", "sequential")  # a call of `stream` may leave it out
        text_run = Run(**settings)
        last = yield from hand_over_text(text_run, choose_team(text_run.lm, team))
    elif method == "single":  # a team of one agent: nothing is handed over
        alone = Run(**settings)
        last = yield from hand_over_text(alone, alone.lm.teams.get("single", SINGLE))
    else:
        raise ParameterError("method", f"found {method!r}, expected single, text_mas or latent_mas")
    return (yield from last.answer())


def hand_over(run: "LatentRun") -> Events["HandOver"]:
    """Let every agent but the last prefill its prompt and think. Returns what the last gets.

    Sequential agents continue one KV cache. Parallel agents each start from the memory, and their
    caches are joined at the end. `run` has what belongs to the call, such as the prompts, and
    `agent_run` what belongs to the agent's model.
    """
    team = run.resolved_team
    B = len(run.questions)
    cache = run.new_cache()
    shared = run.memory_lengths
    turns = list[TurnResult]()
    experts = list[Any]()  # per agent: its cache, and the number of shared slots per row
    for numbers in run.batches():
        agents = [team.agents[i] for i in numbers]
        agent_run = run.with_model_of(agents[0])
        if team.parallel:
            cache = agent_run.new_cache(len(agents))
        else:  # the same cache, unless the previous agent had another model
            cache = receive(agent_run, turns, cache, shared)
        texts, shared = run.next_prompts(numbers, cache, shared)
        turn = yield from agent_run.turn(
            agents,
            texts,
            cache,
            run.steps(agents[0]),
            agent_run.align_map,
            decodes=agents[0].writes,
            keeps_cache=True,
            closes=run.closes_turns,
        )
        cache, shared = turn.for_next_agent(run.transfer, shared)
        turn = turn._replace(cache=None)  # frees what is not handed over
        turns.append(turn)
        if team.parallel:
            experts += [
                (cache.select(range(at, at + B)), shared[at : at + B])
                for at in range(0, len(shared), B)
            ]
    if experts:
        cache, shared = join(experts[-1:] if run.transfer == "last" else experts)
    return HandOver(run, cache, shared, turns)


def join(experts: Sequence[tuple[KVCache, list[int]]]) -> tuple[KVCache, list[int]]:
    """Return the KV caches of parallel agents as one. The slots that all share are kept once.

    If there are such slots, this is an approximation: the second and later agents filled their own
    slots right after the shared ones, but in the joined cache other agents' slots lie between.
    """
    (first, shared), *others = experts
    return KVCache.concat([first, *(cache.drop(0, start) for cache, start in others)]), shared


def hand_over_text(run: Run, team: Team) -> Events["LastTurn"]:
    """Let every agent but the last generate text for the next. Returns the last agent's turn."""
    require_models(run, team)
    B = len(run.questions)
    turns = []
    said: list[Any] = [[] for _ in range(B)]  # per question: the agents and their texts

    def prompt(agent: Agent, q: int) -> PromptText:
        """Return the prompt of an agent for question `q`.

        With `{context}`, the earlier texts are quoted in this one user message. Without it, every
        earlier prompt and text is a chat turn of its own, before this prompt.
        """
        conversation = [*said[q], (agent, None)]
        context = ""
        if "{context}" in agent.prompt:
            notes = [prompts.WORK.format(name=a.name, text=text.strip()) for a, text in said[q]]
            context = prompts.CONTEXT.format(work="".join(notes)) if notes else ""
            conversation = conversation[-1:]
        talk = PromptText("")
        for other, text in conversation:
            filled = user_text(run.fill(team.opening, q), run.fill(other.prompt, q, context))
            first = not talk.text and not run.continues
            talk += run.tokenizer.turn(filled, other.system, other.prefix, first, text is None)
            if text is not None:
                talk += PromptText.from_user(text) + PromptText(run.tokenizer.turn_end)
        return talk

    *earlier, last = team.agents
    batches = [earlier] if team.parallel and earlier else [[agent] for agent in earlier]
    for agents in batches:
        agent_run = run.with_model_of(agents[0])
        turn = yield from agent_run.turn(
            agents,
            [prompt(agent, q) for agent in agents for q in range(B)],
            agent_run.new_cache(len(agents)),
        )
        turn = turn._replace(cache=None)  # frees it: only the text is handed over
        turns.append(turn)
        for row, out in enumerate(turn.outputs):
            i, q = divmod(row, B)
            said[q].append((agents[i], out.text))
    agent_run = run.with_model_of(last)
    return LastTurn(
        agent_run, last, [prompt(last, q) for q in range(B)], agent_run.new_cache(), 0, None, turns
    )


class HandOver(NamedTuple):
    """What all agents but the last hand over: a KV cache with one row per question."""

    run: Run
    cache: KVCache
    shared: list[int]  # slots per row that all agents share: memory and preamble
    turns: list[TurnResult]


class LastTurn(NamedTuple):
    """The last agent's turn before it is taken.

    It changes the cache in place, so call `answer` or `prefill_and_think`, and only once.
    """

    run: Run
    agent: Agent
    prompts: list[PromptText]  # one per question, up to the open assistant turn
    cache: KVCache
    steps: int
    align: Align | None
    turns: list[TurnResult]  # the turns of all earlier agents

    def answer(self) -> Events[list[Result]]:
        """Prefill, think if the agent has its own `latent_steps`, and decode the answers."""
        keep = self.run.keep_memory
        turn = yield from self._take(final=True, keeps_cache=keep, closes=keep)
        return self.run.results([*self.turns, turn])

    def prefill_and_think(self) -> tuple[Tensor, KVCache]:
        """Do what `answer` does before it decodes. Returns the states (B, 1, D) and the cache."""
        turn = run_to_end(self._take(decodes=False))
        return turn.hidden, turn.cache

    def _take(self, **how: Any) -> Events[TurnResult]:
        return self.run.turn([self.agent], self.prompts, self.cache, self.steps, self.align, **how)


@dataclass
class LatentRun(Run):
    """One call of `latent_mas`. Its arguments are checked before any work starts."""

    team: str | Team = "sequential"
    latent_steps: int | str | None = None
    align: str | Align = "ridge"
    transfer: str = "full"
    close: bool = True
    layout: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transfer not in TRANSFERS:
            raise ParameterError(
                "transfer", f"found {self.transfer!r}, expected one of {', '.join(TRANSFERS)}"
            )
        if self.transfer == "shuffled" and len(self.questions) == 1:
            raise ParameterError(
                "transfer",
                "found 'shuffled' with one question, expected several of one kind (--file)",
            )
        steps = self.latent_steps
        if steps not in (None, "auto") and (type(steps) is not int or steps < 0):
            raise ParameterError(
                "latent_steps", f"found {steps!r}, expected a whole number, 0 or more, or 'auto'"
            )
        self.resolved_team = choose_team(self.lm, self.team).with_layout(self.layout)
        if not self.close and self.resolved_team.layout == "turn":
            raise ParameterError(
                "close", "found False in layout 'turn', expected True: no turn closes there"
            )
        self.auto_steps = steps == "auto"
        self.layouts_per_question = self.layouts(self.resolved_team)
        self.closes_turns = self.close and self.layouts_per_question[0].closes_turns
        require_models(self, self.resolved_team)
        if self.models and self.align not in MAPS:
            raise ParameterError(
                "align", f"found {self.align!r:.80} with models, expected {' or '.join(MAPS)}"
            )
        self._require_context_of_all()
        _ = self.align_map  # raises for a wrong map

    @property
    def align_map(self) -> Align:
        """Return the map from hidden states to embeddings, of the model of this run."""
        return self.align if callable(self.align) else self.lm.aligner(self.align)

    def steps(self, agent: Agent, final: bool = False) -> int:
        """Return an agent's number of thoughts, 0 for a last agent without its own number."""
        if final and not agent.latent_steps:
            return 0
        for steps in (self.latent_steps, agent.latent_steps):
            if isinstance(steps, int):
                return steps
        return AUTO_STEPS if self.auto_steps else self.lm.default_steps

    def batches(self) -> list[Sequence[int]]:
        """Return the numbers of the agents in each batch; the last agent is left out.

        Parallel agents are one batch if all have the same number of thoughts and the same `writes`.
        They have one model: `require_models` refuses parallel agents with several.
        """
        *earlier, _ = self.resolved_team.agents
        numbers = range(len(earlier))
        how = {(self.steps(agent), agent.writes) for agent in earlier}
        if self.resolved_team.parallel and len(how) == 1:
            return [numbers]
        return [[i] for i in numbers]

    def next_prompts(
        self, numbers: Sequence[int], cache: KVCache, shared: list[int]
    ) -> tuple[list[PromptText], list[int]]:
        """Return the prompts of a batch of agents after `cache`, and the shared slots per row.

        If nothing is handed over yet, the prompts begin with the preamble, which is counted here.
        """
        first = self.is_new(cache)
        rows = [(layout, i) for i in numbers for layout in self.layouts_per_question]
        if first:
            counts = [len(layout.preamble_ids(i)) for layout, i in rows]
            shared = list(map(add, cache.lengths, counts))
        return [layout.prompt(i, first) for layout, i in rows], shared

    def shifted(self) -> "LatentRun":
        """Return a copy of this run that has question i + 1 as question i, the first one last."""
        other = copy.copy(self)
        for field in (
            "questions", "choices", "generators", "layouts_per_question", "memory_rows",
            "memory_lengths",
        ):  # fmt: skip
            first, *rest = getattr(self, field)
            setattr(other, field, [*rest, first])
        return other

    def last_turn(self, handover: HandOver) -> LastTurn:
        """Return the last agent's turn after what this run or another one has handed over."""
        last = self.resolved_team.agents[-1]
        agent_run = self.with_model_of(last)
        cache = receive(agent_run, handover.turns, handover.cache, handover.shared)
        first = self.is_new(cache)
        # Shuffled: the preamble in the cache has another question. Replace it by this question's.
        if handover.run is not self and self.layouts_per_question[0].preamble.text and not first:
            _, preamble = agent_run.prefill(
                [layout.preamble_ids(0) for layout in self.layouts_per_question],
                agent_run.new_cache(),
            )
            cache = KVCache.concat([preamble, cache.drop(0, handover.shared)])
        return LastTurn(
            agent_run,
            last,
            [layout.prompt(-1, first) for layout in self.layouts_per_question],
            cache,
            self.steps(last, final=True),
            agent_run.align_map,
            handover.turns,
        )

    def _require_context_of_all(self) -> None:
        """Raise ContextError, before any work starts, if a turn does not fit into the context.

        This counts the slots of each row as `hand_over`, `for_next_agent`, `join` and `last_turn`
        make and cut them, and must change with them.
        """
        agents = self.resolved_team.agents
        working = self.shifted() if self.transfer == "shuffled" else self
        rows = zip(
            working.memory_lengths,
            self.memory_lengths,
            working.layouts_per_question,
            self.layouts_per_question,
            strict=True,
        )
        for base, last_base, earlier_layout, last_layout in rows:
            held = shared = base  # slots that are handed over, and slots that all share
            for i, agent in enumerate(agents):
                final = i == len(agents) - 1
                layout = last_layout if final else earlier_layout
                start = base if self.resolved_team.parallel and not final else held
                first = start == base  # see `is_new`
                tokens = len(self.tokenizer.encode_turn(layout.prompt(i, first)))
                if first:
                    shared = base + len(layout.preamble_ids(i))
                elif layout is not earlier_layout and layout.preamble.text:  # see `last_turn`
                    start += last_base + len(layout.preamble_ids(0)) - shared
                steps = self.steps(agent, final)
                closes = self.keep_memory if final else self.closes_turns
                for later in agents[i:]:  # its model may prefill this turn again; `end` is the same
                    end = self.with_model_of(later).require_context(
                        agent, start, tokens, steps, final or agent.writes, closes
                    )
                added = steps if self.transfer == "latents" else end - max(start, shared)
                uncut = shared if self.transfer == "last" else max(held, shared)
                held = base if self.transfer == "none" else uncut + added


def choose_team(lm: LM, team: str | Team) -> Team:
    """Return a team; a name stands for the model folder's own team, else for the built-in one.

    Raises ValueError for an unknown name, or for a team in which no agent sees the question.
    """
    if isinstance(team, Team):
        team.require_question()
        return team
    teams = TEAMS | lm.teams
    if not isinstance(team, str) or team not in teams:
        raise ParameterError(
            "team",
            f"found {team!r:.80}, expected a Team or one of {', '.join(teams)} "
            "(on the command line also FILE.json)",
        )
    return teams[team]
