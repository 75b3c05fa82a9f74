"""Measure how keys and values in 8 bits change the loss of the right solution.

    python tools/memory_bits.py FOLDER --data gsm8k_test.jsonl --limit 16

Each question is prefilled, and its KV cache is rounded to 8-bit integers. There is one scale per
vector of d numbers (the largest absolute value divided by 127), or one per channel of a head over
all slots. Then the agent of `single` is asked for the solution, and the loss of the right solution
is measured after the rounded and after the unchanged cache. The two are compared question by
question with a paired bootstrap. The result of each question is printed on stderr. Exit status: 0
done, 1 failed, 2 wrong usage.

    K key-value heads   S slots   d head size
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's tools and minimas

import torch
from torch import Tensor

from minimas import LM, load, remember
from tools.evaluation.grading import gold_text
from tools.evaluation.last_turn import text_turn
from tools.evaluation.rows import Row, read_rows
from tools.evaluation.stats import bootstrap
from tools.shared.arguments import FAILURES, Parser, print_error, whole
from tools.shared.streams import run_command

ASKED = "Solve the problem that you were given."
VECTOR, CHANNEL = -1, -2  # the dimension of (K, S, d) along which a scale is shared
# The dimension for keys and the one for values. None leaves them unchanged.
ROUNDINGS: dict[str, tuple[int | None, int | None]] = {
    "as computed": (None, None),
    "8 bits": (VECTOR, VECTOR),
    "8 bits, keys alone": (VECTOR, None),
    "8 bits, values alone": (None, VECTOR),
    "8 bits, a scale for each channel of the keys": (CHANNEL, VECTOR),
}


def rounded(x: Tensor, dim: int | None) -> Tensor:
    """Return `x` (K, S, d) rounded to 8 bits, with a scale shared along `dim` (None: unchanged)."""
    if dim is None:
        return x
    scale = x.float().abs().amax(dim, keepdim=True).clamp(min=1e-30) / 127
    return ((x / scale).round() * scale).to(x.dtype)


def losses(lm: LM, row: Row) -> list[float]:
    """Return the loss per token of a row's solution for each of `ROUNDINGS`."""
    memory = remember(lm, row["question"]).select([0] * len(ROUNDINGS))
    for b, dims in enumerate(ROUNDINGS.values()):
        for stores, dim in zip((memory.keys, memory.values), dims, strict=True):
            for store in stores:
                store[b] = rounded(store[b], dim)
    asked = [ASKED] * len(ROUNDINGS)
    turn = text_turn(lm, asked, None, kind="math", memory=memory)
    return [loss.mean for [loss] in turn.losses([[gold_text(row)]] * len(asked))]


def report(found: list[list[float]]) -> list[str]:
    """Return the lines of a Markdown table. `found` has the result of `losses` per question."""
    lines = [
        f"| {len(found)} questions | loss per token | difference, 95 % | largest |",
        "|---|--:|--:|--:|",
    ]
    for i, name in enumerate(ROUNDINGS):
        each = [one[i] for one in found]
        differences = [one[i] - one[0] for one in found]
        mean, low, high = bootstrap(differences)
        largest = max(differences, key=abs)
        interval = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(f"| {name} | {sum(each) / len(each):.4f} | {interval} | {largest:+.4f} |")
    return lines


def main() -> int:
    """Run the command line. Returns 0 if done, 1 if failed."""
    top = Parser("memory_bits", description=(__doc__ or "").partition("\n")[0])
    top.add_argument("model", metavar="FOLDER")
    about = "questions with answers, and solutions if known"
    top.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl", help=about)
    top.add_argument("--limit", type=whole(1), help="number of questions (default: all)")
    args = top.parse_args()
    found: list[list[float]] = []
    try:
        rows, lm = read_rows(args.data)[: args.limit], load(args.model)
        with torch.inference_mode():
            for row in rows:
                found.append(losses(lm, row))
                print(row["id"], *found[-1], file=sys.stderr, flush=True)
    except FAILURES as error:
        print_error("memory_bits", error)
        return 1
    print("\n".join(report(found)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("memory_bits", main))
