"""See a thought: which tokens it stands for, and how much the last agent attends to it.

A latent thought is a vector. The LM head turns the hidden state that it was made from into
probabilities of the next token, as if the agent had generated one there (the logit lens), and its
embedding has a nearest token. A `Lens` is given to a method as `on_event`. It keeps the states and
computes once per agent, so that a run without one costs nothing. This file does not know printing.

    R rows   n thoughts   D hidden   V vocabulary   H query heads   K key-value heads   S slots
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.cache import KVCache
from .core.model import Attention, Qwen3, prefill
from .core.rotary import rotate
from .load import LM
from .results import AgentEnd, Event, Thought


class ThoughtView(NamedTuple):
    """One thought of one row."""

    tokens: list[tuple[str, float]]  # the likeliest tokens and their probabilities
    entropy: float  # of all probabilities, in nats
    norm: float  # of the embedding that is fed
    cosine_before: float | None  # to the thought before it
    nearest: str  # the token whose embedding is nearest
    cosine_nearest: float


class AgentView(NamedTuple):
    """The thoughts of one agent: a list for each question."""

    agent: str
    thoughts: list[list[ThoughtView]]


class Lens:
    """Collects the thoughts of a call; `agents` has one view per agent, in order.

    `rows` has one list of thoughts for each trace of the events `AgentEnd`, in their order.
    """

    def __init__(self, lm: LM, top: int = 3) -> None:
        """`top` is the number of tokens per thought."""
        if lm.tokenizer is None:
            raise ValueError(f"{lm.no_tokenizer}: thoughts are shown as tokens")
        self.model, self.backend, self.top = lm.model, lm.tokenizer.backend, top
        self.size = lm.tokenizer.size  # rows of the embedding that no token has are not shown
        self.agents: list[AgentView] = []
        self.rows: list[list[ThoughtView]] = []
        self._thoughts: list[Thought] = []

    def __call__(self, event: Event) -> None:
        """Keep what one event of a method tells."""
        if isinstance(event, Thought):
            self._thoughts.append(event)
        if isinstance(event, AgentEnd):
            rows = self._views() or [[] for _ in event.traces]
            self.rows += rows
            names = list(dict.fromkeys(trace.name for trace in event.traces))
            questions = len(event.traces) // len(names)
            for i, name in enumerate(names):
                self.agents.append(AgentView(name, rows[i * questions : (i + 1) * questions]))
            self._thoughts = []

    @torch.no_grad()
    def _views(self) -> list[list[ThoughtView]]:
        """Return what the thoughts since the last agent's end say, row by row."""
        if not self._thoughts:
            return []
        hidden = torch.cat([thought.hidden for thought in self._thoughts], 1)  # (R, n, D)
        fed = torch.cat([thought.embedding for thought in self._thoughts], 1)  # (R, n, D)
        table = self.model.embed(torch.arange(self.size, device=fed.device))  # (V, D)
        table = F.normalize(table, dim=-1)
        # Row by row: the scores of all of them, (R, n, V), would take gigabytes.
        return [self._view(*row, table) for row in zip(hidden, fed, strict=True)]

    def _view(self, hidden: Tensor, fed: Tensor, table: Tensor) -> list[ThoughtView]:
        logs = self.model.logits(hidden[None])[0, :, : self.size].float().log_softmax(-1)  # (n, V)
        chances, tokens = logs.exp().topk(min(self.top, self.size))
        entropy = -(logs.exp() * logs).sum(-1)  # (n,)
        unit = F.normalize(fed, dim=-1)
        before = [None, *(unit[1:] * unit[:-1]).sum(-1).tolist()]
        cosines, nearest = (unit @ table.T).max(-1)
        views = []
        for t, norm in enumerate(fed.norm(dim=-1).tolist()):
            names = [self._text(token) for token in tokens[t].tolist()]
            likely = list(zip(names, chances[t].tolist(), strict=True))
            near = self._text(int(nearest[t])), float(cosines[t])
            views.append(ThoughtView(likely, float(entropy[t]), norm, before[t], *near))
        return views

    def _text(self, token: int) -> str:
        text: str = self.backend.decode([token], skip_special_tokens=False)
        return text


def attention(model: Qwen3, ids: list[int], cache: KVCache) -> Tensor:
    """Return how much a prompt attends to every slot: (layers, K, S), S slots of cache and prompt.

    `ids` is prefilled into a copy of `cache`, which has one row. The weights are means over the
    prompt's tokens and over the query heads that share a key-value head; they sum to 1 over S.
    """
    weights: list[Tensor] = []

    def watch(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        x, positions, used, layer = args
        B, T, _ = x.shape
        q = module.q_norm(module.q_proj(x).view(B, T, -1, module.head_dim)).transpose(1, 2)
        q = rotate(q, positions.cos, positions.sin)  # (1, H, T, d)
        keys = used.keys[layer][:, :, : positions.total]  # (1, K, S, d)
        q = q.reshape(1, keys.shape[1], -1, module.head_dim)  # (1, K, H/K · T, d)
        scores = (q @ keys.transpose(-1, -2)).float() / module.head_dim**0.5  # (1, K, H/K · T, S)
        if positions.mask is not None:
            scores = scores.masked_fill(~positions.mask, -torch.inf)
        weights.append(scores.softmax(-1).mean((0, 2)))  # (K, S)

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_hook(watch) for layer in layers]
    try:
        prefill(model, [ids], cache.fork(), chunk_tokens=len(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights)
