"""Train weights/tiny: batches, loss, optimizers, and runs that can be continued.

Training does not use the method. card.py measures the model.

    B rows   T tokens   D hidden   V vocabulary
"""

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from minimas import Config, KVCache, Qwen3
from tools.shared.files import replacing

from .tiny_task import Piece, Teller, Transcript, write_text_files

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# The largest possible logit: hidden states have norm √D, rows of W_out norm LOGIT_SCALE / √D.
LOGIT_SCALE = 9.0

TRANSCRIPTS = 400  # per round; they are sorted by length and divided into batches
BATCH_TOKENS = 2560
ROUNDS = 120
MATRIX_RATE = 0.02
REST_RATE = 3e-3
# Each stage has the share of training after which it starts, the maximum number of operations in a
# question, and the probabilities of the kinds of transcript.
CURRICULUM: tuple[tuple[float, int, dict[str, float]], ...] = (
    (0.00, 3, {"single": 0.70, "chain": 0.20, "direct": 0.10}),
    (0.15, 2, {"single": 0.35, "chain": 0.20, "direct": 0.05, "experts": 0.10, "split": 0.30}),
    (0.25, 6, {"single": 0.25, "chain": 0.25, "direct": 0.08, "experts": 0.12, "split": 0.30}),
    (0.45, 6, {"single": 0.13, "chain": 0.37, "direct": 0.08, "experts": 0.16, "split": 0.26}),
)


# -- data ------------------------------------------------------------------------------------------


def batches(
    tokenizer: Tokenizer, seed: int, round_: int, progress: float
) -> list[list[Transcript]]:
    """Return the batches of one round, which depend only on the arguments.

    `progress` is the finished part of the training, from 0 to 1. The transcripts of a batch have
    similar lengths, and all or none of them have experts.
    """
    rng = random.Random(f"{seed}/{round_}")
    teller = Teller(tokenizer, rng)
    reached = [stage for stage in CURRICULUM if progress >= stage[0]]
    _, longest, kinds = reached[-1]
    drawn = [teller.draw(kinds, longest) for _ in range(TRANSCRIPTS)]
    found: list[list[Transcript]] = []
    for parallel in (False, True):
        batch: list[Transcript] = []
        same_kind = [transcript for transcript in drawn if bool(transcript.experts) == parallel]
        for transcript in sorted(same_kind, key=_size):
            if (len(batch) + 1) * _size(transcript) > BATCH_TOKENS:
                found.append(batch)
                batch = []
            batch.append(transcript)
        if len(batch) > 4:  # a smaller batch would count as much as a full one
            found.append(batch)
    rng.shuffle(found)
    return found


def _size(transcript: Transcript) -> int:
    return sum(len(piece.ids) for piece in (*transcript.experts, transcript.tail))


