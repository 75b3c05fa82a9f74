"""Make the Markdown page of tools/benchmark.py: heading, speed, warm-up and loading.

This module does not measure anything.
"""

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median

from minimas import Config

from .contenders import CONTENDERS, LEGEND, STEPS, YARDSTICK, stored_bytes
from .loading import PLAIN, MiB
from .race import Row

TASKS = {"latent": "latent step, ms", "decode": "decode step, ms", "prefill": "prefill, tokens/s"}
# Formats of the same size, of minimas and of llama.cpp.
RIVALS = {"q8": "Q8_0", "q4": "Q4_0"}


def heading(what: str, threads: int) -> list[str]:
    """Return lines that state what was run, where, when and with which versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.split(": ", 1)[1] for line in cpuinfo if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    packages = []
    for package in ("torch", "transformers", "bitsandbytes", "llama-cpp-python"):
        try:
            packages.append(f"{package} {version(package)}")
        except ImportError:
            continue
    load = os.getloadavg()[0]
    return [
        f"**{what}**, {threads} threads on {cpu} with {os.cpu_count()} cores "
        f"(load average {load:.1f} before), {datetime.date.today()}, "
        f"Python {platform.python_version()}, {', '.join(packages)}:",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
    ]


def race_table(rows: list[Row], speed: float) -> list[str]:
    """Return a Markdown table, one line per row.

    `speed` is the memory bandwidth in bytes per second. Speed-ups are ratios of the medians. The
    lowest and highest ratio of a round are in brackets.
    """
    by_key = {(row.task, row.batch, row.name): row for row in rows}
    lines = [
        f"| | batch | | median | speed-up over {YARDSTICK} | reads | GB/s | minimum, ms "
        "| share of the bandwidth |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        seconds = median(row.seconds)
        base = by_key[row.task, row.batch, YARDSTICK]
        faster = "" if row is base else ratio(base, row)
        if row.task == "prefill":  # limited by arithmetic, not by memory
            value, reads = f"{1 / seconds:.0f}", " | | | "
        else:
            value = f"{seconds * 1e3:.1f}"
            rate = row.bytes_read / seconds
            reads = f"{row.bytes_read / 1e6:,.0f} MB | {rate / 1e9:.1f}"
            reads += f" | {row.bytes_read / speed * 1e3:.1f} | {rate / speed:.0%}"
        task = TASKS[row.task]
        lines.append(f"| {task} | {row.batch} | {row.name} | {value} | {faster} | {reads} |")
    note = f"Memory is read at {speed / 1e9:.1f} GB/s (the fastest of 36 reads, before and after). "
    note += f"The minimum is the time for reading at that speed. {LEGEND}"
    return [*lines, "", note, *rivals_table(by_key)]


def rivals_table(by_key: dict[tuple[str, int, str], Row]) -> list[str]:
    """Return the comparison with the llama.cpp format of the same size, if any was measured."""
    lines = []
    for task, batch in dict.fromkeys((task, batch) for task, batch, _ in by_key):
        for mine, theirs in RIVALS.items():
            rival = by_key.get((task, batch, f"llama.cpp-{theirs}"))
            for name in (f"minimas-{mine}", f"minimas-{mine}-compiled"):
                row = by_key.get((task, batch, name))
                if row and rival:
                    faster = f"{rival.name} {ratio(rival, row)}"
                    lines.append(f"| {TASKS[task]} | {batch} | {name} | {faster} |")
    head = ["", "| | batch | | speed-up over |", "|---|--:|---|--:|"]
    return head + lines if lines else []


def ratio(slow: Row, fast: Row) -> str:
    """Return the speed-up of `fast` over `slow`, by medians and in the worst and best round."""
    rounds = [s / f for s, f in zip(slow.seconds, fast.seconds, strict=True)]
    medians = median(slow.seconds) / median(fast.seconds)
    return f"{medians:.2f} × ({min(rounds):.2f} … {max(rounds):.2f})"


def warm_up_table(rows: list[Row], context: int) -> list[str]:
    """Return a table of the extra time of first calls (packing, compiling), by contender."""
    cells = {}
    for row in rows:
        usual = median(row.seconds) * (row.batch * context if row.task == "prefill" else STEPS)
        cells[row.name, row.batch, row.task] = f"{max(0.0, row.first - usual):.1f}"
    tasks = list(dict.fromkeys(row.task for row in rows))
    titles = [TASKS[task].partition(",")[0] for task in tasks]
    lines = [
        "",
        "Warm-up: seconds by which a first call took longer than a later one (not counted above):",
        "",
        f"| | batch | {' | '.join(titles)} |",
        "|---|--:|" + "--:|" * len(tasks),
    ]
    for name, batch in dict.fromkeys((row.name, row.batch) for row in rows):
        values = [cells.get((name, batch, task), "") for task in tasks]
        lines.append(f"| {name} | {batch} | {' | '.join(values)} |")
    return lines


def load_table(loads: dict[str, dict[str, float]], size: int, config: Config) -> list[str]:
    """Return a Markdown table with a line for each way to load a checkpoint of `size` bytes."""
    lines = [
        "",
        f"Loading {size / MiB:,.0f} MiB from the page cache (llama.cpp: its own file, mapped). "
        "Peak memory is counted from its value after the imports.",
        "",
        "| | load, s | compared with a plain read | first token minus second, s | weights, MiB "
        "| peak, MiB | peak with a token, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in loads.items():
        # minimas packs its matrices at the first token
        extra = "" if name == PLAIN else f"{result['first'] - result['second']:.2f}"
        stored = size if name == PLAIN else stored_bytes(config, CONTENDERS[name])
        relative = result["load"] / loads[PLAIN]["load"]
        sizes = (stored, result["peak"], result["peak, token"])
        peaks = " | ".join(f"{bytes_ / MiB:,.0f}" for bytes_ in sizes)
        lines.append(f"| {name} | {result['load']:.2f} | {relative:.2f} × | {extra} | {peaks} |")
    return lines
