"""The command line of tools/train_link.py: flags, and the objects that are made from them."""

import argparse
import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from minimas import LM, Aligner, Team, load
from minimas.agents import TRANSFERS, choose_team
from minimas.core.errors import ParameterError
from minimas.teams import LAYOUTS
from tools.evaluation.rows import Row
from tools.shared.arguments import FAILURES, Parser, one_of, print_error, whole
from tools.shared.files import write_whole

from .ceiling import ceiling
from .data import EXPECTED, Data, read_data, rotated
from .link import Link, vectors_path
from .rollout import OBJECTIVES, TeamSettings, require_alike
from .train import Settings, Training, in_batches, kept, log_of, measure, state_of

SUFFIX = ".safetensors"
STARTS = ("ridge", "prenorm", "identity")
TRAIN_ROWS = 4096  # generated rows in an epoch
# Flags that may change when a run is continued.
MAY_CHANGE = (
    "out", "updates", "patience", "test", "restart", "device", "ceiling", "max_new_tokens",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 if done, 1 if failed, 130 if stopped by Ctrl-C.

    Raises SystemExit(2) for a wrong command line.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    try:
        run(args)
    except FAILURES as error:
        print_error("train_link", named(error))
        return 1
    except KeyboardInterrupt:
        print(f"\ntrain_link: stopped; {kept(args.out)}", file=sys.stderr)
        return 130
    return 0


def named(error: BaseException) -> BaseException:
    """Return the error with its parameter written as a flag."""
    if isinstance(error, ParameterError):
        return ValueError(f"--{error.parameter.replace('_', '-')}: {error.problem}")
    return error


def make_parser() -> Parser:
    """Return the parser of all flags."""
    top = Parser("train_link", description="Train the map between frozen agents.")
    add = top.add_argument
    add("--model", "-m", default="weights/tiny", help="folder, hub id or .gguf file")
    add("--out", type=Path, required=True, metavar=f"FILE{SUFFIX}", help="the link, for --align")
    add("--data", metavar="DATA", help=f"{EXPECTED} (default with weights/tiny: tiny)")
    add("--rows", type=row_range, default=slice(None), metavar="START:STOP", help="part of a file")
    add("--held-out", type=whole(1), default=64, metavar="N", help="rows for the held-out loss")
    add("--test", type=whole(0), default=0, metavar="N", help="rows to test the best link on")
    add = top.add_argument_group("team").add_argument
    add("--team", default="sequential", help="sequential, hierarchical or FILE.json")
    add("--agents", type=whole(1), metavar="N", help="only the first N agents and the last one")
    add("--latent-steps", type=whole(0), metavar="N", help="thoughts per agent")
    text = "what agents hand over (latents: thoughts only)"
    add("--transfer", choices=TRANSFERS, default="full", help=text)
    add("--layout", choices=LAYOUTS, help="(default: the team's own)")
    text = "largest number of tokens in an answer of --test"
    add("--max-new-tokens", "-n", type=whole(1), default=24, help=text)
    add = top.add_argument_group("link").add_argument
    add("--start", type=one_of(STARTS, SUFFIX), default="ridge", help="the map to start from")
    add("--noise", type=float, default=0.0, metavar="S", help="noise on its matrix, S × its RMS")
    text = "train A and B of W₀ + A B with rank R, instead of all of W"
    add("--rank", type=whole(1), metavar="R", help=text)
    text = "learn K vectors that are the first thoughts"
    add("--start-vectors", type=whole(1), default=0, metavar="K", help=text)
    add("--gist", action="store_true", help="control: all thoughts are learned vectors, no map")
    add = top.add_argument_group("training").add_argument
    text = "nll: loss of the solution, distill: KL divergence from the prompts' cache"
    add("--objective", choices=tuple(OBJECTIVES), default="nll", help=text)
    add("--updates", type=whole(0), default=100)
    add("--batch-size", type=whole(1), default=8)
    add("--rate", type=float, default=3e-3, help="learning rate of Adam")
    text = "updates between evaluations"
    add("--evaluate-every", type=whole(1), default=10, metavar="N", help=text)
    text = "stop after N evaluations without a lower held-out loss (default: 0, never)"
    add("--patience", type=whole(0), default=0, metavar="N", help=text)
    add("--seed", "-s", type=whole(0), default=0)
    text = "control: every question gets the solution of another one"
    add("--shuffle-labels", action="store_true", help=text)
    add("--restart", action="store_true", help="do not continue an earlier run")
    text = "train no link, but optimize the thoughts of each --test question in N updates"
    add("--ceiling", type=whole(1), metavar="N", help=text)
    add("--device", default="auto", help="auto, cpu or cuda")
    return top


def row_range(text: str) -> slice:
    """Convert START:STOP to a slice. One of the two numbers may be missing."""
    start, colon, stop = text.partition(":")
    if not colon or not all(part.isdecimal() for part in (start, stop) if part):
        raise argparse.ArgumentTypeError(f"found {text!r:.40}, expected START:STOP, as in 200:1200")
    return slice(int(start) if start else None, int(stop) if stop else None)


def check(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with status 2 if a flag is wrong, or if flags do not go together."""
    if args.out.suffix != SUFFIX:  # --align would take its name for a kind of map
        parser.error(f"argument --out: found {str(args.out)!r}, expected FILE{SUFFIX}")
    written = [args.out, log_of(args.out), state_of(args.out), vectors_path(args.out)]
    for flag, name in (("data", args.data or ""), ("team", args.team), ("start", args.start)):
        if Path(name).resolve() in [path.resolve() for path in written]:
            parser.error(f"argument --{flag}: found {name!r}, a file that --out {args.out} writes")
    if args.shuffle_labels and args.held_out < 2:
        parser.error("argument --held-out: expected 2 or more questions with --shuffle-labels")
    if args.gist and (args.rank or args.start_vectors or args.noise or args.start != "ridge"):
        parser.error("argument --gist: there is no map, so expected no --start, --noise, --rank or "
                     "--start-vectors")  # fmt: skip
    if args.data is None and args.model != "weights/tiny":
        parser.error(f"argument --data: found nothing, expected {EXPECTED}")
    if not 0 < args.rate < float("inf"):
        parser.error(f"argument --rate: found {args.rate:g}, expected a number above 0")
    if args.updates and args.transfer in ("none", "shuffled"):
        expected = "expected full, latents or last (with --updates 0 it can be measured)"
        parser.error(f"argument --transfer: found {args.transfer!r}, {expected}")
    if not 0 <= args.noise < float("inf"):
        parser.error(f"argument --noise: found {args.noise:g}, expected a number, 0 or more")
    link_flags = args.rank or args.start_vectors or args.gist or args.shuffle_labels
    if args.ceiling and (link_flags or args.objective != "nll"):
        expected = "expected no --rank, --start-vectors, --gist, --shuffle-labels or --objective"
        parser.error(f"argument --ceiling: there is no link, {expected}")
    if args.ceiling and args.test < 2:
        parser.error("argument --test: expected 2 or more questions with --ceiling")


def run(args: argparse.Namespace) -> None:
    """Train and test, or measure the ceiling."""
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"{args.out.parent}: no such folder (--out)")
    data = read_data(
        args.data or "tiny", TRAIN_ROWS, args.held_out, args.test, args.rows, args.seed
    )
    # In float32 from the start: packed 16-bit layers are unpacked at every differentiable pass.
    lm = load(args.model, args.device, "float32")
    team_settings = make_team_settings(lm, args)
    require_alike([*data.train, *data.held_out, *data.test], team_settings)
    if args.ceiling:
        start = make_start(lm, args)
        measure_ceiling(lm, data.test, team_settings, start, args)
        return
    if args.shuffle_labels:
        data = Data(rotated(data.train), rotated(data.held_out), data.test)
    link = make_link(lm, team_settings, args)
    training = make_training(lm, link, data, team_settings, args)
    if args.restart:
        training.state.unlink(missing_ok=True)
    elif args.out.exists() and not training.state.exists():
        raise FileExistsError(f"{args.out}: found a file without its state ({training.state}), "
                              "expected another --out, or --restart to overwrite it")  # fmt: skip
    training.run()
    if data.test:
        found, each = measure(lm, link, data.test, team_settings, args.batch_size)
        training.write({"test": found, "questions": each})
        print(json.dumps({"test": found}))


def make_team_settings(lm: LM, args: argparse.Namespace) -> TeamSettings:
    """Return the settings of the team. Raises ValueError naming a wrong flag."""
    named = Path(args.team)
    team = Team.from_json(named) if named.suffix == ".json" else choose_team(lm, args.team)
    if args.agents is not None:
        team = replace(team, agents=(*team.agents[:-1][: args.agents], team.agents[-1]))
    steps = most_steps(lm, team, args.latent_steps)
    if args.updates and not steps:
        raise ValueError("--latent-steps: found 0, expected 1 or more: nothing can be trained")
    if args.start_vectors > steps:
        raise ValueError(
            f"--start-vectors: found {args.start_vectors}, expected at most {steps}, --latent-steps"
        )
    return TeamSettings(team, args.latent_steps, args.transfer, args.layout, args.max_new_tokens)


def most_steps(lm: LM, team: Team, latent_steps: int | None) -> int:
    """Return the largest number of thoughts of an agent. The last one needs its own number."""
    *earlier, last = team.agents
    thinking = [*earlier, last] if last.latent_steps is not None else earlier
    if latent_steps is not None:
        return latent_steps if thinking else 0
    own = (agent.latent_steps for agent in thinking)
    return max((lm.default_steps if steps is None else steps for steps in own), default=0)


def make_start(lm: LM, args: argparse.Namespace) -> Aligner:
    """Return the map to start from, with the noise of --noise."""
    start = lm.aligner(args.start)
    if not args.noise:
        return start
    D = lm.model.config.hidden_size
    matrix = torch.eye(D) if start.matrix is None else start.matrix.cpu()
    source = torch.Generator().manual_seed(args.seed)
    drawn = torch.randn(D, D, generator=source, dtype=torch.float64).to(matrix.dtype)
    noisy = matrix + args.noise * matrix.square().mean().sqrt() * drawn
    noisy = noisy.to(lm.model.device)
    return Aligner(noisy, start.norm, start.scale, start.shift, lm.model)


def make_link(lm: LM, team_settings: TeamSettings, args: argparse.Namespace) -> Link:
    """Return the link to train."""
    if args.gist:
        slots = most_steps(lm, team_settings.team, team_settings.latent_steps)
        return Link(lm.model, None, None, slots, args.seed)
    return Link(lm.model, make_start(lm, args), args.rank, args.start_vectors, args.seed)


def make_training(
    lm: LM, link: Link, data: Data, team_settings: TeamSettings, args: argparse.Namespace
) -> Training:
    """Return the training run, and print the numbers of its parameters and rows."""
    settings = Settings(
        args.objective, args.updates, args.batch_size, args.rate, args.evaluate_every,
        args.patience, args.seed,
    )  # fmt: skip
    identity: dict[str, Any] = {
        name: str(value) if isinstance(value, slice | Path) else value
        for name, value in vars(args).items() if name not in MAY_CHANGE
    }  # fmt: skip
    identity["rows_crc"] = zlib.crc32(json.dumps([data.train, data.held_out]).encode())
    # A name does not say what is in a file, which may have changed since the last update.
    identity["team_crc"] = zlib.crc32(repr(team_settings.team).encode())
    if Path(args.start).suffix == SUFFIX:
        identity["start_crc"] = zlib.crc32(Path(args.start).read_bytes())
    identity["fingerprint"] = lm.model.fingerprint()
    identity["parameters"] = sum(part.numel() for part in link.parameters())
    line = f"train_link: {identity['parameters']:,} parameters, {len(data.train):,} rows"
    print(f"{line}, {len(data.held_out)} held out", file=sys.stderr)
    return Training(lm, link, data, team_settings, settings, args.out, identity)


def measure_ceiling(
    lm: LM,
    rows: Sequence[Row],
    team_settings: TeamSettings,
    start: Aligner,
    args: argparse.Namespace,
) -> None:
    """Write a record per question to the log of --out, and print the mean losses so far."""
    log, firsts, lasts = log_of(args.out), list[float](), dict[str, list[float]]()
    if args.out.exists() or state_of(args.out).exists():
        raise FileExistsError(f"{args.out}: found a trained link, whose log --ceiling would "
                              "overwrite, expected another --out")  # fmt: skip
    last = team_settings.team.agents[-1]
    if last.latent_steps is not None:
        raise ValueError(f"--ceiling: found {last.name!r}, a last agent with latent_steps "
                         f"{last.latent_steps}, expected null")  # fmt: skip
    write_whole(log, "")
    for batch in in_batches(list(zip(rows, rotated(rows), strict=True)), args.batch_size):
        for record in ceiling(lm, batch, team_settings, start, args.ceiling, args.rate):
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            firsts.append(record["own"][0])
            for name in ("own", "other"):
                lasts.setdefault(name, []).append(record[name][-1])
        own, other = (fmean(each) for each in lasts.values())
        line = f"{len(firsts)} questions: loss {fmean(firsts):.4f}; after {args.ceiling} updates "
        print(f"{line}{own:.4f} for its own solution, {other:.4f} for another one's", flush=True)
