"""Train weights/tiny: a Qwen3 of 0.7 M parameters on which latent collaboration is real and can be measured.

    python tools/train_tiny.py --seed 0 --out DIR          # 0 1 2: three seeds, of which the best is written

Ends by measuring every row of the model card, and fails if one misses its bar. Started again it continues where it was.
The training does not know the method: it sees written transcripts, no latent rollout and no soft embedding, and the map
W_a comes from the weights as anybody's does. Three things make that map good: rows of W_in and W_out of one length, a
final norm without a gain, and noise on the input embeddings.

    B rows   T tokens   D hidden   V vocabulary
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_task import (
    LATENT_STEPS,
    LONGEST,
    NO_QUESTION,
    Piece,
    Teller,
    Transcript,
    make_tokenizer,
    split_stories,
    split_team,
    story,
    write_text_files,
)
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's minimas, installed or not

from minimas import (  # noqa: E402
    LM,
    Config,
    KVCache,
    Qwen3,
    Result,
    Sampling,
    Team,
    latent_mas,
    load,
    single,
    text_mas,
)

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
LOGIT_SCALE = 9.0  # the largest logit: hidden states have norm √D, rows of W_out LOGIT_SCALE / √D

TRANSCRIPTS = 400  # a round: drawn, sorted by length and cut into batches
BATCH_TOKENS = 2560
ROUNDS = 120
MATRIX_RATE, REST_RATE = 0.02, 3e-3
CARD = ROOT / "weights" / "tiny" / "README.md"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "split.json",
    "teams.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
# Kinds of transcript by weight, from this part of the training on, and the most operations in a question.
CURRICULUM: tuple[tuple[float, int, dict[str, float]], ...] = (
    (0.00, 3, {"single": 0.70, "chain": 0.20, "direct": 0.10}),
    (0.15, 2, {"single": 0.35, "chain": 0.20, "direct": 0.05, "experts": 0.10, "split": 0.30}),
    (
        0.25,
        LONGEST,
        {"single": 0.25, "chain": 0.25, "direct": 0.08, "experts": 0.12, "split": 0.30},
    ),
    (
        0.45,
        LONGEST,
        {"single": 0.13, "chain": 0.37, "direct": 0.08, "experts": 0.16, "split": 0.26},
    ),
)


# -- data --------------------------------------------------------------------------------------------------------------


def batches(
    tokenizer: Tokenizer, seed: int, round_: int, progress: float
) -> list[list[Transcript]]:
    """The batches of one round, the same whenever it is run: transcripts of one kind and of similar length."""
    rng = random.Random(f"{seed}/{round_}")
    teller = Teller(tokenizer, rng)
    longest, kinds = next(
        (most, kinds) for start, most, kinds in reversed(CURRICULUM) if progress >= start
    )
    drawn = [teller.draw(kinds, longest) for _ in range(TRANSCRIPTS)]
    cut: list[list[Transcript]] = []
    for parallel in (False, True):
        batch: list[Transcript] = []
        for transcript in sorted((t for t in drawn if bool(t.experts) == parallel), key=_size):
            if (len(batch) + 1) * _size(transcript) > BATCH_TOKENS:
                cut.append(batch)
                batch = []
            batch.append(transcript)
        if len(batch) > 4:  # a batch of stragglers would weigh as much as a full one
            cut.append(batch)
    rng.shuffle(cut)
    return cut


def _size(transcript: Transcript) -> int:
    return sum(len(piece.ids) for piece in (*transcript.experts, transcript.tail))


def pad(pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces as right-padded ids (B, T), the weights of predicting them (B, T), and lengths (B,)."""
    lengths = torch.tensor([len(piece.ids) for piece in pieces])
    ids = torch.zeros(len(pieces), int(lengths.max()), dtype=torch.int64)
    weights = torch.zeros(ids.shape)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece.ids)] = torch.tensor(piece.ids)
        weights[row, : len(piece.ids)] = torch.tensor(piece.weights)
    return ids, weights, lengths


# -- one step ----------------------------------------------------------------------------------------------------------


