"""How long contenders take to load, and how much memory that takes, in fresh processes; run by tools/benchmark.py.

Does not know: races, tasks.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import contenders as cast
import torch
from contenders import FIELD

from minimas import Config

PLAIN, MiB = "plain read", 2**20


def kilobytes(path: str, field: str) -> float:
    """Bytes on the line `field` of a file of /proc (Linux)."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def resident(field: str) -> float:
    """Bytes of this process in memory, mapped files included: "VmRSS" now, "VmHWM" at most so far."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    return kilobytes("/proc/self/status", field)


def load_once(name: str, source: Path, threads: int) -> dict[str, float]:
    """Load in this (fresh) process: seconds for that and for a first and second token, peak memory after each."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if source.is_dir():
        with torch.device("meta"):  # imports the model's code before the clock starts, as torch is
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    if name != PLAIN:
        cast.missing(FIELD[name])
    torch.set_num_threads(threads)
    token, model = torch.zeros(1, 1, dtype=torch.int64), None
    with torch.no_grad():
        before, started = resident("VmRSS"), time.perf_counter()
        if name == PLAIN:
            bytes_ = [path.read_bytes() for path in source.glob("*.safetensors")]  # noqa: F841 (held)
        else:
            model = FIELD[name].make(FIELD[name], source, None, torch.bfloat16)
        result = {"load": time.perf_counter() - started, "peak": resident("VmHWM") - before}
        for which in ("first", "second") if model else ():
            started = time.perf_counter()
            model.start(token)
            if "decode" in model.reads:
                model.decode(token)
            result[which] = time.perf_counter() - started
    return result | {"peak, token": resident("VmHWM") - before}


def load_all(
    names: list[str], folder: Path, work: Path, rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Medians of `load_once`, interleaved, each time in a fresh process; an extra first round warms the page cache."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in (PLAIN, *names)}
    for turn in range(rounds + 1):
        print(f"load: round {turn} of {rounds}", file=sys.stderr)
        for name in list(samples):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                try:
                    source = (
                        cast.write_source(folder, FIELD[name], work) if name != PLAIN else folder
                    )
                    samples[name].append(process.submit(load_once, name, source, threads).result())
                except (ImportError, ValueError) as error:
                    print(f"load: {name} is left out: {error}", file=sys.stderr)
                    del samples[name]
    return {
        name: {key: median(r[key] for r in rs[1:]) for key in rs[0]} for name, rs in samples.items()
    }


def load_table(loads: dict[str, dict[str, float]], size: int, config: Config) -> list[str]:
    """One line for each way to load a checkpoint of `size` bytes."""
    lines = [
        "", f"Loading {size / MiB:,.0f} MiB from the page cache (llama.cpp: its own file, mapped). Peak memory is what "
        "comes on top of the imports.", "",
        "| | load, s | of a plain read | first token beyond the second, s | weights | peak | with a token, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, of in loads.items():
        extra = (
            f"{of['first'] - of['second']:.2f}" if name != PLAIN else ""
        )  # minimas packs its matrices there
        stored = size if name == PLAIN else cast.stored_bytes(config, FIELD[name])
        peaks = f"{stored / MiB:,.0f} | {of['peak'] / MiB:,.0f} | {of['peak, token'] / MiB:,.0f}"
        lines.append(
            f"| {name} | {of['load']:.2f} | {of['load'] / loads[PLAIN]['load']:.2f} × | {extra} | {peaks} |"
        )
    return lines
