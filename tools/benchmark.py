"""How fast minimas is beside what one would use instead: one run, interleaved, medians and ratios, as Markdown.

    python tools/benchmark.py                          # random weights in the shape of Qwen3-0.6B
    python tools/benchmark.py --model FOLDER --rounds 9 --threads 2 --out benchmark.md
    python tools/benchmark.py --contenders '*q4*' --only decode load --batch-sizes 1

A round runs every contender of tools/contenders.py once, in an order that turns with the round, so that a machine that
slows down slows all. All compute the same function from the same weights: results that differ by more than float32
explains, or on one layer by more than the format does, before the timing, or from their own first one in any round, are
an error, and no table is printed. A contender whose library is not installed is left out, and said to be.

    latent step   hidden state -> aligned embedding -> trunk; the mean of `STEPS` steps behind `--context` tokens
    decode step   token -> trunk -> logits -> the most likely token; the same way
    prefill       `--context` tokens a row into an empty memory, until the last hidden state is there
    load          in fresh processes: from the file to a model, its first token, its peak memory (Linux)

First calls, in which weights are packed and steps compiled, are timed apart. Three other questions, each a run of its
own on a real model, are answered by end_to_end.py and quality.py beside this one:

    python tools/benchmark.py --end-to-end FOLDER --questions FILE.jsonl --limit 10    # latent_mas against text_mas
    python tools/benchmark.py --memory-error FOLDER [--gguf FILE]                      # what a format does to a memory
    python tools/benchmark.py --perplexity FOLDER --text FILE [--gguf FILE]            # and to a text

Does not: judge answers, sample, use a GPU, or wait for a quiet machine: what else runs is in every figure, and the load
average before the run is printed.
"""

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import contenders as cast  # noqa: E402
from contenders import FIELD, REFERENCE, STEPS, YARDSTICK, Contender  # noqa: E402
from loading import kilobytes, load_all, load_table  # noqa: E402

from minimas import Aligner, Config  # noqa: E402

TASKS = {"latent": "latent step, ms", "decode": "decode step, ms", "prefill": "prefill, tokens/s"}
AGAINST = {"q8": "Q8_0", "q4": "Q4_0"}  # formats of one size: ours, llama.cpp's
Tolerance = Callable[[str, str], float]
SAME = 0.02  # how far a contender's result may be from its own first one: threads add up in another order


# -- the race ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One contender's samples of one task at one batch size."""

    task: str
    batch: int
    name: str
    seconds: list[float]  # a step, or a token of the prefill
    bytes_read: int  # weights and memory of one step
    first: float  # seconds of the first call, a whole sample: packing and compiling are in it


