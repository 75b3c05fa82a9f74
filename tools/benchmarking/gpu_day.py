"""Measure the speed on a GPU at the shapes of Qwen3-0.6B, 4B and 8B.

    python -m tools.benchmarking.gpu_day --out gpu_day.json
    python -m tools.benchmarking.gpu_day --rehearse           # tiny shapes on the CPU

tools/gpu_day.sh runs this module. The weights are random and made on the device, and the layers are
those that `load` makes. Every measurement has one row and 512 tokens of context. The share of the
bandwidth is the number of bytes that a step must read, divided by its time and by the speed of a
copy. A variant that does not fit into the memory or the time is left out with a message. One that
fails does not stop the others, whatever the error is. The JSON file is written after every variant.
This module does not use prompts or checkpoints.
"""

import argparse
import gc
import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from minimas import Aligner, Config, Qwen3
from minimas.core.checkpoint import fill
from minimas.fast.compiled import check_compiler, compile_steps
from minimas.fast.quantize import check, complete, replacement
from tools.shared.arguments import Parser, whole
from tools.shared.files import write_whole
from tools.shared.streams import print_progress

from .contenders import QWEN3_06B, STEPS, Authors, Minimas, weight_bytes
from .race import slot_bytes

SIZES = {  # hidden size, intermediate size, layers, query heads, tied embeddings or not
    "0.6B": (1024, 3072, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
TINY = {"tiny": (128, 192, 2, 16, True)}  # for a rehearsal
VARIANTS = (  # format, recorded steps or not; the most important variants come first
    ("bf16", True),
    ("transformers", False),
    ("bf16", False),
    ("q4", True),
    ("q8", True),
    ("q4", False),
    ("q8", False),
    ("nf4", False),
    ("int8", False),
)
UNITS = {"latent": "latent steps/s", "decode": "tokens/s", "prefill": "prompt tokens/s"}
ROUNDS = 7
LONGEST = 90  # seconds; a variant that has no result after 90 to 180 s is stopped
Record = dict[str, Any]
Variant = tuple[str, str, bool]  # size, format, recorded steps or not


def shape(size: str) -> Config:
    """Return the config of one of the sizes."""
    hidden, intermediate, layers, heads, tied = (SIZES | TINY)[size]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    if size in TINY:
        sizes |= {"vocab_size": 1024, "head_dim": 32}
    return Config.from_dict(QWEN3_06B | sizes | {"tie_word_embeddings": tied})


class RandomWeights:
    """A checkpoint for `fill`: entries of about 1 / sqrt(fan_in), made on the device."""

    def __init__(self, model: Qwen3, device: torch.device) -> None:
        self.shapes = {name: tuple(meta.shape) for name, meta in model.state_dict().items()}
        self.device = device

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return the tensor `key`. Vectors are gains, and have only ones."""
        size = self.shapes[key]
        if len(size) == 1:
            return torch.ones(size, dtype=dtype, device=self.device)
        return torch.randn(size, dtype=dtype, device=self.device).mul_(size[1] ** -0.5)

    def low_bits(self, key: str) -> str:
        """Return "", because no matrix is stored in 4 or 8 bits."""
        return ""


class OnDevice(Minimas):
    """minimas with random weights on a device, eager or with recorded steps."""

    def __init__(self, config: Config, format: str, recorded: bool, device: torch.device) -> None:
        quantize = None if format == "bf16" else format
        if quantize:
            check(quantize, device, torch.bfloat16)
        if recorded:
            check_compiler(device.type)
        with torch.device("meta"):
            model = Qwen3(config, f"random {format}")
        source = RandomWeights(model, device)
        replace = partial(replacement, source, device, torch.bfloat16, quantize)
        fill(model, source, device, torch.bfloat16, replace)
        complete(model, quantize)
        if recorded and device.type == "cuda":
            compile_steps(model)
        self.model = model.eval()
        self.align = Aligner.from_model(model)


class TransformersOnDevice(Authors):
    """The authors' method in transformers, with random weights on a device."""

    def __init__(self, config: Config, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, Qwen3Config

        fields = {name: getattr(config, name) for name in QWEN3_06B if hasattr(config, name)}
        fields = {k: v for k, v in fields.items() if k not in ("model_type", "dtype")}
        with device:
            made = AutoModelForCausalLM.from_config(Qwen3Config(**fields), dtype=torch.bfloat16)
        self.model: Any = made.eval()
        identity = torch.eye(config.hidden_size, device=device)
        self.align = Aligner(identity, 1.0)
        parameters = inspect.signature(self.model.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"

    def arguments(self, cache: Any, given: Tensor) -> Record:
        """Return the arguments as in `Authors`, with the mask on the device."""
        found = super().arguments(cache, given)
        return found | {"attention_mask": found["attention_mask"].to(given.device)}


def measure(
    config: Config, format: str, recorded: bool, device: torch.device, tokens: int
) -> dict[str, float]:
    """Return the seconds of a latent step, a decode step and a prompt token, and the peak bytes.

    Raises ImportError, ValueError or RuntimeError if the variant cannot run here.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    contender: Any
    if format == "transformers":
        contender = TransformersOnDevice(config, device)
    else:
        contender = OnDevice(config, format, recorded, device)
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)
    contender.start(ids)
    found = {}
    for task, count in (("latent", STEPS), ("decode", STEPS), ("prefill", tokens)):
        seconds = []
        for turn in range(2 + ROUNDS):  # the first two warm up, compile and record
            contender.rewind()
            synchronize(device)
            started = time.perf_counter()
            getattr(contender, task)(ids)
            synchronize(device)
            if turn > 1:
                seconds.append((time.perf_counter() - started) / count)
        found[task] = median(seconds)
    if device.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated(device)
    return found


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_speed(device: torch.device) -> float:
    """Return the bytes per second that the fastest of ten copies reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size / min(seconds)


def records(
    found: dict[str, float], size: str, format: str, recorded: bool, tokens: int, speed: float
) -> list[Record]:
    """Return one record per task: its speed, and for steps the share of the bandwidth."""
    config, made = shape(size), []
    sizes = weight_bytes(config, "bf16" if format == "transformers" else format)
    kv_cache = tokens * slot_bytes(config)
    for task, parts in Minimas.reads.items():
        record: Record = {"size": size, "format": format, "recorded": recorded, "task": task}
        record |= {"per_second": 1 / found[task], "milliseconds": found[task] * 1e3}
        if task != "prefill":
            read = sum(sizes[part] for part in parts) + kv_cache
            record |= {"bytes": read, "share": read / found[task] / speed}
        made.append(record | {"peak_bytes": found.get("peak")})
    return made


def aims(made: Sequence[Record]) -> list[str]:
    """Return lines of text that compare measurements with the aims.

    The aims are a share of the bandwidth in bf16, and a speed compared with transformers.
    """
    steps = {(r["size"], r["format"], r["recorded"]): r for r in made if r["task"] == "decode"}
    lines = []
    for size in ("4B", "8B"):
        if record := steps.get((size, "bf16", True)):
            share = f"{record['share']:.0%} of the bandwidth (aim: 60%)"
            lines.append(f"{size}, bf16, recorded: {share}")
    mine, theirs = (steps.get(("0.6B", *kind)) for kind in VARIANTS[:2])
    if mine and theirs:
        ratio = mine["per_second"] / theirs["per_second"]
        lines.append(
            f"0.6B, bf16, recorded: decodes {ratio:.1f} × as fast as transformers (aim: 3)"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every variant at every size.

    Returns 0, or 1 if there is no GPU or if a variant has failed.
    """
    parser = Parser("gpu_day", description="Speed on a GPU at the shapes of Qwen3.")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    text = "seconds after which no measurement begins (default: %(default)s)"
    parser.add_argument("--seconds", type=whole(1), default=420, help=text)
    parser.add_argument("--out", type=Path, default=Path("gpu_day.json"), metavar="FILE.json")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu_day: found no CUDA GPU, expected one, or --rehearse", file=sys.stderr)
        return 1
    day = measure_all(args)
    for line in (*day["left_out"], *aims(day["measured"])):
        print(line)
    return int(day["failed"])


def measure_all(args: argparse.Namespace) -> Record:
    """Measure all variants, the most important first. Returns what the file holds at the end.

    A child process measures them. After a variant that ends it or takes too long, a new one goes on
    with the next variant: once a kernel has failed, no other one runs in the same process. A
    variant that ended a process in which others had run is tried again, as the first of a new one.
    """
    began = time.perf_counter()
    sizes = TINY if args.rehearse else SIZES
    plan = [(size, *variant) for variant in VARIANTS for size in sizes]
    day: Record = {"measured": [], "left_out": [], "failed": False, "next": 0}
    save(args.out, day)
    while day["next"] < len(plan):
        left = args.seconds - (time.perf_counter() - began)
        child = get_context("spawn").Process(
            target=work_and_exit, args=(args.out, args.rehearse, plan, left)
        )
        child.start()
        before = -1
        while child.is_alive() and before != day["next"]:
            before = day["next"]
            child.join(LONGEST)
            day = load(args.out)
        child.kill()
        child.join()
        day = load(args.out)
        if child.exitcode and day["next"] == before:  # it could not record the failure itself
            problem = f"its process ended with status {child.exitcode} (-9: after {LONGEST} s)"
            fail(day, name_of(*plan[day["next"]]), problem)
            save(args.out, day)
    day["seconds"] = time.perf_counter() - began
    save(args.out, day)
    return day


def save(out: Path, day: Record) -> None:
    """Write everything that has been measured so far."""
    write_whole(out, json.dumps(day, indent=1) + "\n")


def load(out: Path) -> Record:
    """Return what `save` has written."""
    day: Record = json.loads(out.read_text(encoding="utf-8"))
    return day


def fail(day: Record, name: str, problem: str) -> None:
    """Record that a variant has failed."""
    day["failed"] = True
    day["left_out"].append(f"{name} has failed: {problem}")
    day["next"] += 1


def name_of(size: str, format: str, recorded: bool) -> str:
    """Return the name of a variant in messages."""
    return f"{size} {format}{' recorded' * recorded}"


def work(out: Path, rehearse: bool, plan: Sequence[Variant], seconds: float) -> None:
    """Measure the variants of the plan, from the file's "next" on, until one fails.

    The file is written after every variant.
    """
    began = time.perf_counter()
    device = torch.device("cpu" if rehearse else "cuda")
    day = load(out)
    if "copy_bytes_per_second" not in day:
        day["copy_bytes_per_second"] = copy_speed(device)
        print_progress(f"a copy reads and writes {day['copy_bytes_per_second'] / 1e9:,.0f} GB/s")
    day |= {
        "device": "cpu, rehearsed" if rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "context": 16 if rehearse else 512,
    }
    going = True
    while going and day["next"] < len(plan):
        left = seconds - (time.perf_counter() - began)
        going = one(day, plan[day["next"]], device, left)
        save(out, day)


def work_and_exit(*settings: Any) -> None:
    """Call `work` in a process of its own.

    The process ends at once, because after a failed kernel CUDA may crash or block at the normal
    end, which would be taken for a failure of the next variant.
    """
    work(*settings)
    os._exit(0)


def one(day: Record, variant: Variant, device: torch.device, seconds: float) -> bool:
    """Measure one variant and print it. Returns False if it has failed."""
    size, format, recorded = variant
    name, tokens = name_of(*variant), day["context"]
    try:
        if seconds < 0:
            raise TimeoutError("no time was left")
        with torch.no_grad():
            found = measure(shape(size), format, recorded, device, tokens)
    except (ImportError, TimeoutError, torch.OutOfMemoryError) as error:
        day["left_out"].append(f"{name} is left out: {' '.join(str(error).split()):.200}")
    except (RuntimeError, ValueError, TypeError) as error:
        fail(day, name, f"{' '.join(str(error).split()):.200}")
        return False
    else:
        new = records(found, size, format, recorded, tokens, day["copy_bytes_per_second"])
        day["measured"] += new
        for record in new:
            share = f", {record['share']:.0%} of the bandwidth" if "share" in record else ""
            speed = f"{record['per_second']:,.1f} {UNITS[record['task']]}"
            print(f"{name}: {speed}{share}", flush=True)
    day["next"] += 1
    gc.collect()  # frees the model of this variant before the next one is made
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return True


if __name__ == "__main__":
    sys.exit(main())
