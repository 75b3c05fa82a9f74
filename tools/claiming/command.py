"""The command line of tools/claims.py: flags, the claims by name, and the files that it writes.

This module does not depend on how a claim is measured or drawn.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.evaluation.drawing import draw
from tools.shared.arguments import FAILURES, Parser, print_error, whole
from tools.shared.files import write_whole

from . import alignment, complexity, costs, depth, errors, expressiveness, geometry, lossless
from .drawing import DRAWN
from .setting import Finding, Setting


class Claim(NamedTuple):
    """What is checked, in one line, and the function that measures it."""

    checks: str
    measure: Callable[[Setting], Finding]


CLAIMS = {
    "expressiveness": Claim(
        "how many random tokens a probe reads out of one thought, compared with d_h / log2 V",
        expressiveness.measure,
    ),
    "complexity": Claim(
        "FLOPs and seconds of thoughts and of text, by prompt tokens, and the prefill's share",
        complexity.measure,
    ),
    "depth": Claim("accuracy or gold NLL with 0 to 80 thoughts", depth.measure),
    "alignment": Claim(
        "the maps ridge, identity, none and random, on the model and on an untied twin of it",
        alignment.measure,
    ),
    "overlap": Claim(
        "whether thoughts lie among the tokens of text agents, and are nearest to the right ones",
        geometry.measure_overlap,
    ),
    "drift": Claim(
        "norms and cosines of 80 thoughts, step by step, for four maps", geometry.measure_drift
    ),
    "errors": Claim(
        "flips and recoveries after a wrong plan of the first agent, by text and by thoughts",
        errors.measure,
    ),
    "speed": Claim("seconds compared with text agents and a single agent", costs.measure_speed),
    "tokens": Claim("tokens compared with text agents and a single agent", costs.measure_tokens),
    "lossless": Claim(
        "whether a handed-over KV cache equals the same inputs fed again, in float64",
        lossless.measure,
    ),
}


class ListAction(argparse.Action):
    """Prints the claims and exits."""

    def __call__(self, *_: Any, **__: Any) -> None:
        width = max(map(len, CLAIMS))
        for name, claim in CLAIMS.items():
            print(f"{name:<{width}}  {claim.checks}")
        raise SystemExit(0)


def parser() -> Parser:
    """Return the parser of the command line."""
    about = "Measure a claim of the paper, and write its numbers, a picture and one sentence."
    top = Parser("claims", description=about, allow_abbrev=False)
    add = top.add_argument
    add("name", choices=(*CLAIMS, "all"), metavar="NAME", help="a name from --list, or all")
    add("--list", action=ListAction, nargs=0, help="print the names and what each checks")
    add("--model", "-m", default="weights/tiny", help="(default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for claims-NAME.*")
    built_in = "questions with answers (default: new ones of its task for weights/tiny, else six)"
    add("--data", type=Path, metavar="FILE.jsonl", help=built_in)
    limit = "number of questions; expressiveness uses 20 sequences for each (default: the claim's)"
    add("--limit", type=whole(1), help=limit)
    add("--batch-size", type=whole(1), default=50, help="(default: %(default)s)")
    tokens = "maximum number per answer (default: 24 for weights/tiny, else 256)"
    add("--max-new-tokens", type=whole(1), help=tokens)
    add("--seed", type=whole(0), default=0, help="seed of all random draws (default: %(default)s)")
    add("--dtype", default="auto")
    add("--device", default="auto")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 if done, 1 if failed."""
    args = vars(parser().parse_args(argv))
    name, out = args.pop("name"), args.pop("out")
    args.pop("list")
    try:
        check_can_write(out)
        setting = Setting(**args)
        for one in CLAIMS if name == "all" else [name]:
            measure(one, setting, out)
    except FAILURES as error:
        print_error("claims", error)
        return 1
    return 0


def check_can_write(out: Path) -> None:
    """Make the folder and check that it can be written to. Raises OSError naming the folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        problem = f"{out} (--out): found no folder that can be written ({error.strerror})"
        raise OSError(problem) from error


def measure(name: str, setting: Setting, out: Path) -> None:
    """Measure one claim, print its sentence, and write its numbers and its picture."""
    claim, start = CLAIMS[name], time.perf_counter()
    print(f"claims: {name}: {claim.checks}", file=sys.stderr)
    finding = claim.measure(setting)
    sentence = f"{name}: {setting.name}: {finding.verdict}. {finding.sentence}"
    record = {
        "what": name,
        "checks": claim.checks,
        "model": setting.name,
        "verdict": finding.verdict,
        "sentence": sentence,
        "settings": setting.settings(),
        "seconds": time.perf_counter() - start,
    }
    figure = record | finding.figures
    path = out / f"claims-{name}"
    text = json.dumps(figure, ensure_ascii=False) + "\n"
    write_whole(path.with_name(path.name + ".json"), text)
    print(sentence)
    draw(figure, path, DRAWN)
