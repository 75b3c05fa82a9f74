"""How fast minimas is beside the authors' way in transformers: one run, interleaved, medians and ratios, as Markdown.

    python tools/benchmark.py                          # random weights in the shape of Qwen3-0.6B
    python tools/benchmark.py --model FOLDER --rounds 9 --threads 2 --out benchmark.md

A round runs every contender once on each task, in an order that turns with the round, so that a machine that slows down
slows all of them. All of them compute the same function from the same bf16 weights; where their results differ by more
than bf16 explains, before the timing or after it, nothing is printed but the difference.

    latent step   hidden state -> aligned embedding -> trunk, the mean of `STEPS` steps behind `--context` tokens
    decode step   token -> trunk -> logits -> the most likely token, the same way
    prefill       `--context` tokens a row into an empty memory, until the last hidden state is there
    load          in processes of their own: from the folder to a model, its first forward and its peak memory

To add a contender write a class like `Minimas` and name it in `contenders`; to add a task, a method and a row of `TASKS`.

Does not: judge answers (random weights have none), sample, use a GPU, quantize or compile, or wait for a quiet machine: what
else runs is in every figure, and the load average at the start is printed.
"""

import argparse
import datetime
import inspect
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minimas import Aligner, Config, KVCache, Qwen3, load, think  # noqa: E402
from minimas.generate import read  # noqa: E402
from minimas.load import LM  # noqa: E402

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
STEPS = 4  # in one sample of a latent or decode step, so that a sample is longer than the clock's and scheduler's noise
TOLERANCE = 0.05  # relative error between two bf16 implementations, which round at other places in every layer
TASKS = {"latent": "latent step, ms", "decode": "decode step, ms", "prefill": "prefill, tokens/s"}
MiB = 2**20


# -- who is compared ---------------------------------------------------------------------------------------------------


class Minimas:
    """The library as its own agents use it: `read`, `think`, and a decoding loop."""

    name = "minimas"
    tasks = ("latent", "decode", "prefill")

    def __init__(self, lm: LM, align: Aligner) -> None:
        self.model, self.align = lm.model, align

    def start(self, ids: Tensor) -> None:
        """Read the context (B, T) into the memory that latent and decode steps continue."""
        self.cache = self.model.new_cache(len(ids))
        self.hidden = read(self.model, ids.tolist(), self.cache)  # (B, 1, D)
        self.filled = self.cache.lengths

    def rewind(self) -> None:
        """Forget all but the context. Slots behind `lengths` are free, so nothing is copied and no room is taken anew."""
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

    def bytes_read(self, task: str, weights: dict[str, int]) -> int:
        """Of the weights in one step: all but the embedding; the LM head only for a token, W_a only for a thought."""
        return weights["trunk"] + weights["head" if task == "decode" else "W_a"]


class Authors:
    """The way of LatentMAS's models.py (github.com/Gen-Verse/LatentMAS), on transformers' own model.

    The whole causal LM is called, with an all-ones mask, all hidden states and no `logits_to_keep`, so every latent step also
    computes logits that nobody reads, and a prefill those of every position. The hidden state is mapped in float32. Left out
    in their favour: copies of the thoughts, the sampling machinery of `generate`, and float32, which they choose on a CPU.
    """

    name = "transformers, the authors' way"
    tasks: tuple[str, ...] = ("latent", "decode", "prefill")

    def __init__(self, model: Any, align: Aligner) -> None:
        self.model, self.matrix, self.norm = model, align.matrix, align.norm
        # Renamed in transformers 5.24; the old name still works there, with a warning at every call.
        named = inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if "cache" in named else "past_key_values"

    def start(self, ids: Tensor) -> None:
        """As in `Minimas`."""
        self.cache, self.context = self.new_cache(), ids.shape[1]
        self.hidden = self.forward(self.cache, input_ids=ids)  # (B, D)

    def rewind(self) -> None:
        """Forget all but the context: a view; the next step's concatenation copies the layer, as it does at every step."""
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
        hidden = self.hidden
        for _ in range(STEPS):
            aligned = hidden.to(torch.float32) @ self.matrix
            aligned = aligned * (self.norm / aligned.norm(dim=-1, keepdim=True).clamp_min(1e-6))
            hidden = self.forward(self.cache, inputs_embeds=aligned.to(hidden.dtype)[:, None])
        return hidden

    def decode(self, ids: Tensor) -> Tensor:
        for token in ids[:, :STEPS].split(1, dim=1):
            logits = self.model(token, **self.arguments(self.cache, token), logits_to_keep=1).logits
            logits.argmax(-1).tolist()
        return logits[:, -1]  # type: ignore[no-any-return]

    def prefill(self, ids: Tensor) -> Tensor:
        return self.forward(self.new_cache(), input_ids=ids)

    def bytes_read(self, task: str, weights: dict[str, int]) -> int:
        return weights["trunk"] + weights["head"] + (weights["W_a"] if task == "latent" else 0)


