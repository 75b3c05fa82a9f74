"""Measure the time and memory that contenders need to load, each time in a new process.

This module does not depend on races, tasks or tables.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from . import checkpoints
from .contenders import CONTENDERS, missing

PLAIN = "plain read"  # reads the bytes of the files and makes no model
MiB = 2**20


def proc_bytes(path: str, field: str) -> float:
    """Return the value of the line `field` in a file of /proc (Linux), in bytes."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def resident(field: str) -> float:
    """Return the bytes that this process has in memory, including mapped files.

    `field` is "VmRSS" (now) or "VmHWM" (maximum so far). The maximum of getrusage is not usable:
    a process inherits it from the process that started it.
    """
    return proc_bytes("/proc/self/status", field)


def load_once(name: str, source: Path, threads: int) -> dict[str, float]:
    """Load a contender once in this process, which must be new.

    Returns the seconds for loading and for a first and a second token, and the peak memory after
    loading and after the tokens, in bytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # Import all code of the model before the clock starts.
    if source.is_dir():
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    if name != PLAIN:
        missing(CONTENDERS[name])
    torch.set_num_threads(threads)
    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        before, started = resident("VmRSS"), time.perf_counter()
        loaded: Any
        if name == PLAIN:
            loaded = [path.read_bytes() for path in source.glob("*.safetensors")]
        else:
            entry = CONTENDERS[name]
            loaded = entry.make(entry, source, None, torch.bfloat16)
        result = {"load": time.perf_counter() - started, "peak": resident("VmHWM") - before}
        for which in ("first", "second") if name != PLAIN else ():
            started = time.perf_counter()
            loaded.start(token)
            if "decode" in loaded.reads:
                loaded.decode(token)
            result[which] = time.perf_counter() - started
    return result | {"peak, token": resident("VmHWM") - before}


def load_all(
    names: list[str], folder: Path, work: Path, rounds: int, threads: int
) -> dict[str, dict[str, float]]:
    """Return the medians of `load_once` over interleaved rounds, each in a new process.

    An extra first round fills the page cache and is not counted. A contender that cannot be
    loaded is left out with a message.
    """
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in (PLAIN, *names)}
    for turn in range(rounds + 1):
        print(f"load: round {turn} of {rounds}", file=sys.stderr)
        for name in list(samples):
            source = folder
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                try:
                    if name != PLAIN:
                        source = checkpoints.write_source(folder, CONTENDERS[name], work)
                    samples[name].append(process.submit(load_once, name, source, threads).result())
                except (ImportError, ValueError) as error:
                    print(f"load: {name} is left out: {error}", file=sys.stderr)
                    del samples[name]
    medians = {}
    for name, results in samples.items():
        counted = results[1:]
        medians[name] = {key: median(result[key] for result in counted) for key in results[0]}
    return medians
