"""Teams of agents, all played by one model, and the three ways they can work: single, text_mas, latent_mas.

All three are one loop over agents: read the prompt behind the memory, think, write if it is one's turn to, close the
turn, hand over. They differ in what is handed over: nothing, text, or the memory (LatentMAS, arXiv 2511.20639,
section 3). Does not know: attention, cache layout, how a thought is made, printing.

    B questions   D hidden
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import prompts
from .cache import KVCache
from .generate import Sampling, Written
from .latent import think
from .load import LM
from .results import AgentTrace, Result, Watcher
from .teams import Agent, Team
from .tokenizer import Turn
from .turns import Run, Shared, require_context, stages

TRANSFERS = ("full", "latents", "last", "none", "shuffled")


def single(
    lm: LM, questions: Sequence[str], kind: str = "math", choices: Any = None, sampling: Sampling | None = None,
    seed: int = 0, watcher: Watcher | None = None,
) -> list[Result]:
    """One agent answers each question alone: the baseline. Parameters and errors as in `latent_mas`."""
    return brief_text(lm, questions, None, kind, choices, sampling, seed, watcher).answer()


def text_mas(
    lm: LM, questions: Sequence[str], team: str | Team = "sequential", kind: str = "math", choices: Any = None,
    sampling: Sampling | None = None, seed: int = 0, watcher: Watcher | None = None,
) -> list[Result]:
    """The same agents pass text: each writes, and the next one reads it, where its prompt has `{context}`. A prompt
    without one is put behind the earlier turns, as in a conversation. Parameters and errors as in `latent_mas`; that
    a text is too long for the context is only known once it is written.
    """
    return brief_text(lm, questions, team, kind, choices, sampling, seed, watcher).answer()


def latent_mas(
    lm: LM, questions: Sequence[str], team: str | Team = "sequential", latent_steps: int | None = None,
    align: str | Callable[[Tensor], Tensor] = "ridge", kind: str = "math", choices: Any = None,
    sampling: Sampling | None = None, transfer: str = "full", seed: int = 0, watcher: Watcher | None = None,
    close: bool = True,
) -> list[Result]:
    """Answer each question by agents that think in latent space and hand their memory over; only the last one writes.

    `latent_steps` None: each agent's own, else the folder's, else 40; `align` a kind of map (see `latent`, `feeders`)
    or any callable from hidden states to embeddings; `kind` ("math", "choice", "code", "free") and `choices` (a dict
    letter -> text, or one each) pick the form and extraction of the answer; `sampling` None: the model's. `transfer` is
    what the next agent sees: "full" (inputs and thoughts, the paper), "latents" (thoughts only), "last" (the previous
    agent's only), and the control arms "none" and "shuffled" (question i gets the memory of question i + 1, the last
    the first's). `close` False leaves the turns of agents who hand over open, as the authors' code does.
    Raises ValueError naming the flag, question or file, what was found and what was expected, before any work starts.
    """
    return brief(
        lm, questions, team, latent_steps, align, kind, choices, sampling, transfer, seed, watcher, close
    ).answer()


def brief(
    lm: LM, questions: Sequence[str], team: str | Team = "sequential", latent_steps: int | None = None,
    align: str | Callable[[Tensor], Tensor] = "ridge", kind: str = "math", choices: Any = None,
    sampling: Sampling | None = None, transfer: str = "full", seed: int = 0, watcher: Watcher | None = None,
    close: bool = True, handed: "Briefing | None" = None, shared: Shared | None = None,
) -> "Briefing":
    """`latent_mas` up to the last agent's turn: all others have worked. Parameters and errors as there.

    With `handed`, another call's outcome, nobody works: the last agent gets that memory, a row a question. `shared`
    keeps what agents read into empty memory, so that calls with the same questions and another map or number of
    thoughts need not read it again; nobody can tell the difference but by the clock.
    """
    run = Run(lm, questions, kind, choices, sampling or lm.sampling, seed, watcher or Watcher(), shared)
    if transfer not in TRANSFERS:
        raise ValueError(f"transfer (--transfer): found {transfer!r}, expected one of {', '.join(TRANSFERS)}")
    if transfer == "shuffled" and len(run.questions) == 1:
        raise ValueError("transfer (--transfer): found 'shuffled' with one question, expected two or more to swap")
    if latent_steps is not None and (not isinstance(latent_steps, int) or latent_steps < 0):
        raise ValueError(f"latent_steps (--latent-steps): found {latent_steps!r}, expected a whole number, 0 or more")

    team, default, B = run.team(team), lm.default_steps, len(run.questions)

    def steps(agent: Agent, final: bool) -> int:
        if final and agent.latent_steps is None:
            return 0  # the last agent answers: it thinks only if it says so itself
        return next(number for number in (latent_steps, agent.latent_steps, default) if number is not None)

    # Another question's memory is the memory of agents who were asked another question.
    thinking = run.rolled() if transfer == "shuffled" else run
    if handed is None:
        require_context(run, thinking, team, steps, transfer)
    align, last = align if callable(align) else lm.aligner(align), team.agents[-1]
    if handed is not None:
        return Briefing(run, last, run.turns(last), handed.memory, steps(last, True), align, handed.acts)
    acts = []
    parts: list[KVCache] = []  # the memories that the next agent gets, to be joined
    for agents, alone, final in stages(team, alike=lambda agent: (steps(agent, False), agent.writes)):
        if final:
            break
        turns = [turn for agent in agents for turn in thinking.turns(agent)]
        memory = lm.model.new_cache(len(turns)) if alone else joined(parts, lm, B)
        acted = thinking.act(agents, turns, memory, steps(agents[0], False), align, agents[0].writes, closes=close)
        acts.append((acted.traces, acted.written))
        handed_on = acted.hand_over(transfer)
        rows = [range(i * B, (i + 1) * B) for i in range(len(agents))]
        parts = [*parts, *map(handed_on.select, rows)] if alone else [handed_on]
        parts = parts[-1:] if transfer == "last" else parts
    return Briefing(run, last, run.turns(last), joined(parts, lm, B), steps(last, True), align, acts)


def joined(parts: Sequence[KVCache], lm: LM, rows: int) -> KVCache:
    if not parts:
        return lm.model.new_cache(rows)
    return KVCache.concat(parts) if len(parts) > 1 else parts[0]


def brief_text(
    lm: LM, questions: Sequence[str], team: str | Team | None = "sequential", kind: str = "math", choices: Any = None,
    sampling: Sampling | None = None, seed: int = 0, watcher: Watcher | None = None, shared: Shared | None = None,
) -> "Briefing":
    """`text_mas` (`team` None: `single`) up to the last agent's turn: every agent writes, from empty memory, and the
    next one reads it.
    """
    run = Run(lm, questions, kind, choices, sampling or lm.sampling, seed, watcher or Watcher(), shared)
    alone_team = lm.teams.get("single") or Team((Agent("single", prompts.SINGLE),))
    B, acts = len(run.questions), []
    work, talk = [""] * B, [Turn("")] * B  # for prompts with {context}, and for those without
    for agents, alone, final in stages(run.team(team) if team else alone_team, alike=lambda agent: None):
        turns = []
        for agent in agents:
            for q in range(B):
                turn = run.turn(agent, q, prompts.CONTEXT.format(work=work[q]) if work[q] and not alone else "")
                turns.append(turn if alone or "{context}" in agent.prompt else talk[q] + turn)
        if final:
            break
        acted = run.act(agents, turns, lm.model.new_cache(len(turns)))
        acts.append((acted.traces, acted.written))
        for row, out in enumerate(acted.written):
            agent, q = agents[row // B], row % B
            work[q] += prompts.WORK.format(name=agent.name, text=out.text.strip())
            talk[q] = talk[q] + run.turn(agent, q) + run.tokenizer.written(out.text)
    return Briefing(run, agents[0], turns, lm.model.new_cache(B), 0, None, acts)


class Briefing(NamedTuple):
    """The moment before the last agent's turn: the memory it gets, a row a question, and how that came about.

    The memory is the last agent's own from then on: use `answer` or `read` once, or `fork` the memory before.
    """

    run: Run
    agent: Agent
    turns: list[Turn]  # the last agent's on each question, up to the open assistant turn
    memory: KVCache
    steps: int
    align: Callable[[Tensor], Tensor] | None
    acts: list[tuple[list[AgentTrace], list[Written]]]  # of each turn before

    def answer(self) -> list[Result]:
        """Let the last agent read its turn, think if it says so itself, and write."""
        acted = self.run.act([self.agent], self.turns, self.memory, self.steps, self.align, final=True)
        return self.run.results([*self.acts, (acted.traces, acted.written)])

    def read(self) -> tuple[Tensor, KVCache]:
        """The same but for the writing: each row's last state (B, 1, D) and the memory behind it."""
        ids = self.run.encoded([self.agent], self.turns, self.memory, self.steps, writes=False, closes=False)
        hidden, memory = self.run.read(ids, self.memory)
        if self.align is not None:
            _, hidden = think(self.run.lm.model, self.run.drawing(self.align, 1), hidden, memory, self.steps)
        return hidden, memory