class TrunkOnly(Authors):
    """The same without what the authors could leave out: no logits, no hidden states of other layers."""

    name = "transformers, trunk only"
    tasks = ("latent", "prefill")  # to decode, the logits are needed

    def forward(self, cache: Any, **inputs: Tensor) -> Tensor:
        [given] = inputs.values()
        return self.model.model(**inputs, **self.arguments(cache, given)).last_hidden_state[:, -1]  # type: ignore[no-any-return]

    def bytes_read(self, task: str, weights: dict[str, int]) -> int:
        return weights["trunk"] + weights["W_a"]


Contender = Minimas | Authors


def contenders(folder: Path) -> tuple[LM, list[Contender]]:
    """Everyone on the same weights: minimas loads the folder, transformers' model gets a copy of its state dict."""
    from transformers import AutoConfig, AutoModelForCausalLM

    lm = load(folder, device="cpu", dtype="bfloat16")
    align = lm.aligner("ridge")
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()
    state = lm.model.state_dict()
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # when tied
    theirs.load_state_dict(state)
    theirs.requires_grad_(False)
    return lm, [Minimas(lm, align), Authors(theirs, align), TrunkOnly(theirs, align)]


# -- the race ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One contender's samples of one task at one batch size."""

    task: str
    batch: int
    name: str
    seconds: list[float]  # a step, or a whole prefill
    bytes_read: int  # weights and memory of one step
    tokens: int  # of the prefill


def race(lm: LM, field: list[Contender], tasks: list[str], batch: int, context: int, rounds: int) -> list[Row]:
    """Time all contenders on all tasks, interleaved; raises ValueError when their results do not agree."""
    ids = torch.randint(lm.model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(batch))
    weights = weight_bytes(lm.model.config)
    memory = batch * context * lm.model.new_cache(1).slot_nbytes
    rows = [
        Row(task, batch, c.name, [], c.bytes_read(task, weights) + memory, batch * context)
        for task in tasks
        for c in field
        if task in c.tasks
    ]
    for c in field:
        c.start(ids)
    first = {(row.task, row.name): run(field, row, ids)[1] for row in rows}  # the warm-up, and what to agree on
    last = dict(first)
    for task in tasks:
        agree([(row.name, first[task, row.name]) for row in rows if row.task == task], f"{task}, batch {batch}")
    for turn in range(rounds):
        print(f"batch {batch}: round {turn + 1} of {rounds}", file=sys.stderr)
        for task in tasks:
            there = [row for row in rows if row.task == task]
            for row in there[turn % len(there) :] + there[: turn % len(there)]:
                seconds, last[task, row.name] = run(field, row, ids)
                row.seconds.append(seconds / (1 if task == "prefill" else STEPS))
    for key, result in last.items():  # a memory that was not rewound would show here
        agree([("first", first[key]), ("last round", result)], f"{key[0]}, batch {batch}, {key[1]}")
    return rows


def run(field: list[Contender], row: Row, ids: Tensor) -> tuple[float, Tensor]:
    """Rewind, untimed, and run one task once."""
    contender = next(c for c in field if c.name == row.name)
    contender.rewind()
    started = time.perf_counter()
    result: Tensor = getattr(contender, row.task)(ids)
    return time.perf_counter() - started, result


