"""The command line of tools/benchmark.py: flags, the choice of the measurement, and its output."""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minimas import Config
from minimas.fast.quantize import FORMATS
from tools.shared.arguments import print_error
from tools.shared.streams import print_progress

from . import contenders, end_to_end, loading, page, quality, race
from .checkpoints import write_random
from .contenders import CONTENDERS, STEPS, YARDSTICK

Report = Callable[[argparse.Namespace], tuple[list[str], dict[str, Any]]]
REPORTS: dict[str, Report] = {
    "end_to_end": end_to_end.report,
    "memory_error": quality.memory_error,
    "perplexity": quality.perplexity,
}


def main(description: str) -> int:
    """Run the command line. Returns 0 if done, 1 if failed. A wrong flag exits with status 2."""
    parser = make_parser(description)
    args = parser.parse_args()
    mode = check_flags(parser, args)
    try:
        report(mode, args)
    except (OSError, ValueError, ImportError) as error:
        print_error("benchmark", error)
        return 1
    return 0


def report(mode: str | None, args: argparse.Namespace) -> None:
    """Run one measurement, write the file of `--out` and print the page.

    Raises ValueError, OSError or ImportError if the measurement is not possible.
    """
    torch.set_num_threads(args.threads)
    if args.out and not args.out.parent.is_dir():
        raise FileNotFoundError(f"{args.out}: --out: found no folder {args.out.parent}")
    if mode is None:
        lines, samples = compare(args)
    else:
        lines = page.heading(f"{mode.replace('_', ' ')}, {getattr(args, mode)}", args.threads)
        with torch.no_grad():
            rest, samples = REPORTS[mode](args)
        lines += rest
    text = "\n".join(lines)
    if args.out:  # written before printing: after a long measurement, stdout may be closed
        whole = text
        if args.out.suffix == ".json":
            whole = json.dumps(samples | {"page": lines}, indent=1)
        args.out.write_text(whole + "\n", encoding="utf-8")
    print(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    text = "file to write as well: every sample if its name ends in .json, otherwise the page"
    parser.add_argument("--out", type=Path, help=text)

    add = parser.add_argument_group("the comparison of speed (default)").add_argument
    text = "folder with config.json and safetensors (default: random weights)"
    add("--model", type=Path, help=text)
    text = "layers of the random model (default: 28; fewer for a quick look)"
    add("--layers", type=int, default=28, help=text)
    text = "tokens before the timed steps, and in the prefill (default: 512)"
    add("--context", type=int, default=512, help=text)
    add("--rounds", type=int, default=7)
    tasks = [*page.TASKS, "load"]
    add("--only", nargs="+", choices=tasks, default=tasks)
    text = f"names or patterns of names: {', '.join(CONTENDERS)}"
    add("--contenders", nargs="+", default=["*"], metavar="NAME", help=text)

    title = "latent_mas, text_mas and single on the same questions, with greedy decoding"
    add = parser.add_argument_group(title).add_argument
    add("--end-to-end", type=Path, metavar="FOLDER")
    text = 'rows with "question" and "answer"'
    add("--questions", type=Path, metavar="FILE.jsonl", help=text)
    add("--limit", type=int, default=10, help="number of questions (default: 10)")
    add("--quantize", choices=FORMATS)
    add("--compile", action="store_true")
    add("--latent-steps", type=int, help="(default: the model's own number, or 40)")
    add("--max-new-tokens", type=int, default=256)
    add("--align", default="ridge")
    add_quality_flags(parser)
    return parser


def add_quality_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of --memory-error and --perplexity."""
    title = "effect of the weight formats on the KV cache, and on the perplexity of a text"
    add = parser.add_argument_group(title).add_argument
    text = "measure the error for a prompt (with --questions: for the first question)"
    add("--memory-error", type=Path, metavar="FOLDER", help=text)
    add("--perplexity", type=Path, metavar="FOLDER")
    text = "a text, or a .jsonl file of questions and solutions"
    add("--text", type=Path, metavar="FILE", help=text)
    text = "number of tokens of the text, which is prefilled in windows of --window tokens"
    add("--tokens", type=int, default=1024, help=text)
    add("--window", type=int, default=256)
    add("--formats", nargs="*", default=[*FORMATS])
    add("--gguf", type=Path, nargs="*", default=[], metavar="FILE", help="files of the same model")
    add("--all-layers", action="store_true")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | None:
    """Return the chosen key of REPORTS, or None for the comparison of speed.

    Exits with status 2 if a flag is wrong.
    """
    numbers = [args.layers, args.rounds, args.threads, args.limit, args.max_new_tokens]
    numbers += [args.tokens, *args.batch_sizes]
    if min(numbers) < 1 or args.context < STEPS or args.window < 2:
        parser.error(
            f"expected numbers of 1 or more, --context {STEPS} or more and --window 2 or more"
        )
    asked = [mode for mode in REPORTS if getattr(args, mode)]
    if len(asked) > 1:
        flags = " and ".join("--" + mode.replace("_", "-") for mode in asked)
        parser.error(f"found {flags}, expected only one of them")
    mode = asked[0] if asked else None
    folder = getattr(args, mode or "model")
    if folder and not (folder / "config.json").is_file():
        parser.error(f"found no config.json in {folder}")
    if (args.end_to_end and not args.questions) or (args.perplexity and not args.text):
        parser.error(
            "expected --questions FILE.jsonl with --end-to-end, and --text FILE with --perplexity"
        )
    return mode


def installed(patterns: list[str]) -> list[str]:
    """Return the contenders that match a pattern and whose libraries are installed."""
    names = []
    for name in contenders.chosen(patterns):
        if (package := contenders.missing(CONTENDERS[name])) is None:
            names.append(name)
        else:
            print_progress(f"{name} is left out. To include it: pip install {package}")
    if YARDSTICK not in names:
        raise ValueError("transformers is missing: pip install -e '.[bench]'")
    return names


def compare(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Compare speed and loading. Returns the page and every sample."""
    what = args.model or f"Random weights in the shape of Qwen3-0.6B, {args.layers} of 28 layers"
    lines = page.heading(f"{what}, context {args.context}, {args.rounds} rounds", args.threads)
    tasks = [task for task in page.TASKS if task in args.only]
    speed = race.bandwidth()
    names = installed(args.contenders)
    rows: list[race.Row] = []
    loads: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        work = Path(temporary)
        # An empty folder, so that graphs which an earlier run compiled are not reused.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
        folder = args.model or work
        if not args.model:
            write_random(folder, args.layers)
        config = Config.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if tasks:
            kept = race.fitting(names, config, max(args.batch_sizes), args.context)
            if left := [name for name in names if name not in kept]:
                lines += [f"Left out, because memory is too small for all: {', '.join(left)}.", ""]
                names = kept
            race.check(names, folder, work, tasks)
        if "load" in args.only:
            # Compiled contenders load in the same way, so only the others are timed.
            eager = [name for name in names if not CONTENDERS[name].compiled]
            loads = loading.load_all(eager, folder, work, min(args.rounds, 5), args.threads)
        if tasks:
            loaded = race.enter(names, folder, work, torch.bfloat16)
            for batch in args.batch_sizes:
                rows += race.race(
                    loaded, tasks, batch, args.context, args.rounds, race.full_tolerance
                )
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    speed = max(speed, race.bandwidth())
    if rows:
        lines += page.race_table(rows, speed) + page.warm_up_table(rows, args.context)
    if loads:
        lines += page.load_table(loads, size, config)
    samples = {"rows": [row._asdict() for row in rows], "load": loads, "bytes_per_second": speed}
    return lines, samples
