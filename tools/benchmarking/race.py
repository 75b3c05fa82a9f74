"""Time the contenders on the same tasks, interleaved, and compare their results.

This module does not depend on flags, tables, or how a contender computes.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minimas import Aligner, Config
from tools.shared.streams import print_progress

from . import contenders
from .checkpoints import write_random, write_source
from .contenders import CONTENDERS, REFERENCE, STEPS, YARDSTICK, Contender, Minimas
from .loading import proc_bytes

Tolerance = Callable[[str, str], float]  # task, format -> largest relative difference
# A contender may differ from its own first result, because threads add in another order.
REPEAT_TOLERANCE = 0.02


class Row(NamedTuple):
    """The samples of one contender on one task at one batch size."""

    task: str
    batch: int
    name: str
    seconds: list[float]  # per step, or per token of the prefill
    bytes_read: int  # weights and KV cache of one step
    first: float  # seconds of the first call, a whole sample that includes packing and compiling


def race(
    loaded: dict[str, Contender],
    tasks: list[str],
    batch: int,
    context: int,
    rounds: int,
    tolerance: Tolerance,
) -> list[Row]:
    """Time all contenders on all tasks, interleaved, and return their samples.

    Raises ValueError if a result differs from that of the first contender by more than the
    `tolerance` of the task and the format. A compiled contender is compared with the same
    contender uncompiled, with the tolerance of bf16.
    """
    config = next(iter(loaded.values())).model.config
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(config.vocab_size, (batch, context), generator=generator)  # (B, T)
    prefills = {}
    for name, contender in loaded.items():
        started = time.perf_counter()
        contender.start(ids)
        prefills[name] = time.perf_counter() - started
        print_progress(f"batch {batch}: {name} prefilled the context in {prefills[name]:.1f} s")
    rows: list[Row] = []
    for task in tasks:
        able = {name: contender for name, contender in loaded.items() if task in contender.reads}
        first = {name: sample(contender, task, ids) for name, contender in able.items()}
        results = {name: result for name, (_, result) in first.items()}
        compare_first(able, results, task, batch, tolerance)
        new = {}
        for name, contender in able.items():
            sizes = contenders.weight_bytes(config, CONTENDERS[name].format)
            bytes_read = sum(sizes[part] for part in contender.reads[task])
            bytes_read += batch * context * slot_bytes(config)
            seconds = prefills[name] if task == "prefill" else first[name][0]
            new[name] = Row(task, batch, name, [], bytes_read, seconds)
        time_rounds(able, new, results, ids, rounds)
        rows += new.values()
    for contender in loaded.values():
        contender.stop()
    return rows


def sample(contender: Contender, task: str, ids: Tensor) -> tuple[float, Tensor]:
    """Run one task once after the context. Returns its seconds and its result."""
    contender.rewind()
    started = time.perf_counter()
    result: Tensor = getattr(contender, task)(ids)
    return time.perf_counter() - started, result


def compare_first(
    able: dict[str, Contender],
    results: dict[str, Tensor],
    task: str,
    batch: int,
    tolerance: Tolerance,
) -> None:
    """Raise ValueError if a first result differs from the expected one, as `race` defines it."""
    for name, result in results.items():
        eager = name.removesuffix("-compiled")
        if eager != name and eager in able:
            other, format = eager, "bf16"
        else:
            other, format = next(iter(able)), CONTENDERS[name].format
        expected = results[other]
        if task == "prefill" and result.shape != expected.shape:  # llama.cpp returns logits
            expected = able[other].model.logits(expected)
        what = f"{task}, batch {batch}: {name} compared with {other}"
        error = agree(result, expected, tolerance(task, format), what)
        print_progress(f"{task}, batch {batch}: {name} differs from {other} by {error:.1e}")


def time_rounds(
    able: dict[str, Contender],
    rows: dict[str, Row],
    results: dict[str, Tensor],
    ids: Tensor,
    rounds: int,
) -> None:
    """Add one sample per round to each row.

    The first contender changes from round to round. Raises ValueError if a result differs from the
    contender's first result.
    """
    graphs = compiled_graphs()
    names = list(able)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            row = rows[name]
            seconds, result = sample(able[name], row.task, ids)
            row.seconds.append(seconds / (ids.numel() if row.task == "prefill" else STEPS))
            what = f"{row.task}, batch {row.batch}: {name}, round {turn + 1} and its first"
            agree(result, results[name], REPEAT_TOLERANCE, what)
    if late := compiled_graphs() - graphs:
        row = rows[names[0]]
        print_progress(f"{row.task}, batch {row.batch}: {late} graphs were compiled while timing")


def check(names: list[str], folder: Path, work: Path, tasks: list[str]) -> None:
    """Raise ValueError unless all contenders compute the same function.

    bf16 contenders run in float32, and every format runs on one layer, because in a deep model
    with few bits, rounding errors hide mistakes.
    """
    eager = [name for name in names if not CONTENDERS[name].compiled]
    exact = [name for name in eager if CONTENDERS[name].format == "bf16"]
    exact = [name for name in exact if CONTENDERS[name].make is not contenders.LlamaCpp]
    print_progress("in float32:")
    race(enter(exact, folder, work, torch.float32), tasks, 2, 64, 0, lambda *_: 1e-3)
    print_progress("one layer of random weights in every format:")
    small = work / "one layer"
    small.mkdir()
    write_random(small, layers=1, vocab_size=4096)
    race(enter(eager, small, small, torch.bfloat16), tasks, 2, 64, 0, one_layer_tolerance)


def one_layer_tolerance(task: str, format: str) -> float:
    """Return the largest relative difference on one layer."""
    return contenders.TOLERANCE[format] * (3 if task == "latent" else 1)


def full_tolerance(task: str, format: str) -> float:
    """Return the largest relative difference on all layers.

    16 bits keep some digits. After many layers of random weights, formats of eight or four bits
    have no digits in common with bf16, so they are not compared.
    """
    return 0.2 if format == "bf16" else math.inf


def enter(names: list[str], folder: Path, work: Path, dtype: torch.dtype) -> dict[str, Contender]:
    """Load contenders with the same weights.

    A contender that cannot run here is left out with a message. Raises ImportError or ValueError if
    the reference or the yardstick cannot run.
    """
    loaded: dict[str, Contender] = {}
    align: Aligner | None = None
    for name in names:
        entry = CONTENDERS[name]
        started = time.perf_counter()
        try:
            contender = entry.make(entry, write_source(folder, entry, work), align, dtype)
        except (ImportError, ValueError) as error:
            if name in (REFERENCE, YARDSTICK):
                raise
            print_progress(f"{name} is left out: {error}")
            continue
        print_progress(f"{name}: loaded in {time.perf_counter() - started:.1f} s")
        if name == REFERENCE:  # all contenders use W_a of the exact embeddings
            assert isinstance(contender, Minimas)
            align = contender.align = contender.lm.aligner("ridge")
        loaded[name] = contender
    return loaded


def fitting(names: list[str], config: Config, batch: int, context: int) -> list[str]:
    """Return the contenders that fit into the free memory together.

    Raises ValueError if they do not fit even without those in `SPARE`.
    """
    # The factor is for slots that a cache allocates in advance, the constant for scratch buffers.
    memory = 1.6 * batch * context * slot_bytes(config) + 2**27
    logits = 2 * batch * context * config.vocab_size  # the authors' prefill computes all of them
    available = proc_bytes("/proc/meminfo", "MemAvailable")
    kept = list(names)
    for spare in ("", *contenders.SPARE):
        kept = [name for name in kept if name != spare]
        own = [name for name in kept if name != "trunk-bf16"]  # shares the weights of authors-bf16
        weights = sum(contenders.stored_bytes(config, CONTENDERS[name]) for name in own)
        needed = weights + len(kept) * memory + logits + 2**30
        if needed <= available:
            print_progress(
                f"{len(kept)} contenders will need about {needed / 2**30:.0f} of "
                f"{available / 2**30:.0f} GiB"
            )
            return kept
    raise ValueError(
        f"found {available / 2**30:.1f} GiB of free memory, expected {needed / 2**30:.1f} for "
        f"{len(kept)} contenders together: choose fewer --contenders or smaller --batch-sizes"
    )


def slot_bytes(config: Config) -> int:
    """Return the bytes of one token's keys and values in 16 bits."""
    return 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process (0 if it was not used)."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def agree(result: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Return the relative difference between two results (B, …).

    Raises ValueError if it is larger than `tolerance` or not a number.
    """
    error = float((result.float() - expected.float()).norm() / expected.float().norm())
    if not error <= tolerance:  # also if the error is NaN
        raise ValueError(
            f"{what}: found a relative difference of {error:.1e}, expected at most {tolerance}"
        )
    return error


def bandwidth(repeats: int = 9) -> float:
    """Return the bytes per second of all threads together, in the fastest read of 512 MiB."""
    block = torch.ones(2**15, 2**12)
    readers: tuple[Callable[[], Tensor], ...] = (lambda: block.sum(), lambda: block @ block[0])
    seconds = []
    for _ in range(repeats):
        for reader in readers:
            started = time.perf_counter()
            reader()
            seconds.append(time.perf_counter() - started)
    return block.nbytes / min(seconds)