def race(
    field: dict[str, Contender],
    tasks: list[str],
    batch: int,
    context: int,
    rounds: int,
    tolerance: Tolerance,
) -> list[Row]:
    """Time all contenders on all tasks, interleaved; raises ValueError when results do not agree: with those of the
    first contender, to the `tolerance` of the task and their format; compiled ones with their eager twin's, as bf16.
    """
    config = next(iter(field.values())).model.config
    ids = torch.randint(
        config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(batch)
    )
    memory = batch * context * slot_bytes(config)

    def run(contender: Contender, task: str) -> tuple[float, Tensor]:
        contender.rewind()
        started = time.perf_counter()
        result: Tensor = getattr(contender, task)(ids)
        return time.perf_counter() - started, result

    begun = {}
    for name, contender in field.items():
        started = time.perf_counter()
        contender.start(ids)
        begun[name] = time.perf_counter() - started
        say(f"batch {batch}: {name} has read the context in {begun[name]:.1f} s")
    rows: list[Row] = []
    for task in tasks:
        there = {name: contender for name, contender in field.items() if task in contender.reads}
        warm = {name: run(contender, task) for name, contender in there.items()}
        new = {}
        for name, (seconds, result) in warm.items():
            twin = name.removesuffix("-compiled")
            other = twin if twin != name and twin in there else next(iter(there))
            allowed = tolerance(task, "bf16" if other == twin else FIELD[name].format)
            expected = warm[other][1]
            if task == "prefill" and result.shape != expected.shape:  # llama.cpp gives logits
                expected = there[other].model.logits(expected)
            error = agree(
                result, expected, allowed, f"{task}, batch {batch}: {name} against {other}"
            )
            say(f"{task}, batch {batch}: {name} differs from {other} by {error:.1e}")
            sizes = cast.weight_bytes(config, FIELD[name].format)
            bytes_read = sum(sizes[part] for part in there[name].reads[task]) + memory
            new[name] = Row(
                task, batch, name, [], bytes_read, begun[name] if task == "prefill" else seconds
            )
        graphs, names = compiled_graphs(), list(there)
        for turn in range(rounds):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                seconds, result = run(there[name], task)
                new[name].seconds.append(
                    seconds / (batch * context if task == "prefill" else STEPS)
                )
                agree(
                    result,
                    warm[name][1],
                    SAME,
                    f"{task}, batch {batch}: {name}, round {turn + 1} against its first",
                )
        if late := compiled_graphs() - graphs:
            say(f"{task}, batch {batch}: {late} graphs were compiled while the clock ran")
        rows += new.values()
    for contender in field.values():
        contender.stop()
    return rows


def check(names: list[str], folder: Path, work: Path, tasks: list[str]) -> None:
    """Raise ValueError unless all compute the same function, where rounding cannot hide a mistake."""
    eager = [name for name in names if not FIELD[name].compiled]
    exact = [
        name
        for name in eager
        if FIELD[name].format == "bf16" and FIELD[name].make is not cast.LlamaCpp
    ]
    say("in float32:")
    race(enter(exact, folder, work, torch.float32), tasks, 2, 64, 0, lambda *_: 1e-3)
    say("one layer of random weights in every format:")
    small = work / "one layer"
    small.mkdir()
    cast.write_random(small, layers=1, vocab_size=4096)
    race(enter(eager, small, small, torch.bfloat16), tasks, 2, 64, 0, shallow)


def shallow(task: str, format: str) -> float:
    """How far results may be apart on one layer."""
    return cast.TOLERANCE[format] * (3 if task == "latent" else 1)


def deep(task: str, format: str) -> float:
    """And on many: 16 bits keep some digits, of four or eight on random weights nothing is left to compare."""
    return 0.2 if format == "bf16" else math.inf


def enter(names: list[str], folder: Path, work: Path, dtype: torch.dtype) -> dict[str, Contender]:
    """Load all on the same weights; one that cannot run here is left out, and said to be."""
    field: dict[str, Contender] = {}
    align: Aligner | None = None
    for name in names:
        entry = FIELD[name]
        try:
            started = time.perf_counter()
            field[name] = entry.make(entry, cast.write_source(folder, entry, work), align, dtype)
        except (ImportError, ValueError) as error:
            if name in (REFERENCE, YARDSTICK):
                raise
            say(f"{name} is left out: {error}")
            continue
        say(f"{name}: loaded in {time.perf_counter() - started:.1f} s")
        if name == REFERENCE:  # W_a of the exact embeddings, the same for all
            align = field[name].align = field[name].lm.aligner("ridge")
    return field


def fitting(names: list[str], config: Config, batch: int, context: int) -> list[str]:
    """Those that fit into the free memory at once; raises ValueError when that takes more than some spare ones."""
    memory = (
        1.6 * batch * context * slot_bytes(config) + 2**27
    )  # room is taken in advance, and for scratch
    logits = 2 * batch * context * config.vocab_size  # the authors' prefill computes them all
    there, kept = kilobytes("/proc/meminfo", "MemAvailable"), list(names)
    for spare in ("", *cast.SPARE):
        kept = [name for name in kept if name != spare]
        own = [name for name in kept if name != "trunk-bf16"]  # whose weights are the authors'
        needed = (
            sum(cast.stored_bytes(config, FIELD[name]) for name in own)
            + len(kept) * memory
            + logits
            + 2**30
        )
        if needed <= there:
            say(
                f"{len(kept)} contenders will take some {needed / 2**30:.0f} of {there / 2**30:.0f} GiB"
            )
            return kept
    raise ValueError(
        f"found {there / 2**30:.1f} GiB of free memory, expected {needed / 2**30:.1f} for {len(kept)} contenders at "
        "once: choose some with --contenders, or smaller --batch-sizes"
    )