def agree(results: list[tuple[str, Tensor]], what: str) -> None:
    """Raise ValueError when a result is further from the first one than bf16 explains, or as far as another row is."""
    (reference, expected), *others = results
    expected = expected.float()
    for name, result in others:
        error = float((result.float() - expected).norm() / expected.norm())
        if not error <= TOLERANCE:  # NaN does not agree either
            raise ValueError(f"{what}: {name} differs from {reference} by {error:.2g}, expected {TOLERANCE} at most")
        print(f"{what}: {name} differs from {reference} by {error:.2g}", file=sys.stderr)


def weight_bytes(config: Config) -> dict[str, int]:
    """Bytes of the parts of a model that a step reads: "trunk" and "head" in bf16, "W_a" in float32."""
    with torch.device("meta"):
        state = Qwen3(config).state_dict()
    trunk = sum(t.numel() for name, t in state.items() if name.startswith(("model.layers.", "model.norm.")))
    head = config.vocab_size * config.hidden_size
    return {"trunk": 2 * trunk, "head": 2 * head, "W_a": 4 * config.hidden_size**2}


def bandwidth(repeats: int = 9) -> float:
    """Bytes a second that all threads together read from memory: the fastest of some reads of 512 MiB."""
    block = torch.ones(2**15, 2**12)
    readers: list[Callable[[], Tensor]] = [block.sum, lambda: block @ block[0]]
    seconds = []
    for reader in readers * repeats:
        started = time.perf_counter()
        reader()
        seconds.append(time.perf_counter() - started)
    return block.nbytes / min(seconds)


# -- loading -----------------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most so far (Linux; mapped files count)."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load_once(name: str, folder: Path, threads: int) -> dict[str, float]:
    """Load in this (fresh) process: seconds until the model is there, first and second forward, peak memory before each."""
    torch.set_num_threads(threads)
    token = torch.zeros(1, 1, dtype=torch.int64)
    forward: Callable[[], Any] | None = None
    if name == Authors.name:  # imported before the clock starts, as torch is
        from transformers import AutoModelForCausalLM
    before, started = resident("VmRSS"), time.perf_counter()
    if name == "plain read":
        kept = [path.read_bytes() for path in folder.glob("*.safetensors")]  # noqa: F841 (held until memory is measured)
    elif name == Minimas.name:
        model = load(folder, device="cpu", dtype="bfloat16").model
        forward = lambda: model.logits(model(model.embed(token)))  # noqa: E731
    else:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
        forward = lambda: theirs(token)  # noqa: E731
    result = {"load": time.perf_counter() - started, "peak": resident("VmHWM") - before}
    for which in ("first", "second") if forward else ():
        started = time.perf_counter()
        forward()
        result[which] = time.perf_counter() - started
    return result | {"peak, forward": resident("VmHWM") - before}