def loss_of(model: Qwen3, batch: list[Transcript], generator: torch.Generator) -> Tensor:
    """Weighted cross-entropy of a batch whose transcripts all have experts, or none has.

    Experts run as rows from empty memory and are joined for the summarizer by the cache itself: the training sees
    exactly the memory that inference makes.
    """
    memory = model.new_cache(len(batch))
    losses = torch.zeros(2)  # weighted losses, weights
    if batch[0].experts:
        side_by_side = [
            piece for pieces in zip(*(t.experts for t in batch), strict=True) for piece in pieces
        ]
        experts = model.new_cache(len(side_by_side))
        losses = _read(model, side_by_side, experts, generator)
        memory = KVCache.concat(
            [experts.select(rows) for rows in torch.arange(len(side_by_side)).split(len(batch))]
        )
    losses = losses + _read(model, [transcript.tail for transcript in batch], memory, generator)
    return losses[0] / losses[1]


def _read(model: Qwen3, pieces: list[Piece], memory: KVCache, generator: torch.Generator) -> Tensor:
    """Feed pieces behind `memory`; returns the sums of their weighted losses and of the weights, (2,)."""
    ids, weights, lengths = pad(pieces)
    hidden = model(noisy(model.embed(ids), generator), memory, lengths)  # (B, T, D)
    taught = weights[:, 1:] > 0  # what predicts a piece's first token is no part of it
    logits = model.logits(hidden[:, :-1][taught])  # (N, V)
    losses = F.cross_entropy(logits, ids[:, 1:][taught], reduction="none")
    weights = weights[:, 1:][taught]
    return torch.stack([losses @ weights, weights.sum()])


def noisy(embedded: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise on six sequences of ten, of up to an embedding's own length: a thought is no exact embedding."""
    B, _, D = embedded.shape
    level = torch.rand(B, 1, 1, generator=generator) * (
        torch.rand(B, 1, 1, generator=generator) < 0.6
    )
    return embedded + torch.randn(embedded.shape, generator=generator) * level * (LOGIT_SCALE / D)


@torch.no_grad()
def fix_lengths(model: Qwen3) -> None:
    """Put every row of W_in and W_out back on the sphere of radius LOGIT_SCALE / √D."""
    for rows in (model.model.embed_tokens.weight, model.lm_head.weight):
        rows.mul_(LOGIT_SCALE / math.sqrt(rows.shape[1]) / rows.norm(dim=-1, keepdim=True))


def new_model(config: Config, seed: int) -> Qwen3:
    """A model to be trained: weights of 1/√fan_in, less for what is added to the residual stream."""
    model = Qwen3(config, "weights/tiny").requires_grad_(True)
    model.model.norm.weight.requires_grad_(
        False
    )  # a gain of 1, so that h and W_out's rows share one geometry
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
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for the rest: half the steps of AdamW alone."""

    matrices: torch.optim.Muon
    rest: torch.optim.AdamW

    @classmethod
    def of(cls, model: Qwen3) -> "Optimizers":
        trained = [
            (name, weight) for name, weight in model.named_parameters() if weight.requires_grad
        ]
        rows = [weight for name, weight in trained if "embed" in name or "lm_head" in name]
        gains = [weight for _, weight in trained if weight.ndim < 2]
        matrices = [
            weight
            for name, weight in trained
            if weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        ]
        return cls(
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0075, momentum=0.95),
            # Rows have a fixed length: they only turn, slowly, and there is nothing to decay.
            torch.optim.AdamW(
                [{"params": gains, "lr": REST_RATE}, {"params": rows, "lr": REST_RATE / 3}],
                betas=(0.9, 0.98),
                weight_decay=0.0,
                fused=True,
            ),
        )

    def step(self, share: float) -> None:
        """One step of both at `share` of their learning rates, from the gradients there are."""
        for optimizer in self:
            for group in optimizer.param_groups:
                group.setdefault("full", group["lr"])
                group["lr"] = group["full"] * share
            optimizer.step()  # type: ignore[no-untyped-call]


def pace(progress: float, step: int) -> float:
    """The learning rate's share: up in 100 steps, flat for 30 % of the way, then down a cosine to 2 %."""
    rest = max(0.0, progress - 0.3) / 0.7
    return min(1.0, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * rest)))