def slot_bytes(config: Config) -> int:
    """Of one token's keys and values in 16 bits."""
    return 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; 0 if it was never asked to."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def agree(result: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """The relative difference of two results (B, …); raises ValueError when it is more than rounding explains."""
    error = float((result.float() - expected.float()).norm() / expected.float().norm())
    if not error <= tolerance:  # NaN does not agree either
        raise ValueError(
            f"{what}: found a relative difference of {error:.1e}, expected {tolerance} at most"
        )
    return error


def bandwidth(repeats: int = 9) -> float:
    """Bytes a second that all threads together read from memory: the fastest of some reads of 512 MiB."""
    block, seconds = torch.ones(2**15, 2**12), []
    readers: tuple[Callable[[], Tensor], ...] = (lambda: block.sum(), lambda: block @ block[0])
    for _ in range(repeats):
        for reader in readers:
            started = time.perf_counter()
            reader()
            seconds.append(time.perf_counter() - started)
    return block.nbytes / min(seconds)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


# -- the page ----------------------------------------------------------------------------------------------------------


def race_table(rows: list[Row], speed: float) -> list[str]:
    """One line a row; the ratio is that of the medians, in brackets the rounds' lowest and highest."""
    of = {(row.task, row.batch, row.name): row for row in rows}
    lines = [
        f"| | batch | | median | faster than {YARDSTICK} | reads | GB/s | floor | of the bandwidth |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        time_, base = median(row.seconds), of[row.task, row.batch, YARDSTICK]
        faster = "" if row is base else versus(base, row)
        value = f"{time_ * 1e3:.1f}"
        reads = f"{row.bytes_read / 1e6:,.0f} MB | {row.bytes_read / time_ / 1e9:.1f}"
        reads += f" | {row.bytes_read / speed * 1e3:.1f} | {row.bytes_read / time_ / speed:.0%}"
        if row.task == "prefill":  # bound by arithmetic, not by memory
            value, reads = f"{1 / time_:.0f}", " | | | "
        lines.append(
            f"| {TASKS[row.task]} | {row.batch} | {row.name} | {value} | {faster} | {reads} |"
        )
    lines += ["", f"Memory is read at {speed / 1e9:.1f} GB/s (the fastest of 36 reads, before and after); the floor is "
              f"what reading takes at that speed. {cast.LEGEND}"]  # fmt: skip
    wanted = [(ours + how, theirs) for ours, theirs in AGAINST.items() for how in ("", "-compiled")]
    keys = dict.fromkeys((row.task, row.batch) for row in rows)
    pairs = [
        ((*key, f"minimas-{ours}"), (*key, f"llama.cpp-{theirs}"))
        for key in keys
        for ours, theirs in wanted
    ]
    pairs = [(of[mine], of[theirs]) for mine, theirs in pairs if mine in of and theirs in of]
    if pairs:
        lines += ["", "| | batch | | faster than |", "|---|--:|---|--:|"]
    for mine, theirs in pairs:
        lines.append(
            f"| {TASKS[mine.task]} | {mine.batch} | {mine.name} | {theirs.name} {versus(theirs, mine)} |"
        )
    return lines


def versus(slow: Row, fast: Row) -> str:
    """How many times faster, by the medians, and in the worst and the best round."""
    each = [s / f for s, f in zip(slow.seconds, fast.seconds, strict=True)]
    return (
        f"{median(slow.seconds) / median(fast.seconds):.2f} × ({min(each):.2f} … {max(each):.2f})"
    )


def warm_up_table(rows: list[Row], context: int) -> list[str]:
    """What the first calls took beyond later ones: packing, compiling. A row is a contender, a column a task."""
    cells = {}
    for row in rows:
        usual = median(row.seconds) * (row.batch * context if row.task == "prefill" else STEPS)
        cells[row.name, row.batch, row.task] = f"{max(0.0, row.first - usual):.1f}"
    tasks, keys = (
        list(dict.fromkeys(row.task for row in rows)),
        dict.fromkeys((row.name, row.batch) for row in rows),
    )
    titles = [TASKS[task].partition(",")[0] for task in tasks]
    lines = [
        "",
        "Warm-up, seconds by which a first call was longer than a later one (not counted above):",
        "",
    ]
    lines += [f"| | batch | {' | '.join(titles)} |", "|---|--:|" + "--:|" * len(tasks)]
    for name, batch in keys:
        lines.append(
            f"| {name} | {batch} | {' | '.join(cells.get((name, batch, task), '') for task in tasks)} |"
        )
    return lines


def heading(what: str, threads: int) -> list[str]:
    """What was run, where, when and how."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next(
        (line.split(": ", 1)[1] for line in cpuinfo if line.startswith("model name")),
        platform.machine(),
    )
    packages = []
    for package in ("torch", "transformers", "bitsandbytes", "llama-cpp-python"):
        try:
            packages.append(f"{package} {version(package)}")
        except ImportError:
            continue
    return [
        f"**{what}**, {threads} threads on {cpu} with {os.cpu_count()} cores (load average {os.getloadavg()[0]:.1f} "
        f"before), {datetime.date.today()}, Python {platform.python_version()}, {', '.join(packages)}:",
        "", f"    {shlex.join(['python', *sys.argv])}", "",
    ]  # fmt: skip


def compare(args: argparse.Namespace) -> tuple[list[str], dict[str, object]]:
    """The race and the loading: the page, and every sample."""
    what = args.model or f"Random weights in the shape of Qwen3-0.6B, {args.layers} of 28 layers"
    page = heading(f"{what}, context {args.context}, {args.rounds} rounds", args.threads)
    tasks, names, rows, loads, speed = [t for t in TASKS if t in args.only], [], [], {}, bandwidth()
    for name in cast.chosen(args.contenders):
        if (package := cast.missing(FIELD[name])) is None:
            names.append(name)
        else:
            say(f"{name} is left out: pip install {package}")
    if YARDSTICK not in names:
        raise ValueError("transformers is missing: pip install -e '.[bench]'")
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        work = Path(temporary)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
            work / "inductor"
        )  # what another run compiled does not count
        folder = args.model or work
        if not args.model:
            cast.write_random(folder, args.layers)
        config = Config.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if tasks:
            kept = fitting(names, config, max(args.batch_sizes), args.context)
            if left := [name for name in names if name not in kept]:
                page += [
                    f"Left out, for all did not fit into memory at once: {', '.join(left)}.",
                    "",
                ]
                names = kept
            check(names, folder, work, tasks)
        if "load" in args.only:
            loaded = [
                name for name in names if not FIELD[name].compiled
            ]  # which load as the others do
            loads = load_all(loaded, folder, work, min(args.rounds, 5), args.threads)
        if tasks:
            field = enter(names, folder, work, torch.bfloat16)
            for batch in args.batch_sizes:
                rows += race(field, tasks, batch, args.context, args.rounds, deep)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    speed = max(speed, bandwidth())
    page += race_table(rows, speed) + warm_up_table(rows, args.context) if rows else []
    page += load_table(loads, size, config) if loads else []
    return page, {"rows": [row._asdict() for row in rows], "load": loads, "bytes_per_second": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--out",
        type=Path,
        help="also write this file: .json every sample, any other suffix the page",
    )
    group = parser.add_argument_group("the race, when no other question is asked")
    group.add_argument(
        "--model",
        type=Path,
        help="a folder with config.json and safetensors; default: random weights",
    )
    group.add_argument(
        "--layers", type=int, default=28, help="of the random model; fewer for a quick look"
    )
    group.add_argument(
        "--context", type=int, default=512, help="tokens before the steps, and of the prefill"
    )
    group.add_argument("--rounds", type=int, default=7)
    group.add_argument("--only", nargs="+", choices=[*TASKS, "load"], default=[*TASKS, "load"])
    group.add_argument(
        "--contenders",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help=f"or pattern: {', '.join(FIELD)}",
    )
    group = parser.add_argument_group(
        "latent_mas, text_mas and single on the same questions, greedy"
    )
    group.add_argument("--end-to-end", type=Path, metavar="FOLDER")
    group.add_argument(
        "--questions",
        type=Path,
        metavar="FILE.jsonl",
        help='rows with "question", perhaps "answer"',
    )
    group.add_argument("--limit", type=int, default=10, help="questions")
    group.add_argument("--quantize", choices=cast.FORMATS)
    group.add_argument("--compile", action="store_true")
    group.add_argument("--latent-steps", type=int, help="default: the model's, or 40")
    group.add_argument("--max-new-tokens", type=int, default=256)
    group.add_argument("--align", default="ridge")
    group = parser.add_argument_group("what four and eight bits do to a memory, and to a text")
    group.add_argument(
        "--memory-error",
        type=Path,
        metavar="FOLDER",
        help="of a prompt (--questions: the first one's)",
    )
    group.add_argument("--perplexity", type=Path, metavar="FOLDER")
    group.add_argument(
        "--text", type=Path, metavar="FILE", help="a text, or .jsonl rows of question and solution"
    )
    group.add_argument(
        "--tokens", type=int, default=1024, help="of the text, in windows of --window"
    )
    group.add_argument("--window", type=int, default=256)
    group.add_argument("--formats", nargs="*", default=[*cast.FORMATS])
    group.add_argument(
        "--gguf", type=Path, nargs="*", default=[], metavar="FILE", help="of the same model"
    )
    group.add_argument("--all-layers", action="store_true")
    args = parser.parse_args()
    numbers = [
        args.layers,
        args.rounds,
        args.threads,
        args.limit,
        args.max_new_tokens,
        args.tokens,
        *args.batch_sizes,
    ]
    if min(numbers) < 1 or args.context < STEPS or args.window < 2:
        parser.error(
            f"expected 1 or more of everything, a --context of {STEPS} and a --window of 2 or more"
        )
    asked = [mode for mode in ("end_to_end", "memory_error", "perplexity") if getattr(args, mode)]
    folder = getattr(args, asked[0]) if asked else args.model
    if len(asked) > 1:
        parser.error(
            f"found {' and '.join('--' + mode.replace('_', '-') for mode in asked)}, expected one of them"
        )
    if folder and not (folder / "config.json").is_file():
        parser.error(f"found no config.json in {folder}")
    if (args.end_to_end and not args.questions) or (args.perplexity and not args.text):
        parser.error(
            "expected --questions FILE.jsonl with --end-to-end, --text FILE with --perplexity"
        )
    torch.set_num_threads(args.threads)
    if asked:
        import end_to_end
        import quality

        page, answer = (
            heading(f"{asked[0].replace('_', ' ')}, {folder}", args.threads),
            getattr(quality, asked[0], None),
        )
        with torch.no_grad():
            lines, samples = (answer or end_to_end.report)(args)
        page += lines
    else:
        page, samples = compare(args)
    print("\n".join(page))
    if args.out:
        text = (
            json.dumps(samples | {"page": page}, indent=1)
            if args.out.suffix == ".json"
            else "\n".join(page)
        )
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"benchmark: {error}") from error
