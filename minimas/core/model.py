"""Qwen3 as a pure function of embeddings and a memory: embed, forward, logits.

The trunk takes embeddings and returns hidden states, so that tokens, latent thoughts and mixtures of both are one path
(paper, section 3.1), and the cache is an argument, so that any number of memories can be alive at once. Parameter
names are Hugging Face's. Two switches turn the block into Qwen2's (bias on q, k, v, no QK-norm) or Llama's (neither).

    B rows   T new positions   S cached + new   D hidden   H query heads   K key-value heads   d head size   V tokens

Sources: arXiv 2505.09388 (Qwen3), 1910.07467 (RMSNorm), 2305.13245 (grouped queries), 2002.05202 (SwiGLU), 2104.09864
(RoPE). Does not know: tokenizers, sampling, alignment, agents, files.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .config import Config
from .rotary import angles, rotate

CHUNK = 512  # positions of one forward pass: bounds the (T, S) mask of a long prompt


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), computed in at least float32, cast back, then scaled: Hugging Face's order."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class Places(NamedTuple):
    """Where the T new positions stand: their rotation, (B or 1, 1, T, d), and which of the S slots each may see."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None  # (B or 1, 1, H/K · T, S), True is visible; None: all of them


class Attention(nn.Module):
    """Grouped-query attention of T new positions on S slots: `project`, then the memory appends, then `attend`."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        bias, normed = c.model_type == "qwen2", c.model_type == "qwen3"
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if normed else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, K, T, d) of new positions; H and K are those of the weights."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(
            1, 2
        )  # (B, H, T, d)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(
            1, 2
        )  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What the queries find in all keys and values (B, K, S, d): (B, T, D)."""
        B, H, T, d = q.shape
        # The query heads of one key-value head become its rows, so no key or value is ever copied.
        q = q.reshape(B, k.shape[1], -1, d)  # (B, K, H/K · T, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, K, H/K · T, d)
        out = out.reshape(B, H, T, d).transpose(1, 2).reshape(B, T, -1)  # (B, T, H · d)
        return self.o_proj(out)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)), SwiGLU."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention, then MLP, each behind a norm and around a residual. Pure but for the memory in between."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, at: Places, cache: KVCache, layer: int) -> Tensor:
        q, k, v = self.before(x, at.cos, at.sin)
        k, v = cache.append(layer, k, v)  # (B, K, S, d)
        return self.behind(x, q, k, v, at.mask)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def behind(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn.attend(q, k, v, mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Trunk(nn.Module):
    """The parameters that Hugging Face keeps under `model.`."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        # Not nn.Embedding(V, D): its normal_() on the meta device, where `load` builds, takes a second of imports.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(c.vocab_size, c.hidden_size).uniform_(-1, 1)
        )
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Qwen3(nn.Module):
    """A decoder-only transformer whose input is embeddings and whose output is hidden states.

    Made for inference: parameters are random until loaded, and ask for no gradients until `requires_grad_(True)`.
    """

    def __init__(self, config: Config, name: str = "unnamed model") -> None:
        super().__init__()
        self.config, self.name, tied = config, name, config.tie_word_embeddings
        self.step: Any = None  # (inputs_embeds, cache) -> hidden of one position, where speed.py has a faster way
        self.linear: Any = F.linear  # of the tied LM head, where packed.py has none that is faster
        self.model = Trunk(config)
        # Tied: the embedding, unless a quantized copy of it takes the place.
        self.lm_head: Any = (
            None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings: (B, T) int64 -> (B, T, D)."""
        return self.model.embed_tokens(input_ids)  # type: ignore[no-any-return]

    def forward(
        self, inputs_embeds: Tensor, cache: KVCache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D) -> (B, T, D), of new positions that see the memory `cache`.

        Appends them to `cache` (None: to one that is thrown away). `lengths` (B,) counts each row's valid positions in
        a right-padded chunk (None: all T); behind them nothing is remembered, and states mean nothing.
        """
        B, T, _ = inputs_embeds.shape
        cache = self.new_cache(B) if cache is None else cache
        cache.sign(self)
        if T == 1 and self.step is not None and not inputs_embeds.requires_grad:
            hidden: Tensor = self.step(inputs_embeds, cache)
        else:
            hidden = self.layers(inputs_embeds, self.places_of(cache, B, T), cache)
        cache.advance(torch.full((B,), T) if lengths is None else lengths, most=T)
        return hidden

    def layers(
        self, x: Tensor, at: Places, memory: Any
    ) -> Tensor:  # `memory` is whatever has an `append`
        for layer, block in enumerate(self.model.layers):
            x = block(x, at, memory, layer)
        return self.model.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: (B, T, D) -> (B, T, V)."""
        head = self.lm_head
        return self.linear(hidden, self.model.embed_tokens.weight) if head is None else head(hidden)  # type: ignore[no-any-return]

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty memory of this model's shape, dtype and device."""
        return KVCache(self.config, batch_size, self.dtype, self.device)

    def places_of(self, cache: KVCache, B: int, T: int) -> Places:
        positions = cache.next_positions(B, T)  # (B, T), or (1, T) for rows of equal length
        return self.places(positions, 0 if positions.numel() == 1 else int(cache.lengths.max()) + T)

    def places(self, positions: Tensor, slots: int) -> Places:
        """Positions (B or 1, T) among `slots` slots, of which each sees those up to its own; 0: all there are."""
        c, mask = self.config, None
        if slots:  # not is_causal: that flag aligns the triangle to the top left, which is wrong as soon as S ≠ T
            mask = (
                torch.arange(slots, device=positions.device) <= positions[:, None, :, None]
            )  # (B or 1, 1, T, S)
            mask = mask.repeat(
                1, 1, c.num_attention_heads // c.num_key_value_heads, 1
            )  # (B or 1, 1, H/K · T, S)
        return Places(*angles(positions, c.head_dim, c.rope_theta, self.dtype), mask)

    def fingerprint(self) -> str:
        """16 hex digits that tell checkpoints apart, of a sample of every weight as bf16 (float16 rounds otherwise)."""
        c = self.config
        digest = hashlib.sha256(
            f"{c.model_type} {c.num_attention_heads} {c.rope_theta} {c.rms_norm_eps}".encode()
        )
        for module_name, module in self.named_modules():
            for name, weight in (
                sorted(module.state_dict().items()) if not any(module.children()) else ()
            ):
                sample = (
                    weight.flatten()[:: max(1, weight.numel() // 1024)]
                    .to("cpu", torch.bfloat16)
                    .contiguous()
                )
                digest.update(f"{module_name}.{name}{tuple(weight.shape)}".encode())
                digest.update(bytes(sample.view(torch.uint8).tolist()))
        return digest.hexdigest()[:16]


def finite(x: Tensor, name: str) -> Tensor:
    """`x` itself; raises ValueError naming the model when it holds NaN or infinity, as damaged weights make it."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"{name}: found a state that is not finite: damaged weights, or --dtype float32 is needed"
        )
    return x


def take_last(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The state of each row's last valid position, (B, T, D), lengths (B,) -> (B, 1, D); `hidden[:, -1:]` would
    be a pad's state in a ragged batch (LatentMAS #26). Raises ValueError for lengths out of range.
    """
    if int(lengths.min()) < 1 or int(lengths.max()) > hidden.shape[1]:
        raise ValueError(
            f"lengths: found {lengths.tolist()}, expected 1 … {hidden.shape[1]} in every row"
        )
    index = (lengths.to(hidden.device) - 1)[:, None, None]  # (B, 1, 1)
    return hidden.gather(1, index.expand(-1, 1, hidden.shape[2]))  # (B, 1, D)


def prefill(
    model: Qwen3, ids: Sequence[Sequence[int]], cache: KVCache, chunk: int = CHUNK
) -> Tensor:
    """Read one list of ids per row into the memory; returns each row's last hidden state, (B, 1, D), or raises
    ValueError for a row without ids or a state that is not finite.
    """
    lengths = torch.tensor([len(row) for row in ids])
    if int(lengths.min()) < 1:
        raise ValueError("ids: found a row without tokens, expected at least one in every row")
    width = int(lengths.max())
    padded = torch.tensor(
        [[*row, *[0] * (width - len(row))] for row in ids], device=model.device
    )  # (B, T)
    last = torch.zeros(
        len(ids), 1, model.config.hidden_size, dtype=model.dtype, device=model.device
    )
    for start in range(0, width, chunk):
        part = padded[:, start : start + chunk]
        here = (lengths - start).clamp(0, part.shape[1])
        hidden = model(model.embed(part), cache, here)
        new = take_last(hidden, here.clamp(min=1))
        last = torch.where((here > 0).to(model.device)[:, None, None], new, last)
    return finite(last, model.name)