# -- a run -------------------------------------------------------------------------------------------------------------


def train(
    tokenizer: Tokenizer, seed: int, rounds: int, state: Path
) -> tuple[Qwen3, dict[str, float]]:
    """Train to the end, from `state` if it is there; returns the model and what it took."""
    config = Config.from_dict({**SHAPE, "vocab_size": tokenizer.get_vocab_size()})
    model = new_model(config, seed)
    optimizers = Optimizers.of(model)
    seen = torch.zeros(config.vocab_size, dtype=torch.bool)
    took: dict[str, float] = {"rounds": 0, "steps": 0, "tokens": 0, "seconds": 0.0}
    if state.exists():
        took = load_state(state, model, optimizers, seen)
    while took["rounds"] < rounds:
        start, losses = time.perf_counter(), []
        # Everything drawn in a round follows from its number, so that a run that was cut off repeats it exactly.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + int(took["rounds"]))
        drawn = batches(tokenizer, seed, int(took["rounds"]), took["rounds"] / rounds)
        for done, batch in enumerate(drawn):
            loss = loss_of(model, batch, generator)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step(pace((took["rounds"] + done / len(drawn)) / rounds, int(took["steps"])))
            fix_lengths(model)
            losses.append(loss.item())
            took["steps"] += 1
            took["tokens"] += sum(map(_size, batch))
            seen[[i for t in batch for piece in (*t.experts, t.tail) for i in piece.ids]] = True
        took["rounds"] += 1
        took["seconds"] += time.perf_counter() - start
        line = f"seed {seed}: round {took['rounds']} of {rounds}, {took['tokens'] / 1e6:.2f} M tokens, "
        line += f"{took['seconds'] / 60:.1f} minutes, loss {sum(losses) / len(losses):.3f}"
        print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        if took["rounds"] % 10 == 0 or took["rounds"] == rounds:
            save_state(state, model, optimizers, seen, took)
    # A token that never occurred says nothing about the map: its row of W_out would be noise in W_outᵀ W_in.
    with torch.no_grad():
        model.lm_head.weight[~seen] = 0
    return model, took


def save_state(
    path: Path, model: Qwen3, optimizers: Optimizers, seen: Tensor, took: dict[str, float]
) -> None:
    """Everything a later start needs, in one file, whole or not at all."""
    tensors = {"seen": seen} | {
        f"model/{name}": weight for name, weight in model.state_dict().items()
    }
    for kind, optimizer in optimizers._asdict().items():
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}/{index}/{name}": value for name, value in moments.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"took": json.dumps(took)})
    partial.replace(path)


