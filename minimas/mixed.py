"""Several models in one team: a model prefills again what other models have been fed.

A KV cache belongs to one model. An agent of another model gets the explicit input of the turns
before its own instead, and fills the slots itself:

    prompt          the same ids, as the models have the same tokenizer
    thoughts        rescale(h W), where h is the state that the thought was made from, and
                    W = argmin_W ‖W_out,A W − W_in,B‖² + λ‖W‖² leads from model A to model B
    rest            generated tokens, and the end of a chat turn

If both are the same model, the map makes the same thoughts as in the turn, and the KV cache becomes
the one that could have been handed over (the paper's theorem, section 3.2). Does not know: prompts,
or which agent comes next.

    R rows   n thoughts   T tokens   D hidden
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .core.cache import KVCache
from .core.errors import ParameterError
from .load import text_tokenizer
from .teams import Team
from .turns import Run, TurnResult

MAPS = ("ridge", "prenorm")  # there is one between two models too


def require_models(run: Run, team: Team) -> None:
    """Raise ValueError naming the parameter if a team cannot work with the models of a call."""
    run.models, named = run.models or {}, sorted({a.model for a in team.agents if a.model})
    if sorted(run.models) != named:
        problem = f"found {sorted(run.models)}, expected {named}, the models of the team's agents"
        raise ParameterError("models", problem)
    if named and (team.parallel or any(run.memory_lengths)):
        problem = "found some with parallel agents or a memory, expected neither"
        raise ParameterError("models", problem)
    for name, lm in run.models.items():
        if text_tokenizer(lm).backend.get_vocab() != run.tokenizer.backend.get_vocab():
            problem = f"found {name!r} with another tokenizer, expected that of {run.lm.model.name}"
            raise ParameterError("models", problem)


def receive(run: Any, turns: Sequence[TurnResult], cache: KVCache, head: list[int]) -> KVCache:
    """Return what the run's model continues from after `turns`, of which `cache` is handed over.

    It is `cache` itself after a turn of the same model. Otherwise the model prefills all turns
    again, with the same cuts in between, and the run counts their tokens and seconds.
    """
    if not turns or turns[-1].lm is run.lm:
        return cache
    began, model = run.clock(), run.lm.model
    own: KVCache = run.new_cache()
    for turn in turns if any(cache.lengths) else ():
        run.prefill(turn.ids, own)
        if turn.thoughts:
            states = torch.cat([thought.hidden for thought in turn.thoughts], 1)  # (R, n, D)
            embeddings = turn.lm.aligner(run.align, run.lm)(states)
            model(embeddings.to(model.device, model.dtype), own, turn.steps)
        rest = pad_sequence([torch.tensor(ids) for ids in turn.rest], batch_first=True)  # (R, T)
        model(model.embed(rest.to(model.device)), own, list(map(len, turn.rest)))
        run.read = [
            n + end - at for n, end, at in zip(run.read, own.lengths, turn.start, strict=True)
        ]
        own, _ = turn._replace(cache=own).hand_over(run.transfer, head)
    run.seconds = run.clock() - began
    return own
