"""Several models in one team: a model prefills the input of other models' turns again.

A KV cache belongs to one model. An agent with another model gets the explicit input of all earlier
turns instead, and its own model computes the KV cache:

    prompt          the same ids, as the models have the same tokenizer
    thoughts        rescale(h W), where h is the state that the thought was made from, and
                    W = argmin_W ‖W_out,A W − W_in,B‖² + λ‖W‖² maps from model A to model B
    rest            generated tokens, and the end of the turn in layout "chat"

If both are the same model, the map makes the same thoughts as in the turn, and the KV cache is the
one that could have been handed over (the paper's theorem, section 3.2). This file does not depend
on prompts or on the order of the agents.

    R rows   n thoughts   T tokens   D hidden
"""

from collections.abc import Sequence
from operator import add, sub
from typing import Any

import torch

from .core.cache import KVCache
from .core.errors import ParameterError
from .load import text_tokenizer
from .teams import Team
from .turns import Run, TurnResult

MAPS = ("ridge", "prenorm")  # the maps that also exist between two models


def require_models(run: Run, team: Team) -> None:
    """Raise ValueError naming the parameter if a team cannot work with the models of a call."""
    run.models = run.models or {}
    named = sorted({a.model for a in team.agents if a.model})
    if sorted(run.models) != named:
        raise ParameterError(
            "models",
            f"found {sorted(run.models)}, expected {named}, the models of the team's agents",
        )
    if named and (team.parallel or any(run.memory_lengths)):
        raise ParameterError(
            "models", "found models with parallel agents or a memory, expected neither of these"
        )
    for name, lm in run.models.items():
        if text_tokenizer(lm).backend.get_vocab() != run.tokenizer.backend.get_vocab():
            raise ParameterError(
                "models",
                f"found {name!r} with another tokenizer, expected that of {run.lm.model.name}",
            )


def receive(run: Any, turns: Sequence[TurnResult], cache: KVCache, shared: list[int]) -> KVCache:
    """Return the KV cache of the run's model after `turns`; the last turn hands over `cache`.

    This is `cache` itself if the last turn had the same model. Otherwise the run's model prefills
    all turns again, with the same cuts in between, and the run counts the slots and seconds.
    """
    if turns and turns[-1].lm is run.lm:
        return cache
    began = run.clock()
    own = run.new_cache()
    model = run.lm.model
    for turn in turns if any(cache.lengths) else ():
        _, own = run.prefill(turn.ids, own)
        if turn.thoughts:
            hidden = torch.cat([thought.hidden for thought in turn.thoughts], 1)  # (R, n, D)
            embeddings = turn.lm.aligner(run.align, run.lm)(hidden)
            counts = list(map(sub, turn.thoughts_end, turn.prompt_end))
            model(embeddings.to(model.device, model.dtype), own, counts)
        rest = [out.ids + run.closing * run.closes_turns for out in turn.outputs]
        if any(rest):
            run.prefill(rest, own)
        run.prefilled = list(map(add, run.prefilled, map(sub, own.lengths, turn.start)))
        own, _ = turn._replace(cache=own).for_next_agent(run.transfer, shared)
    run.seconds = run.clock() - began
    return own  # type: ignore[no-any-return]