def load_state(path: Path, model: Qwen3, optimizers: Optimizers, seen: Tensor) -> dict[str, float]:
    """Put a saved state into model, optimizers and `seen`; returns what the run took so far."""
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
        optimizer.load_state_dict(
            {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
        )
    return took


def export(model: Qwen3, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model's folder: what every Hugging Face library reads, and teams.json."""
    write_text_files(tokenizer, folder)
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    config = {**SHAPE, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": ends}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


# -- measuring: through the public functions, on questions that were kept out of the training -----------------------


class Arm(NamedTuple):
    """One row of the card: how it is asked, and its bar, at least or at most so many per cent."""

    name: str
    method: Callable[..., list[Result]]
    options: dict[str, Any]
    at_least: int = 0
    at_most: int = 100
    operations: tuple[int, ...] = (3, 4, 5)
    split: bool = False  # a team of its own for every question: each expert holds another story

    @property
    def bar(self) -> str:
        return (
            f"≥ {self.at_least}"
            if self.at_least
            else f"≤ {self.at_most}"
            if self.at_most < 100
            else ""
        )


def arms(lm: LM) -> list[Arm]:
    """All rows of the card; those without a bar are there to be read."""
    team = lm.teams["sequential"]
    assert isinstance(team, Team)
    judger = team.agents[-1]
    pair = Team((team.agents[0], judger))
    blind = Team(
        (*team.agents[:-1], replace(judger, prompt=judger.prompt.format(question=NO_QUESTION)))
    )
    chain, experts = {"team": "sequential"}, {"team": "hierarchical"}
    return [
        Arm("single", single, {}, at_least=95),
        Arm("text_mas, sequential", text_mas, chain, at_least=95),
        Arm("text_mas, hierarchical", text_mas, experts, at_least=95),
        Arm("latent_mas, sequential", latent_mas, chain, at_least=92),
        Arm("thoughts only", latent_mas, {**chain, "transfer": "latents"}, at_least=90),
        Arm("judger without the question", latent_mas, {"team": blind}, at_least=92),
        Arm("planner and judger alone", latent_mas, {"team": pair}),
        Arm("latent_mas, hierarchical", latent_mas, experts, at_least=92),
        Arm("hierarchical, thoughts only", latent_mas, {**experts, "transfer": "latents"}),
        Arm("no memory", latent_mas, {**chain, "transfer": "none"}, at_most=40),
        Arm("another question's memory", latent_mas, {**chain, "transfer": "shuffled"}, at_most=15),
        Arm("0 steps", latent_mas, {**chain, "latent_steps": 0}, at_most=40),
        Arm("hierarchical, 0 steps", latent_mas, {**experts, "latent_steps": 0}),
        Arm("identity map", latent_mas, {**chain, "align": "identity"}, at_most=35),
        Arm("states fed back raw", latent_mas, {**chain, "align": "none"}, at_most=35),
        Arm("random map", latent_mas, {**chain, "align": "random"}, at_most=35),
        Arm("no memory, no question", latent_mas, {"team": blind, "transfer": "none"}, at_most=15),
        *(
            Arm(f"{n} steps", latent_mas, {**chain, "latent_steps": n})
            for n in (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32)
        ),
        Arm("six operations: single", single, {}, operations=(6,)),
        Arm("six operations: text_mas", text_mas, chain, operations=(6,)),
        Arm(
            "six operations: latent_mas, 7 steps",
            latent_mas,
            {**chain, "latent_steps": 7},
            operations=(6,),
        ),
        Arm(
            "six operations: no memory", latent_mas, {**chain, "transfer": "none"}, operations=(6,)
        ),
        Arm("split facts: text_mas", text_mas, {}, at_least=90, split=True),
        Arm("split facts: latent_mas", latent_mas, {}, at_least=90, split=True),
        Arm("split facts: thoughts only", latent_mas, {"transfer": "latents"}, split=True),
        Arm("split facts: 0 steps", latent_mas, {"latent_steps": 0}, split=True),
        Arm("split facts: no memory", latent_mas, {"transfer": "none"}, at_most=15, split=True),
    ]


def accuracy(lm: LM, arm: Arm, count: int) -> float:
    """Per cent of `count` fresh questions answered right, greedily."""
    rng = random.Random("fresh")
    size, right = 1 if arm.split else 250, 0
    for start in range(0, count, size):
        options = dict(arm.options)
        if arm.split:
            stories, asked = split_stories(rng, fresh=True)
            options["team"] = Team.from_dict(split_team([told.text for told in stories]), "split")
            told, questions = [asked], [asked.ask]
        else:
            told = [
                story(rng, rng.choice(arm.operations), fresh=True)
                for _ in range(min(size, count - start))
            ]
            questions = [one.question for one in told]
        results = arm.method(lm, questions, kind="math", sampling=GREEDY, **options)
        right += sum(
            result.answer == str(one.totals[-1]) for result, one in zip(results, told, strict=True)
        )
    return 100 * right / count


def measure(folder: Path, seed: int, count: int) -> dict[str, float]:
    """Every row of the card, name -> per cent; those that must be high in float32 too.

    Rows are kept in the folder as they are measured, so that a run that was cut off goes on.
    """
    kept = folder / f"figures-{count}.json"
    figures: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    as_shipped, wide = load(folder, device="cpu"), load(folder, device="cpu", dtype="float32")
    for arm in arms(as_shipped):
        for lm, name in [(as_shipped, arm.name), (wide, f"{arm.name}, float32")][
            : 1 + bool(arm.at_least)
        ]:
            if name not in figures:
                figures[name] = accuracy(lm, arm, count)
                kept.write_text(json.dumps(figures, indent=1))
                print(
                    f"seed {seed}: {name}: {figures[name]:.1f} %  {arm.bar}",
                    file=sys.stderr,
                    flush=True,
                )
    return figures


def misses(figures: dict[str, float], rows: list[Arm]) -> list[str]:
    """The bars that these figures miss, in words."""
    found = []
    for arm in rows:
        value = figures[arm.name]
        if not arm.at_least <= value <= arm.at_most:
            found.append(f"{arm.name}: {value:.1f} %, expected {arm.bar}")
        if arm.at_least and abs(value - figures[f"{arm.name}, float32"]) > 2:
            found.append(f"{arm.name}: float32 and bf16 differ by more than 2 points")
    return found


# -- the card: prose kept by hand in weights/tiny/README.md, figures filled in between its marks -----------------------


class Run(NamedTuple):
    """One seed's model, what its training took, and its figures."""

    folder: Path
    took: dict[str, float]
    figures: dict[str, float]


def card(prose: str, runs: dict[int, Run], best: int, rows: list[Arm], count: int) -> str:
    """`prose` with the figures of all runs in place of what stands between its `<!-- name -->` and `<!-- end -->`."""
    figures = runs[best].figures
    swept = [arm for arm in rows if re.fullmatch(r"[1-9]\d* steps", arm.name)]
    sweep = {int(arm.name.split()[0]): figures[arm.name] for arm in swept}
    sweep |= {0: figures["0 steps"], LATENT_STEPS: figures["latent_mas, sequential"]}
    counts, values = zip(*sorted(sweep.items()), strict=True)
    table = [["", "bar", *(f"seed {seed}" for seed in runs)]]
    for arm in rows:
        if arm not in swept:
            table.append(
                [arm.name, arm.bar, *(f"{run.figures[arm.name]:.1f}" for run in runs.values())]
            )
    blocks = {
        "asked": f"{count:,} questions a row. Shipped: seed {best}.",
        "table": markdown(table),
        "float32": "In float32: "
        + "; ".join(
            f"{arm.name} {figures[f'{arm.name}, float32']:.1f}" for arm in rows if arm.at_least
        ),
        "steps": markdown(
            [["steps", *map(str, counts)], ["right", *(f"{value:.0f}" for value in values)]]
        ),
        "runs": "\n".join(
            f"- seed {seed}: {took['steps']:,} steps, {took['tokens'] / 1e6:.1f} M tokens"
            for seed, (_, took, _) in runs.items()
        ),
    }
    for name, text in blocks.items():
        before, mark, rest = prose.partition(f"<!-- {name} -->\n")
        prose = before + mark + text + "\n" + rest[rest.index("<!-- end -->") :]
    return prose


def markdown(table: list[list[str]]) -> str:
    """A table whose first line is its head."""
    head, *rest = table
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="one or more; the best is shipped"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to write the best model to"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "build" / "tiny",
        help="where runs are kept and resumed",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="length of the training")
    parser.add_argument(
        "--questions", type=int, default=1000, help="fresh questions for each row of the card"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # matrices are small: a second thread costs more than it brings
    runs: dict[int, Run] = {}
    for seed in args.seed:
        folder = args.scratch / f"seed-{seed}-{args.rounds}"
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer()
        model, took = train(tokenizer, seed, args.rounds, folder / "state.safetensors")
        export(model, tokenizer, folder)
        runs[seed] = Run(folder, took, measure(folder, seed, args.questions))
    rows = arms(load(folder, device="cpu"))
    missed = {seed: misses(run.figures, rows) for seed, run in runs.items()}
    best = min(
        runs, key=lambda seed: (len(missed[seed]), -runs[seed].figures["latent_mas, sequential"])
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(runs[best].folder / file, args.out / file)
    prose = CARD.read_text(encoding="utf-8")
    (args.out / "README.md").write_text(
        card(prose, runs, best, rows, args.questions), encoding="utf-8"
    )
    for line in missed[best]:
        print(f"seed {best} misses a bar: {line}", file=sys.stderr)
    return 1 if missed[best] else 0


if __name__ == "__main__":
    sys.exit(main())