def load_all(folder: Path, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians of `load_once` for a plain read, minimas and transformers, interleaved, each time in a fresh process."""
    names = ["plain read", Minimas.name, Authors.name]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                result = process.submit(load_once, name, folder, threads).result()
            if turn:  # the first one brings the file into the page cache
                samples[name].append(result)
    return {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in samples.items()
    }


def write_random(folder: Path, layers: int) -> None:
    """A checkpoint with Qwen3-0.6B's shape and random bf16 weights, of a size that keeps states near 1."""
    raw = QWEN3_06B | {"num_hidden_layers": layers}
    with torch.device("meta"):
        state = Qwen3(Config.from_dict(raw)).state_dict()
    torch.manual_seed(0)
    for name, tensor in state.items():
        shape = tensor.shape
        state[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[1] ** -0.5
        state[name] = state[name].bfloat16()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


# -- the page ----------------------------------------------------------------------------------------------------------


def race_table(rows: list[Row], speed: float) -> list[str]:
    """One line a row: its median, how much faster minimas is (lowest to highest of the rounds), and the memory's limit."""
    lines = [
        "| | batch | | median | minimas is faster by | read a step | of the bandwidth |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours = next(r for r in rows if (r.task, r.batch, r.name) == (row.task, row.batch, Minimas.name))
        median = statistics.median(row.seconds)
        each = [theirs / mine for theirs, mine in zip(row.seconds, ours.seconds, strict=True)]
        ratio = f"{median / statistics.median(ours.seconds):.2f} × ({min(each):.2f} … {max(each):.2f})"
        value, read_, share = f"{row.tokens / median:.0f}", "", ""  # a prefill is bound by arithmetic, not by memory
        if row.task != "prefill":
            value, read_ = f"{median * 1e3:.1f}", f"{row.bytes_read / 1e9:.2f} GB"
            share = f"{row.bytes_read / median / speed:.0%}"
        ratio = "" if row is ours else ratio
        lines.append(f"| {TASKS[row.task]} | {row.batch} | {row.name} | {value} | {ratio} | {read_} | {share} |")
    return lines


def load_table(loads: dict[str, dict[str, float]], size: int) -> list[str]:
    """Seconds and peak memory of a plain read, minimas and transformers; the file holds `size` bytes."""
    plain = loads["plain read"]["load"]
    lines = [
        f"Weights of {size / MiB:,.0f} MiB, in the page cache. Peak memory is beyond what the imports took; mapped files count.", "",
        "| | load, s | of a plain read | first forward more than the second, s | peak, MiB | peak through the first forward, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, of in loads.items():
        packing = f"{of['first'] - of['second']:.2f}" if "first" in of else ""
        peaks = f"{of['peak'] / MiB:,.0f} | {of['peak, forward'] / MiB:,.0f}" if "first" in of else " | "
        lines.append(f"| {name} | {of['load']:.2f} | {of['load'] / plain:.2f} × | {packing} | {peaks} |")
    return lines


def machine() -> str:
    """The processor's name and how much of it there is."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    name = next((line.split(": ", 1)[1] for line in names if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="a folder with config.json and safetensors (default: random weights)"
    )
    parser.add_argument("--layers", type=int, default=28, help="of the random model; fewer for a quick look (28)")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens read before the steps, and by the prefill (512)"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=[*TASKS, "load"], default=[*TASKS, "load"])
    parser.add_argument("--out", type=Path, help="a file to write as well: .md the page, .json every sample")
    args = parser.parse_args()
    if min(args.layers, args.rounds, args.threads, *args.batch_sizes) < 1 or args.context < STEPS:
        parser.error(f"--layers, --rounds, --threads, --batch-sizes: expected 1 or more; --context: {STEPS} or more")
    torch.set_num_threads(args.threads)
    import transformers

    transformers.logging.disable_progress_bar()
    title = f"{args.model or 'random weights in the shape of Qwen3-0.6B'}, bf16, context {args.context}"
    title += f", {args.layers} layers" if args.layers != 28 and not args.model else ""
    page = [
        f"**{title}**, {args.rounds} rounds, {args.threads} threads. {machine()}; {datetime.date.today()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.",
        "", f"`{shlex.join(['python', *sys.argv])}`", "",
    ]  # fmt: skip
    tasks = [task for task in TASKS if task in args.only]
    rows: list[Row] = []
    loads: dict[str, dict[str, float]] = {}
    speed = bandwidth()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or Path(temporary)
        if args.model is None:
            write_random(folder, args.layers)
        if "load" in args.only:
            loads = load_all(folder, min(args.rounds, 5), args.threads)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        with torch.no_grad():
            lm, field = contenders(folder) if tasks else (None, [])
            for batch in args.batch_sizes if lm else ():
                rows += race(lm, field, tasks, batch, args.context, args.rounds)
    speed = max(speed, bandwidth())
    if rows:
        rows.sort(key=lambda row: list(TASKS).index(row.task))
        page += race_table(rows, speed)
        page += [
            "",
            f"Memory is read at {speed / 1e9:.1f} GB/s (the fastest of some reads of 512 MiB, before and after).",
        ]
    if loads:
        page += ["", *load_table(loads, size)]
    print("\n".join(page))
    if args.out:
        data = {"page": page, "bytes_per_second": speed, "rows": [row._asdict() for row in rows], "load": loads}
        text = json.dumps(data, indent=1) if args.out.suffix == ".json" else "\n".join(page) + "\n"
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmark: {error}") from error
