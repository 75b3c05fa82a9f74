"""The command line of tools/train_tiny.py: train all seeds, measure them, write the best model."""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from minimas import load
from tools.shared.arguments import print_error

from .card import Run, arms, card, measure, misses
from .tiny_task import make_tokenizer
from .train import ROUNDS, export, train

ROOT = Path(__file__).resolve().parents[2]
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


def main(description: str) -> int:
    """Train, measure, and write the best model. Returns 1 if it misses a bar of the card."""
    args = make_parser(description).parse_args()
    try:
        for folder in (args.out, args.scratch):  # now, not after the training
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print_error("train_tiny", error)
        return 1
    torch.set_num_threads(1)  # with matrices this small, a second thread makes training slower
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

    def rank(seed: int) -> tuple[int, float]:
        return len(missed[seed]), -runs[seed].figures["latent_mas, sequential"]

    best = min(runs, key=rank)
    for file in FILES:
        shutil.copyfile(runs[best].folder / file, args.out / file)
    text = card(CARD.read_text(encoding="utf-8"), runs, best, rows, args.questions)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    for line in missed[best]:
        print(f"seed {best} misses a bar: {line}", file=sys.stderr)
    return 1 if missed[best] else 0


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    text = "one or more seeds; the best model is written"
    add("--seed", type=int, nargs="+", default=[0], help=text)
    add("--out", type=Path, required=True, help="folder for the best model")
    text = "folder in which unfinished runs are saved and continued"
    add("--scratch", type=Path, default=ROOT / "build" / "tiny", help=text)
    add("--rounds", type=int, default=ROUNDS, help="number of training rounds")
    text = "number of new questions per row of the card"
    add("--questions", type=int, default=1000, help=text)
    return parser
