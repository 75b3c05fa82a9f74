"""How fast minimas is beside the authors' way in transformers: one run, interleaved, medians and ratios, as Markdown.

    python tools/benchmark.py                          # random weights in the shape of Qwen3-0.6B
    python tools/benchmark.py --model FOLDER --rounds 9 --threads 2 --out benchmark.md

A round runs every contender once, in an order that turns with the round, so that a machine that slows down slows all.
All compute the same function from the same weights: results that differ by more than float32 explains before the
timing, or by more than bf16 explains in any round, are an error, and no table is printed.

    latent step   hidden state -> aligned embedding -> trunk; the mean of `STEPS` steps behind `--context` tokens
    decode step   token -> trunk -> logits -> the most likely token; the same way
    prefill       `--context` tokens a row into an empty memory, until the last hidden state is there
    load          in fresh processes: from the folder to a model, its first forward, its peak memory (Linux)

A new contender is a class like `Minimas`, named in `contenders`; a new task is a method and a row of `TASKS`.

Does not: judge answers, sample, use a GPU, quantize, compile, or wait for a quiet machine: what else runs is in every
figure, and the load average before the run is printed.
"""

import argparse
import datetime
import inspect
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minimas import Aligner, Config, Qwen3, load, think  # noqa: E402
from minimas.generate import read  # noqa: E402

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
STEPS = 4  # in one sample, so that it is long beside the scheduler's noise, and the memory hardly longer at its end
TASKS = {"latent": "latent step, ms", "decode": "decode step, ms", "prefill": "prefill, tokens/s"}
PLAIN, MiB = "plain read", 2**20


# -- who is compared ---------------------------------------------------------------------------------------------------


class Minimas:
    """The library as its own agents use it: `read`, `think`, and a decoding loop."""

    name = "minimas"
    # Of the weights in each task: all but the embedding; the LM head for a token only, W_a for a thought only.
    reads: ClassVar[dict[str, tuple[str, ...]]] = {
        "latent": ("trunk", "W_a"), "decode": ("trunk", "head"), "prefill": ("trunk",),
    }  # fmt: skip

    def __init__(self, model: Qwen3, align: Aligner) -> None:
        self.model, self.align = model, align

    def start(self, ids: Tensor) -> None:
        """Read the context (B, T) into the memory that latent and decode steps continue."""
        self.cache = self.model.new_cache(len(ids))
        self.hidden = read(self.model, ids.tolist(), self.cache)  # (B, 1, D)
        self.filled = self.cache.lengths

    def rewind(self) -> None:
        """Forget all but the context: slots behind `lengths` are free, so nothing is copied."""
        self.cache.lengths = self.filled

    def latent(self, ids: Tensor) -> Tensor:
        return think(self.model, self.align, self.hidden, self.cache, STEPS)[1][:, -1]  # (B, D)

    def decode(self, ids: Tensor) -> Tensor:
        for token in ids[:, :STEPS].split(1, dim=1):  # (B, 1)
            logits = self.model.logits(self.model(self.model.embed(token), self.cache))  # (B, 1, V)
            logits.argmax(-1).tolist()  # the next token is not fed: a close call may differ between contenders
        return logits[:, -1]

    def prefill(self, ids: Tensor) -> Tensor:
        return read(self.model, ids.tolist(), self.model.new_cache(len(ids)))[:, -1]


