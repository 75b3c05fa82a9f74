"""Qwen3 from embeddings to hidden states; all of its state is in the KV cache that is passed in.

The model takes embeddings and returns hidden states, so tokens, latent thoughts and mixtures of
both go through the same code (paper, section 3.1). The cache is an argument, so any number of
caches can be in use at once. Parameter names are Hugging Face's. Qwen2 has the same block with a
bias on q, k and v and without QK-norm, and Llama has it with neither.

    B rows   T new positions   S cached + new   D hidden
    H query heads   K key-value heads   d head size   V vocabulary

Sources: arXiv 2505.09388 (Qwen3), 1910.07467 (RMSNorm), 2305.13245 (grouped queries), 2002.05202
(SwiGLU), 2104.09864 (RoPE). This file does not depend on tokenizers, sampling, alignment, agents or
files.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .cache import KVCache, Positions
from .config import Config
from .rotary import rotate


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) in at least float32, cast back, then scaled, as in Hugging Face."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, self.normalized_shape, eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention from T new positions to the S slots of a KV cache."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        D = c.hidden_size
        d = c.head_dim
        q_size = c.num_attention_heads * d
        kv_size = c.num_key_value_heads * d
        bias = c.model_type == "qwen2"
        norm = RMSNorm if c.model_type == "qwen3" else nn.Identity
        self.head_dim = d
        self.q_proj = nn.Linear(D, q_size, bias)
        self.k_proj = nn.Linear(D, kv_size, bias)
        self.v_proj = nn.Linear(D, kv_size, bias)
        self.o_proj = nn.Linear(q_size, D, bias=False)
        self.q_norm = norm(d, c.rms_norm_eps)
        self.k_norm = norm(d, c.rms_norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: KVCache, layer: int) -> Tensor:
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)  # -1: H or K heads, fewer in a shard of a layer
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)  # (B, H, T, d)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, d)
        q = rotate(q, positions.cos, positions.sin)
        k = rotate(k, positions.cos, positions.sin)
        k, v = cache.append(layer, k, v, positions)  # (B, K, S, d)
        # Query heads that share a key-value head are stacked along T, so no key or value is copied.
        q = q.reshape(B, k.shape[1], -1, self.head_dim)  # (B, K, H/K · T, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=positions.mask)
        x = x.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1)  # (B, T, H · d)
        return self.o_proj(x)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)), SwiGLU."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention, then MLP, each with a norm before it and a residual around it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, positions: Positions, cache: KVCache, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Qwen3(nn.Module):
    """A decoder-only transformer from embeddings to hidden states: Qwen3, Qwen2.5 or Llama.

    Made for inference: parameters are random until they are loaded, and have no gradients until
    `requires_grad_(True)`.
    """

    def __init__(self, config: Config, name: str = "unnamed model") -> None:
        super().__init__()
        self.config = config
        self.name = name
        # None, or a faster forward pass of one position, (inputs_embeds, cache) -> hidden, that
        # `fast` has put here. It has no backward pass.
        self.step: Callable[[Tensor, KVCache], Tensor] | None = None
        # Not nn.Embedding(V, D): on the meta device, its normal_() spends a second on imports.
        embedding = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)  # (V, D)
        self.model: Any = nn.ModuleDict(
            {  # Hugging Face's names
                "embed_tokens": nn.Embedding.from_pretrained(embedding),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        # None: tied to the embedding. `fast` may put a faster product with the embedding here.
        self.lm_head: Any = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device  # type: ignore[no-any-return]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return token embeddings: (B, T) int64 -> (B, T, D)."""
        return self.model.embed_tokens(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: KVCache | None = None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Return hidden states after the final norm, (B, T, D) -> (B, T, D).

        New positions see the slots of `cache` (None: an empty one) and are appended to it.
        `lengths` counts the valid positions of each row in a right-padded input (None: all T).
        Padding is not kept in the cache, and its hidden states are meaningless. Raises ValueError
        if the cache belongs to another model or has another number of rows.
        """
        B, T, _ = inputs_embeds.shape
        cache = cache or self.new_cache(B)
        cache.set_owner(self)
        if T == 1 and self.step and not inputs_embeds.requires_grad:
            x = self.step(inputs_embeds, cache)
        else:
            x = inputs_embeds
            positions = cache.next_positions(B, T)
            for layer, block in enumerate(self.model.layers):
                x = block(x, positions, cache, layer)
            x = self.model.norm(x)
        cache.advance(T if lengths is None else lengths, most=T)
        return x

    if TYPE_CHECKING:  # the call of nn.Module takes anything
        __call__ = forward

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next token: (B, T, D) -> (B, T, V)."""
        if self.lm_head is None:
            return F.linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def new_cache(self, batch_size: int) -> KVCache:
        """Return an empty cache of this model's shape, dtype and device."""
        return KVCache(self.config, batch_size, self.dtype, self.device)

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify a checkpoint, from a sample of every weight in bf16.

        They do not depend on the model's dtype, except that float16 rounds differently.
        """
        c = self.config
        digest = hashlib.sha256(
            f"{c.model_type} {c.num_attention_heads} {c.rope_theta} {c.rms_norm_eps}".encode()
        )
        for module_name, module in self.named_modules():
            if any(module.children()):
                continue  # one layer at a time, because `state_dict` unpacks a packed weight
            for name, weight in sorted(module.state_dict().items()):
                sample = weight.flatten()[:: max(1, weight.numel() // 1024)]
                sample = sample.to("cpu", torch.bfloat16).contiguous()
                digest.update(f"{module_name}.{name}{tuple(weight.shape)}".encode())
                digest.update(bytes(sample.view(torch.uint8).tolist()))
        return digest.hexdigest()[:16]


def finite(
    x: Tensor, name: str, cause: str = "damaged weights or map, or --dtype float32 is needed"
) -> Tensor:
    """Return `x`. Raises ValueError with `name` and `cause` if it holds NaN or infinity.

    On a GPU nothing is checked, because reading a value there waits for all kernels. Check the
    logits there when the tokens are read, as `decode` in `text.generate` does.
    """
    if x.is_cpu and not x.isfinite().all():
        raise ValueError(f"{name}: found a state that is not finite: {cause}")
    return x


def take_last(hidden: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
    """Return the state of each row's last valid position: (B, T, D), B lengths -> (B, 1, D).

    In a ragged batch `hidden[:, -1:]` would be the state of padding (issue 26 of the authors'
    code). Raises ValueError for lengths out of range.
    """
    counts = list(map(int, lengths))
    T = hidden.shape[1]
    if min(counts) < 1 or max(counts) > T:
        raise ValueError(f"lengths: found {counts}, expected 1 … {T} in every row")
    return torch.stack([x[n - 1 : n] for x, n in zip(hidden, counts, strict=True)])  # (B, 1, D)


def prefill(
    model: Qwen3, ids: Sequence[Sequence[int]], cache: KVCache, chunk_tokens: int = 512
) -> Tensor:
    """Append one list of token ids per row to `cache`. Returns the last hidden states, (B, 1, D).

    The ids are fed in chunks of `chunk_tokens` positions, which bounds the (T, S) mask of a long
    prompt. Raises ValueError for a row without ids or, on a CPU, a state that is not finite.
    """
    if not all(ids):
        raise ValueError("ids: found a row without tokens, expected at least one in every row")
    padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)  # (B, T)
    states = []
    for start in range(0, padded.shape[1], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        counts = [len(row[chunk]) for row in ids]
        states.append(model(model.embed(padded[:, chunk].to(model.device)), cache, counts))
    return finite(take_last(torch.cat(states, 1), list(map(len, ids))), model.name)  # (B, 1, D)