def pad(pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Return right-padded ids (B, T), their loss weights (B, T), and lengths (B,)."""
    lengths = torch.tensor([len(piece.ids) for piece in pieces])
    ids = torch.zeros(len(pieces), int(lengths.max()), dtype=torch.int64)
    weights = torch.zeros(ids.shape)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece.ids)] = torch.tensor(piece.ids)
        weights[row, : len(piece.ids)] = torch.tensor(piece.weights)
    return ids, weights, lengths


# -- one step --------------------------------------------------------------------------------------


def loss_of(model: Qwen3, batch: list[Transcript], generator: torch.Generator) -> Tensor:
    """Return the weighted cross-entropy of a batch, a scalar.

    All or none of its transcripts have experts. Experts are rows that start from an empty cache,
    and `KVCache.concat` joins their caches for the summarizer, as in inference.
    """
    memory = model.new_cache(len(batch))
    losses = torch.zeros(2)  # weighted losses, weights
    if batch[0].experts:
        by_expert = zip(*(transcript.experts for transcript in batch), strict=True)
        turns = [
            piece for pieces in by_expert for piece in pieces
        ]  # all rows of the first expert …
        experts = model.new_cache(len(turns))
        losses = _losses(model, turns, experts, generator)
        rows_by_expert = torch.arange(len(turns)).split(len(batch))
        memory = KVCache.concat([experts.select(rows) for rows in rows_by_expert])
    tails = [transcript.tail for transcript in batch]
    losses = losses + _losses(model, tails, memory, generator)
    return losses[0] / losses[1]


def _losses(
    model: Qwen3, pieces: list[Piece], memory: KVCache, generator: torch.Generator
) -> Tensor:
    """Return the sums of the weighted losses and of the weights of pieces after `memory`, (2,)."""
    ids, weights, lengths = pad(pieces)
    hidden = model(noisy(model.embed(ids), generator), memory, lengths)  # (B, T, D)
    taught = weights[:, 1:] > 0  # the first token of a piece is predicted before the piece
    logits = model.logits(hidden[:, :-1][taught])  # (N, V)
    losses = F.cross_entropy(logits, ids[:, 1:][taught], reduction="none")
    weights = weights[:, 1:][taught]
    return torch.stack([losses @ weights, weights.sum()])


def noisy(embedded: Tensor, generator: torch.Generator) -> Tensor:
    """Return embeddings (B, T, D) with Gaussian noise on about six of ten sequences.

    The norm of the noise is at most about that of an embedding. The noise prepares the model for
    latent thoughts, which are not exact embeddings.
    """
    B, _, D = embedded.shape
    level = torch.rand(B, 1, 1, generator=generator)
    level = level * (torch.rand(B, 1, 1, generator=generator) < 0.6)
    return embedded + torch.randn(embedded.shape, generator=generator) * level * (LOGIT_SCALE / D)


@torch.no_grad()
def fix_lengths(model: Qwen3) -> None:
    """Scale every row of W_in and W_out to the norm LOGIT_SCALE / √D."""
    for rows in (model.model.embed_tokens.weight, model.lm_head.weight):
        rows.mul_(LOGIT_SCALE / math.sqrt(rows.shape[1]) / rows.norm(dim=-1, keepdim=True))


def new_model(config: Config, seed: int) -> Qwen3:
    """Return a new model to train.

    Weights are normal with a standard deviation of 1/√fan_in, and smaller in the layers that add to
    the residual stream.
    """
    model = Qwen3(config, "weights/tiny").requires_grad_(True)
    # The gain of the final norm stays 1, so that hidden states and rows of W_out have the same
    # geometry.
    model.model.norm.weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.div_(math.sqrt(2 * config.num_hidden_layers))
    fix_lengths(model)
    return model


class Optimizers(NamedTuple):
    """Muon (Jordan et al., 2024) for the matrices of the layers, and AdamW for all other weights.

    Training needs half as many steps as with AdamW alone.
    """

    matrices: torch.optim.Muon
    rest: torch.optim.AdamW

    @classmethod
    def of(cls, model: Qwen3) -> "Optimizers":
        """Return the optimizers of a model."""
        matrices, rows, gains = [], [], []
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            if weight.ndim < 2:
                gains.append(weight)
            elif "embed" in name or "lm_head" in name:
                rows.append(weight)
            else:
                matrices.append(weight)
        # Rows of W_in and W_out have a fixed norm: they need no weight decay and a lower rate.
        groups = [{"params": gains, "lr": REST_RATE}, {"params": rows, "lr": REST_RATE / 3}]
        return cls(
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0075, momentum=0.95),
            torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        )

    def step(self, share: float) -> None:
        """Take one step with both optimizers at `share` of their learning rates."""
        for optimizer in self:
            for group in optimizer.param_groups:
                group.setdefault("full", group["lr"])
                group["lr"] = group["full"] * share
            optimizer.step()  # type: ignore[no-untyped-call]


def pace(progress: float, step: int) -> float:
    """Return the factor of the learning rate at `progress` (from 0 to 1) and `step`.

    It rises for 100 steps, is 1 until 30 % of training, and then falls along a cosine to 0.02.
    """
    rest = max(0.0, progress - 0.3) / 0.7
    return min(1.0, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * rest)))


# -- a run -----------------------------------------------------------------------------------------


def train(
    tokenizer: Tokenizer, seed: int, rounds: int, state: Path
) -> tuple[Qwen3, dict[str, float]]:
    """Train for `rounds` rounds. Continue from the file `state` if it exists.

    Returns the model, and the numbers of rounds, steps, tokens and seconds.
    """
    config = Config.from_dict({**SHAPE, "vocab_size": tokenizer.get_vocab_size()})
    model = new_model(config, seed)
    optimizers = Optimizers.of(model)
    seen = torch.zeros(config.vocab_size, dtype=torch.bool)  # (V,): tokens that occurred
    took: dict[str, float] = {"rounds": 0, "steps": 0, "tokens": 0, "seconds": 0.0}
    if state.exists():
        took = load_state(state, model, optimizers, seen)
    while took["rounds"] < rounds:
        start = time.perf_counter()
        loss = train_round(tokenizer, model, optimizers, seen, took, seed, rounds)
        took["rounds"] += 1
        took["seconds"] += time.perf_counter() - start
        line = f"seed {seed}: round {took['rounds']} of {rounds}, "
        line += f"{took['tokens'] / 1e6:.2f} M tokens, {took['seconds'] / 60:.1f} minutes, "
        line += f"loss {loss:.3f}"
        print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        if took["rounds"] % 10 == 0 or took["rounds"] == rounds:
            save_state(state, model, optimizers, seen, took)
    # The rows of tokens that never occurred are noise, which would also enter W_outᵀ W_in.
    with torch.no_grad():
        model.lm_head.weight[~seen] = 0
    return model, took


def train_round(
    tokenizer: Tokenizer,
    model: Qwen3,
    optimizers: Optimizers,
    seen: Tensor,
    took: dict[str, float],
    seed: int,
    rounds: int,
) -> float:
    """Train one round, and update `seen` and the counts in `took`. Returns the mean loss.

    All random numbers depend only on the seed and the number of the round, so an interrupted run
    repeats the round exactly.
    """
    done_rounds = int(took["rounds"])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + done_rounds)
    drawn = batches(tokenizer, seed, done_rounds, done_rounds / rounds)
    losses = []
    for done, batch in enumerate(drawn):
        loss = loss_of(model, batch, generator)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress = (done_rounds + done / len(drawn)) / rounds
        optimizers.step(pace(progress, int(took["steps"])))
        fix_lengths(model)
        losses.append(loss.item())
        took["steps"] += 1
        took["tokens"] += sum(map(_size, batch))
        for transcript in batch:
            for piece in (*transcript.experts, transcript.tail):
                seen[piece.ids] = True
    return sum(losses) / len(losses)


def save_state(
    path: Path, model: Qwen3, optimizers: Optimizers, seen: Tensor, took: dict[str, float]
) -> None:
    """Save the state of a run in one file. An interrupted save keeps the previous file."""
    tensors = {"seen": seen}
    tensors |= {f"model/{name}": weight for name, weight in model.state_dict().items()}
    for kind, optimizer in optimizers._asdict().items():
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}/{index}/{name}": value for name, value in moments.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"took": json.dumps(took)})


def load_state(path: Path, model: Qwen3, optimizers: Optimizers, seen: Tensor) -> dict[str, float]:
    """Load a saved state into the model, the optimizers and `seen`. Returns the run's counts."""
    with safe_open(path, "pt") as file:
        took: dict[str, float] = json.loads(file.metadata()["took"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    seen.copy_(tensors.pop("seen"))
    model.load_state_dict({name: tensors.pop(f"model/{name}") for name in model.state_dict()})
    for kind, optimizer in optimizers._asdict().items():
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            owner, index, moment = name.split("/")
            if owner == kind:
                moments.setdefault(int(index), {})[moment] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return took


def export(model: Qwen3, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model's folder in the format of Hugging Face, with teams.json."""
    write_text_files(tokenizer, folder)
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    config = {**SHAPE, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": ends}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