class Authors:
    """The way of LatentMAS's models.py (github.com/Gen-Verse/LatentMAS), on transformers' own model.

    They call the whole causal LM, with a mask of ones, every layer's hidden states and no `logits_to_keep`: each latent
    step also computes logits that nobody reads, and a prefill the logits of every position. The state is mapped in
    float32, by a matrix even where it is the identity. Left out in their favour: copies of the thoughts, the sampling
    machinery of `generate`, and float32, which they choose on a CPU.
    """

    name = "transformers, the authors' way"
    reads: ClassVar[dict[str, tuple[str, ...]]] = {
        "latent": ("trunk", "head", "W_a"), "decode": ("trunk", "head"), "prefill": ("trunk", "head"),
    }  # fmt: skip

    def __init__(self, model: Any, align: Aligner) -> None:
        self.model, self.align = model, align
        # transformers 5.24 calls it `cache`, and warns at every call that uses the older name.
        self.cache_argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def start(self, ids: Tensor) -> None:
        """As in `Minimas`."""
        self.cache, self.context = self.new_cache(), ids.shape[1]
        self.hidden = self.forward(self.cache, input_ids=ids)  # (B, D)

    def rewind(self) -> None:
        """Forget all but the context: a view; the next step copies the layer, as each one does."""
        if extra := self.cache.get_seq_length() - self.context:
            self.cache.crop(-extra)

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def arguments(self, cache: Any, given: Tensor) -> dict[str, Any]:
        """What every call carries besides its new positions `given` (B, T, …)."""
        mask = torch.ones(len(given), cache.get_seq_length() + given.shape[1], dtype=torch.int64)
        return {"attention_mask": mask, self.cache_argument: cache, "use_cache": True}

    def forward(self, cache: Any, **inputs: Tensor) -> Tensor:
        """The last position's state after the final norm, (B, D), of `input_ids` or `inputs_embeds`."""
        [given] = inputs.values()
        output = self.model(**inputs, **self.arguments(cache, given), output_hidden_states=True, return_dict=True)
        return output.hidden_states[-1][:, -1]  # type: ignore[no-any-return]

    def latent(self, ids: Tensor) -> Tensor:
        hidden, matrix, norm = self.hidden, self.align.matrix, self.align.norm
        assert matrix is not None and norm is not None  # the ridge map has both
        for _ in range(STEPS):
            aligned = hidden.to(torch.float32) @ matrix
            aligned = aligned * (norm / aligned.norm(dim=-1, keepdim=True).clamp_min(1e-6))
            hidden = self.forward(self.cache, inputs_embeds=aligned.to(hidden.dtype)[:, None])
        return hidden

    def decode(self, ids: Tensor) -> Tensor:
        for token in ids[:, :STEPS].split(1, dim=1):
            logits = self.model(token, **self.arguments(self.cache, token), logits_to_keep=1).logits
            logits.argmax(-1).tolist()
        return logits[:, -1]  # type: ignore[no-any-return]

    def prefill(self, ids: Tensor) -> Tensor:
        return self.forward(self.new_cache(), input_ids=ids)


class TrunkOnly(Authors):
    """The same without what the authors could leave out: no logits, no hidden states of other layers."""

    name = "transformers, trunk only"
    # to decode, the logits are needed
    reads: ClassVar[dict[str, tuple[str, ...]]] = {"latent": ("trunk", "W_a"), "prefill": ("trunk",)}

    def forward(self, cache: Any, **inputs: Tensor) -> Tensor:
        [given] = inputs.values()
        states: Tensor = self.model.model(**inputs, **self.arguments(cache, given)).last_hidden_state
        return states[:, -1]


Contender = Minimas | Authors


def contenders(folder: Path, dtype: torch.dtype) -> list[Contender]:
    """Everyone on the same weights: minimas loads the folder, transformers' model gets a copy of its state dict."""
    from transformers import AutoConfig, AutoModelForCausalLM

    lm = load(folder, device="cpu", dtype=dtype)
    align = lm.aligner("ridge")
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
    state = lm.model.state_dict()
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # when tied
    theirs.load_state_dict(state)
    return [Minimas(lm.model, align), Authors(theirs, align), TrunkOnly(theirs, align)]


# -- the race ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One contender's samples of one task at one batch size."""

    task: str
    batch: int
    name: str
    seconds: list[float]  # a step, or a token of the prefill
    bytes_read: int  # weights and memory of one step


def race(
    field: list[Contender], tasks: list[str], batch: int, context: int, rounds: int, tolerance: float
) -> list[Row]:
    """Time all contenders on all tasks, interleaved; raises ValueError when their results do not agree."""
    model = field[0].model
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(batch))
    sizes, memory = weight_bytes(model.config), batch * context * model.new_cache(1).slot_nbytes

    def run(contender: Contender, task: str) -> tuple[float, Tensor]:
        contender.rewind()
        started = time.perf_counter()
        result: Tensor = getattr(contender, task)(ids)
        return time.perf_counter() - started, result

    for contender in field:
        contender.start(ids)
    rows: list[Row] = []
    for task in tasks:
        there = [c for c in field if task in c.reads]
        first = [run(c, task)[1] for c in there]  # the warm-up
        for c, result in zip(there, first, strict=True):
            error = agree(result, first[0], tolerance, f"{task}, batch {batch}: {c.name} against {there[0].name}")
            print(f"{task}, batch {batch}: {c.name} differs by {error:.1e}", file=sys.stderr)
        new = [Row(task, batch, c.name, [], sum(sizes[part] for part in c.reads[task]) + memory) for c in there]
        for turn in range(rounds):
            for place in range(len(there)):
                which = (turn + place) % len(there)
                seconds, result = run(there[which], task)
                new[which].seconds.append(seconds / (batch * context if task == "prefill" else STEPS))
                agree(result, first[which], tolerance, f"{task}, batch {batch}: {there[which].name}, round {turn + 1}")
        rows += new
    return rows


