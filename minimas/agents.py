"""Teams of agents, all played by one model, and the three ways they can work: single, text_mas, latent_mas.

All three are one loop over agents: read the prompt behind the memory, think, write if it is one's turn to, close the
turn, hand over. They differ in what is handed over: nothing, text, or the memory (LatentMAS, arXiv 2511.20639,
section 3). Does not know: attention, cache layout, how a thought is made, printing.

    B questions   D hidden
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import prompts
from .core.cache import KVCache
from .core.latent import think
from .core.model import prefill
from .layout import ChatLayout
from .load import LM
from .results import AgentTrace, Result, Watcher
from .teams import Agent, Team, single_agent
from .text.generate import GeneratedText, Sampling
from .text.tokenizer import Turn
from .turns import Run, Shared, choose_team, require_context, stages

TRANSFERS = ("full", "latents", "last", "none", "shuffled")


def single(
    lm: LM,
    questions: Sequence[str],
    kind: str = "math",
    choices: Any = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> list[Result]:
    """One agent answers each question alone: the baseline. Parameters and errors as in `latent_mas`."""
    return brief_text(lm, questions, None, kind, choices, sampling, seed, watcher).answer()


def text_mas(
    lm: LM,
    questions: Sequence[str],
    team: str | Team = "sequential",
    kind: str = "math",
    choices: Any = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> list[Result]:
    """The same agents pass text: each writes, and the next one reads it, where its prompt has `{context}`. A prompt
    without one is put behind the earlier turns, as in a conversation. Parameters and errors as in `latent_mas`; that
    a text is too long for the context is only known once it is written.
    """
    return brief_text(lm, questions, team, kind, choices, sampling, seed, watcher).answer()


def latent_mas(
    lm: LM,
    questions: Sequence[str],
    team: str | Team = "sequential",
    latent_steps: int | None = None,
    align: str | Callable[[Tensor], Tensor] = "ridge",
    kind: str = "math",
    choices: Any = None,
    sampling: Sampling | None = None,
    transfer: str = "full",
    seed: int = 0,
    watcher: Watcher | None = None,
    close: bool = True,
    layout: str | None = None,
) -> list[Result]:
    """Answer each question by agents that think in latent space and hand their memory over; only the last one writes.

    `latent_steps` None: each agent's own, else the folder's, else 40. `align` is a kind of map (see
    `latent`), the FILE.safetensors of one, or any callable from hidden states to embeddings.
    `kind` ("math", "choice", "code", "free") and `choices` (a dict letter -> text, or one each)
    pick the form and extraction of the answer; `sampling` None: the model's. `transfer` is
    what the next agent sees: "full" (inputs and thoughts, the paper), "latents" (thoughts only), "last" (the previous
    agent's only), and the control arms "none" and "shuffled" (question i gets the memory of question i + 1, the last
    the first's). `layout` is "turn" or "chat", see `Team` (None: the team's own). `close` False leaves the chat turns
    of agents who hand over open, as the authors' code does.
    Raises ValueError naming the flag, question or file, what was found and what was expected, before any work starts.
    """
    return brief(
        lm,
        questions,
        team,
        latent_steps,
        align,
        kind,
        choices,
        sampling,
        transfer,
        seed,
        watcher,
        close,
        layout,
    ).answer()


def brief(
    lm: LM,
    questions: Sequence[str],
    team: str | Team = "sequential",
    latent_steps: int | None = None,
    align: str | Callable[[Tensor], Tensor] = "ridge",
    kind: str = "math",
    choices: Any = None,
    sampling: Sampling | None = None,
    transfer: str = "full",
    seed: int = 0,
    watcher: Watcher | None = None,
    close: bool = True,
    layout: str | None = None,
    handed: "Briefing | None" = None,
    shared: Shared | None = None,
) -> "Briefing":
    """`latent_mas` up to the last agent's turn: all others have worked. Parameters and errors as there.

    With `handed`, another call's outcome, nobody works: the last agent gets that memory, a row a question. `shared`
    keeps what agents read into empty memory, so that calls with the same questions and another map or number of
    thoughts need not read it again; nobody can tell the difference but by the clock.
    """
    run = Run(
        lm, questions, kind, choices, sampling or lm.sampling, seed, watcher or Watcher(), shared
    )
    if transfer not in TRANSFERS:
        raise ValueError(
            f"transfer (--transfer): found {transfer!r}, expected one of {', '.join(TRANSFERS)}"
        )
    if transfer == "shuffled" and len(run.questions) == 1:
        raise ValueError(
            "transfer (--transfer): found 'shuffled' with one question, expected two or more to swap"
        )
    if latent_steps is not None and (not isinstance(latent_steps, int) or latent_steps < 0):
        raise ValueError(
            f"latent_steps (--latent-steps): found {latent_steps!r}, expected a whole number, 0 or more"
        )

    team, default = choose_team(lm, team).with_layout(layout), lm.default_steps
    if not close and team.layout == "turn":
        raise ValueError(
            "close (--close): found no with layout 'turn', expected yes: no turn is closed there"
        )

    def steps(agent: Agent, final: bool) -> int:
        if final and agent.latent_steps is None:
            return 0  # the last agent answers: it thinks only if it says so itself
        return next(
            number for number in (latent_steps, agent.latent_steps, default) if number is not None
        )

    # Another question's memory is the memory of agents who were asked another question.
    thinking = run.rolled() if transfer == "shuffled" else run
    if handed is None:
        require_context(run, thinking, team, steps, transfer)
    align, last = align if callable(align) else lm.aligner(align), team.agents[-1]
    layouts = run.layouts(team)
    if handed is not None:
        memory, head, acts = handed.memory, handed.head, handed.acts
    else:
        memory, head, acts = hand_over_all(run, thinking, team, steps, align, transfer, close)
    first = not any(memory.lengths)
    foreign = handed is not None or thinking is not run
    if foreign and not first and team.layout == "turn" and team.opening:
        memory, head = swap_heads(run, layouts, memory, head)
    turns = [layout.prompt(-1, first) for layout in layouts]
    return Briefing(run, last, turns, memory, steps(last, True), align, acts, head)


def hand_over_all(
    run: Run,
    thinking: Run,
    team: Team,
    steps: Callable[[Agent, bool], int],
    align: Callable[[Tensor], Tensor],
    transfer: str,
    close: bool,
) -> tuple[KVCache, Tensor, list[tuple[list[AgentTrace], list[GeneratedText]]]]:
    """Let every agent but the last work. Returns the KV cache for the last one, how many slots of each row are the
    layout's head, and what each turn came to.
    """
    new_cache, B, layouts = run.lm.model.new_cache, len(run.questions), thinking.layouts(team)
    memory, head, acts = new_cache(B), torch.zeros(B, dtype=torch.int64), []
    parts: list[tuple[KVCache, Tensor]] = []  # what parallel agents hand over, and its head
    for numbers, alone, final in stages(
        team, alike=lambda agent: (steps(agent, False), agent.writes)
    ):
        if final:
            break
        agents = [team.agents[i] for i in numbers]
        cache = new_cache(B * len(agents)) if alone else memory
        first = not any(cache.lengths)
        turns = [layout.prompt(i, first) for i in numbers for layout in layouts]
        if first:
            head = torch.tensor([layout.head_tokens(i) for i in numbers for layout in layouts])
        closes = close and layouts[0].closes_turns
        acted = thinking.act(
            agents,
            turns,
            cache,
            steps(agents[0], False),
            align,
            agents[0].writes,
            closes=closes,
            head=head,
        )
        acts.append((acted.traces, acted.written))
        memory = acted.hand_over(transfer)
        head = torch.minimum(
            head, torch.as_tensor(memory.lengths)
        )  # "none" drops it too: the next agent begins a turn of its own
        if alone:
            rows = [range(i * B, (i + 1) * B) for i in range(len(agents))]
            parts += [(memory.select(mine), head[mine]) for mine in rows]
    if parts:
        memory, head = join(parts[-1:] if transfer == "last" else parts)
    return memory, head, acts


def join(parts: Sequence[tuple[KVCache, Tensor]]) -> tuple[KVCache, Tensor]:
    """Join what parallel agents hand over, (cache, slots of its head) each; the common head is kept once."""
    memory, head = parts[0]
    rest = [
        cache.keep_last(torch.as_tensor(cache.lengths) - its_head) for cache, its_head in parts[1:]
    ]
    return KVCache.concat([memory, *rest]) if rest else memory, head


def swap_heads(
    run: Run, layouts: Sequence[ChatLayout], memory: KVCache, head: Tensor
) -> tuple[KVCache, Tensor]:
    """Put each question's own head before what was handed over with another question's."""
    ids = [run.tokenizer.encode_turn(layout.head) for layout in layouts]
    own = run.lm.model.new_cache(len(ids))
    prefill(run.lm.model, ids, own)
    kept = memory.keep_last(torch.as_tensor(memory.lengths) - head)
    return KVCache.concat([own, kept]), torch.as_tensor(own.lengths)


def brief_text(
    lm: LM,
    questions: Sequence[str],
    team: str | Team | None = "sequential",
    kind: str = "math",
    choices: Any = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    watcher: Watcher | None = None,
    shared: Shared | None = None,
) -> "Briefing":
    """`text_mas` (`team` None: `single`) up to the last agent's turn: every agent writes, from empty memory, and the
    next one reads it.
    """
    run = Run(
        lm, questions, kind, choices, sampling or lm.sampling, seed, watcher or Watcher(), shared
    )
    chosen = choose_team(lm, team) if team else lm.teams.get("single") or single_agent()
    B, acts = len(run.questions), []
    work, talk = [""] * B, [Turn("")] * B  # for prompts with {context}, and for those without

    def turn(agent: Agent, q: int, context: str = "") -> Turn:
        filled = run.fill(agent.prompt, q, context)
        return ChatLayout(
            run.tokenizer, Team((agent,)), run.fill(chosen.opening, q), [filled]
        ).prompt(0, first=True)

    for numbers, alone, final in stages(chosen, alike=lambda agent: None):
        agents, turns = [chosen.agents[i] for i in numbers], []
        for agent in agents:
            for q in range(B):
                asked = turn(
                    agent, q, prompts.CONTEXT.format(work=work[q]) if work[q] and not alone else ""
                )
                turns.append(asked if alone or "{context}" in agent.prompt else talk[q] + asked)
        if final:
            break
        acted = run.act(agents, turns, lm.model.new_cache(len(turns)))
        acts.append((acted.traces, acted.written))
        for row, out in enumerate(acted.written):
            agent, q = agents[row // B], row % B
            work[q] += prompts.WORK.format(name=agent.name, text=out.text.strip())
            talk[q] = talk[q] + turn(agent, q) + run.tokenizer.written(out.text)
    return Briefing(
        run,
        agents[0],
        turns,
        lm.model.new_cache(B),
        0,
        None,
        acts,
        torch.zeros(B, dtype=torch.int64),
    )


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
    acts: list[tuple[list[AgentTrace], list[GeneratedText]]]  # of each turn before
    head: Tensor  # (B,) slots of the memory that are the layout's head

    def answer(self) -> list[Result]:
        """Let the last agent read its turn, think if it says so itself, and write."""
        acted = self.run.act(
            [self.agent], self.turns, self.memory, self.steps, self.align, final=True
        )
        return self.run.results([*self.acts, (acted.traces, acted.written)])

    def prefill(self) -> tuple[Tensor, KVCache]:
        """The same but for the writing: each row's last state (B, 1, D) and the memory behind it."""
        ids = self.run.encoded(
            [self.agent], self.turns, self.memory, self.steps, writes=False, closes=False
        )
        hidden, memory = self.run.prefill(ids, self.memory)
        if self.align is not None:
            _, hidden = think(
                self.run.lm.model, self.run.drawing(self.align, 1), hidden, memory, self.steps
            )
        return hidden, memory