def agree(result: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """The relative difference of two results (B, …); raises ValueError when it is more than rounding explains."""
    error = float((result.float() - expected.float()).norm() / expected.float().norm())
    if not error <= tolerance:  # NaN does not agree either
        raise ValueError(f"{what}: found a relative difference of {error:.1e}, expected {tolerance:.0e} at most")
    return error


def weight_bytes(config: Config) -> dict[str, int]:
    """Bytes of the parts of a model that a step reads: "trunk" and "head" in bf16, "W_a" in float32."""
    with torch.device("meta"):
        state = Qwen3(config).state_dict()
    trunk = sum(t.numel() for name, t in state.items() if name.startswith(("model.layers.", "model.norm.")))
    head = config.vocab_size * config.hidden_size
    return {"trunk": 2 * trunk, "head": 2 * head, "W_a": 4 * config.hidden_size**2}


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


# -- loading -----------------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """Bytes of this process in memory, mapped files included: "VmRSS" now, "VmHWM" at most so far (Linux)."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load_once(name: str, folder: Path, threads: int) -> dict[str, float]:
    """Load in this (fresh) process: seconds for that and for two forwards of a token, peak memory after each."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    with torch.device("meta"):  # imports the model's code before the clock starts, as torch is
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    torch.set_num_threads(threads)
    token = torch.zeros(1, 1, dtype=torch.int64)
    loaders: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: [path.read_bytes() for path in folder.glob("*.safetensors")],
        Minimas.name: lambda: load(folder, device="cpu", dtype="bfloat16").model,
        Authors.name: lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
    }
    before, started = resident("VmRSS"), time.perf_counter()
    model = loaders[name]()
    result = {"load": time.perf_counter() - started, "peak": resident("VmHWM") - before}
    for which in ("first", "second") if name != PLAIN else ():
        started = time.perf_counter()
        with torch.no_grad():
            model.logits(model(model.embed(token))) if name == Minimas.name else model(token)
        result[which] = time.perf_counter() - started
    return result | {"peak, forward": resident("VmHWM") - before}


def load_all(folder: Path, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians of `load_once`, interleaved, each time in a fresh process; an extra first round warms the page cache."""
    samples: dict[str, list[dict[str, float]]] = {PLAIN: [], Minimas.name: [], Authors.name: []}
    for turn in range(rounds + 1):
        print(f"load: round {turn} of {rounds}", file=sys.stderr)
        for name, results in samples.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                results.append(process.submit(load_once, name, folder, threads).result())
    return {name: {key: median(r[key] for r in rs[1:]) for key in rs[0]} for name, rs in samples.items()}


def write_random(folder: Path, layers: int) -> None:
    """A checkpoint in the shape of Qwen3-0.6B with random bf16 weights, of a size that keeps activations near 1."""
    raw = QWEN3_06B | {"num_hidden_layers": layers}
    with torch.device("meta"):
        state = Qwen3(Config.from_dict(raw)).state_dict()
    torch.manual_seed(0)
    for name, meta in state.items():
        weight = torch.ones(meta.shape) if meta.ndim == 1 else torch.randn(meta.shape) * meta.shape[1] ** -0.5
        state[name] = weight.bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


# -- the page ----------------------------------------------------------------------------------------------------------


def race_table(rows: list[Row], speed: float) -> list[str]:
    """One line a row; the ratio is that of the medians, in brackets the rounds' lowest and highest."""
    lines = [
        "| | batch | | median | minimas is faster by | reads | of the bandwidth |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours = next(r for r in rows if (r.task, r.batch, r.name) == (row.task, row.batch, Minimas.name))
        each = [theirs / mine for theirs, mine in zip(row.seconds, ours.seconds, strict=True)]
        time_ = median(row.seconds)
        ratio = "" if row is ours else f"{time_ / median(ours.seconds):.2f} × ({min(each):.2f} … {max(each):.2f})"
        value, reads = f"{time_ * 1e3:.1f}", f"{row.bytes_read / 1e6:,.0f} MB | {row.bytes_read / time_ / speed:.0%}"
        if row.task == "prefill":  # bound by arithmetic, not by memory
            value, reads = f"{1 / time_:.0f}", " | "
        lines.append(f"| {TASKS[row.task]} | {row.batch} | {row.name} | {value} | {ratio} | {reads} |")
    return [
        *lines,
        "",
        f"Memory is read at {speed / 1e9:.1f} GB/s (the fastest of 36 reads, before and after).",
    ]


def load_table(loads: dict[str, dict[str, float]], size: int) -> list[str]:
    """One line for each way to load `size` bytes of weights."""
    lines = [
        "", f"Loading {size / MiB:,.0f} MiB from the page cache. Peak memory is what comes on top of the imports.", "",
        "| | load, s | of a plain read | first forward beyond the second, s | peak, MiB | peak with forward, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, of in loads.items():
        extra = f"{of['first'] - of['second']:.2f}" if name != PLAIN else ""  # minimas packs its matrices there
        peaks = f"{of['peak'] / MiB:,.0f} | {of['peak, forward'] / MiB:,.0f}"
        lines.append(f"| {name} | {of['load']:.2f} | {of['load'] / loads[PLAIN]['load']:.2f} × | {extra} | {peaks} |")
    return lines


def heading(args: argparse.Namespace) -> list[str]:
    """What was run, where, when and how."""
    what = args.model or f"Random weights in the shape of Qwen3-0.6B, {args.layers} of 28 layers"
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(": ", 1)[1] for line in cpuinfo if line.startswith("model name")), platform.machine())
    return [
        f"**{what}**, bf16, context {args.context}, {args.rounds} rounds, {args.threads} threads on {cpu} with "
        f"{os.cpu_count()} cores (load average {os.getloadavg()[0]:.1f} before), {datetime.date.today()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}:",
        "", f"    {shlex.join(['python', *sys.argv])}", "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a folder with config.json and safetensors; default: random weights")
    parser.add_argument("--layers", type=int, default=28, help="of the random model; fewer for a quick look")
    parser.add_argument("--context", type=int, default=512, help="tokens before the steps, and of the prefill")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=[*TASKS, "load"], default=[*TASKS, "load"])
    parser.add_argument("--out", type=Path, help="also write this file: .json every sample, any other suffix the page")
    args = parser.parse_args()
    if min(args.layers, args.rounds, args.threads, *args.batch_sizes) < 1 or args.context < STEPS:
        parser.error(f"expected 1 or more of everything, and a --context of {STEPS} or more")
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model: found no config.json in {args.model}")
    torch.set_num_threads(args.threads)
    page, rows, loads, speed = heading(args), [], {}, bandwidth()
    tasks = [task for task in TASKS if task in args.only]
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = args.model or Path(temporary)
        if not args.model:
            write_random(folder, args.layers)
        if "load" in args.only:
            loads = load_all(folder, min(args.rounds, 5), args.threads)
        if tasks:  # in float32 first: bf16 alone, whose rounding grows from step to step, would hide a mistake
            race(contenders(folder, torch.float32), tasks, 2, min(args.context, 64), 0, tolerance=1e-3)
            field = contenders(folder, torch.bfloat16)
            for batch in args.batch_sizes:
                rows += race(field, tasks, batch, args.context, args.rounds, tolerance=0.2)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    speed = max(speed, bandwidth())
    page += race_table(rows, speed) if rows else []
    page += load_table(loads, size) if loads else []
    print("\n".join(page))
    if args.out:
        samples = {"page": page, "rows": [row._asdict() for row in rows], "load": loads, "bytes_per_second": speed}
        text = json.dumps(samples, indent=1) if args.out.suffix == ".json" else "\n".join(page)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmark: {error}") from error
