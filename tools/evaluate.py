"""Run methods and their control arms over a task, lose nothing, and say what came of it.

    python tools/evaluate.py --data questions.jsonl --method single,latent_mas --latent-steps 0,6 --out runs/tiny
    python tools/evaluate.py --task gsm8k --limit 40 --metric nll --audit --out runs/audit
    torchrun --nproc-per-node 2 tools/evaluate.py … --out runs/tiny        # ranks take whole batches, round robin
    python tools/evaluate.py --out runs/tiny --replay q-17                 # the same answer again? if not, since when?
    python tools/evaluate.py --out runs/tiny --regrade                     # judge the texts of a run anew

A list, with commas, makes a grid. `DIR/results*.jsonl` has a head with every setting and one line for each question,
arm and seed; the same command goes on where it stopped. `DIR/summary.json` and `.md` are made from it at the end.
Status: 0 done, 1 failed (or a replay that differs), 2 usage, 130 stopped by Ctrl-C; what is done is kept.

Does not know: how a method works, how a loss is computed (arms.py, nll.py), what a file holds (ledger.py, tasks.py).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # minimas from the checkout

import torch  # noqa: E402
from arms import METHODS, METRICS, Arm, Bench, Grader, Row, grid, judge, plain_grader, same_mark  # noqa: E402
from feeders import FILE, Feeders, parse  # noqa: E402
from ledger import (  # noqa: E402
    Key,
    Ledger,
    Record,
    check,
    files,
    key_of,
    lock,
    read_head,
    records,
    take_up,
    write_whole,
)
from stats import bootstrap, by_question, share  # noqa: E402
from tasks import code_program, kind_of, load_task, read_rows  # noqa: E402
from torch import distributed  # noqa: E402

import minimas  # noqa: E402
from minimas.agents import TRANSFERS  # noqa: E402
from minimas.fast.quantize import FORMATS  # noqa: E402
from minimas.teams import LAYOUTS, TEAMS, Team  # noqa: E402

NOT_SETTINGS = {"out", "replay", "regrade", "debug", "quiet", "data_dir", "data"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"evaluate: error: {message}\n")


def several(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of a flag's value: one or more, with commas."""

    def values(text: str) -> list[Any]:
        try:
            return [convert(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                str(error).partition(": ")[2] or f"found {text!r}"
            ) from error

    return values


def one_of(names: Sequence[str], also: str = "") -> Callable[[str], str]:
    def name(text: str) -> str:
        if text not in names and not (also and text.endswith(also)):
            raise ValueError(
                f"value: found {text!r}, expected {', '.join([*names, *[f'FILE{also}'] * bool(also)])}"
            )
        return text

    return name


def whole(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise ValueError(f"value: found {text!r:.40}, expected a whole number, {low} or more")
        return int(text)

    return number


def kind_of_map(text: str) -> str:
    parse(text)
    return text


def yes_no(text: str) -> bool:
    return {"yes": True, "no": False}[one_of(("yes", "no"))(text)]


def single_value(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: several(lambda part: convert(text))(text)[0]


def parser() -> Parser:
    top = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = top.add_argument
    add(
        "--model",
        "-m",
        default="weights/tiny",
        help="folder, hub id or .gguf file (default: %(default)s)",
    )
    add("--task", help="a benchmark by name, see tools/tasks.py")
    add("--data", type=Path, metavar="FILE.jsonl", help="or questions of one's own")
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="where tools/download.py has put the tasks' files",
    )
    add(
        "--method",
        type=several(one_of(METHODS)),
        default=["latent_mas"],
        help="list: single, text_mas, latent_mas",
    )
    add("--team", type=several(one_of(tuple(TEAMS), ".json")), default=["sequential"], help="list")
    add(
        "--latent-steps", type=several(whole(0)), default=[None], help="list (default: the model's)"
    )
    add("--align", type=several(kind_of_map), default=["ridge"], help="list, see tools/feeders.py")
    add("--transfer", type=several(one_of(TRANSFERS)), default=["full"], help="list")
    add(
        "--close",
        type=several(yes_no),
        default=[True],
        help="list: yes, no; whether agents' turns are closed",
    )
    add(
        "--layout",
        type=several(one_of(LAYOUTS)),
        default=[None],
        help="list: turn, chat (default: the team's own)",
    )
    add(
        "--prefix",
        type=several(str),
        default=[None],
        help="list of texts before an agent's thoughts",
    )
    add(
        "--metric",
        type=several(one_of(METRICS)),
        help="list: accuracy, nll (default: accuracy; of an audit both)",
    )
    add("--seeds", type=several(whole(0)), default=[0], help="list")
    add(
        "--samples",
        type=single_value(whole(1)),
        help="answers of a single agent to vote on (default: 1)",
    )
    add("--limit", type=single_value(whole(1)), help="so many questions")
    add("--batch-size", type=single_value(whole(1)), default=8, help="(default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="(default: greedy)")
    add("--top-p", type=float, default=1.0)
    add("--max-new-tokens", type=single_value(whole(1)), default=256, help="(default: %(default)s)")
    add("--fit-text", type=Path, metavar="FILE", help="plain text for the maps mean and fitted")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add(
        "--quantize", choices=FORMATS, help="weights in 4 or 8 bits (default: as the file has them)"
    )
    add(
        "--run-untrusted-code",
        action="store_true",
        help="grade code by running it in tools/sandbox.py",
    )
    add(
        "--audit",
        action="store_true",
        help="all control arms, diagnostics and a verdict; see tools/audit.py",
    )
    add(
        "--arms",
        type=several(str),
        metavar="NAMES",
        help="list: of an audit these arms only (default: all)",
    )
    add("--out", type=Path, required=True, metavar="DIR")
    add("--replay", metavar="ID", help="repeat one question of a run")
    add("--regrade", action="store_true", help="grade a finished run again")
    add("--debug", action="store_true", help="show a traceback with an error")
    add("--quiet", action="store_true", help="no progress on stderr")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.metric = args.metric or (["nll", "accuracy"] if args.audit else ["accuracy"])
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if args.replay or args.regrade:
            from_head(args)
        evaluation = Evaluation(args, rank, ranks)
        if args.replay:
            return evaluation.replay(args.replay)
        if args.regrade:
            evaluation.regrade()
        else:
            evaluation.run()
        return 0 if rank or evaluation.report() or args.regrade else 1
    except KeyboardInterrupt:
        print(
            f"\nevaluate: stopped; {args.out} keeps what is done, and the same command goes on",
            file=sys.stderr,
        )
        return 130
    except (OSError, ValueError, ImportError, MemoryError, RuntimeError) as error:
        if args.debug:
            raise
        print(
            f"evaluate: error: {' '.join(str(error).split()) or type(error).__name__}",
            file=sys.stderr,
        )
        return 1
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def from_head(args: argparse.Namespace) -> None:
    """Take every setting from a run's head, so that `--replay` and `--regrade` need no other flag."""
    if not (paths := files(args.out)):
        raise FileNotFoundError(
            f"out (--out): found no results*.jsonl in {args.out}, expected a run's folder"
        )
    head = read_head(paths[0])
    if head is None:
        raise ValueError(f"{paths[0]}: line 1: found no head, expected a run that has begun")
    for name, value in head["arguments"].items():
        if name == "run_untrusted_code" and args.run_untrusted_code:
            continue  # leave to run code may be given when grading again
        setattr(
            args, name, Path(value) if name in ("data", "fit_text", "data_dir") and value else value
        )


class Evaluation:
    """One command: what is asked, the model, the arms, and the folder of results."""

    def __init__(self, args: argparse.Namespace, rank: int = 0, ranks: int = 1) -> None:
        self.args, self.rank, self.ranks, self.folder = args, rank, ranks, args.out
        if (args.task is None) == (args.data is None):
            raise ValueError("task (--task): expected a task's name, or --data FILE.jsonl")
        self.rows = rows_of(args)
        device = args.device
        if ranks > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        lm = minimas.load(args.model, device=device, dtype=args.dtype, quantize=args.quantize)
        self.lm = lm
        sampling = dataclasses.replace(
            lm.sampling, temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens,
            repetition_penalty=1.0 if args.temperature == 0 else lm.sampling.repetition_penalty,
        )  # fmt: skip
        self.verifies = (
            importlib.util.find_spec("math_verify") is not None
        )  # else by exact rules alone
        judged = grader(args.run_untrusted_code, self.verifies)
        text = args.fit_text.read_text(encoding="utf-8") if args.fit_text else None
        self.bench = Bench(lm, self.rows, args.batch_size, sampling, judged, Feeders(lm, text))
        self.arms = self._arms()
        ids = [[self.rows[i]["id"] for i in batch] for batch in self.bench.batches]
        # A batch at a time under all arms: a run that is cut short has compared them on the same questions.
        self.units = {
            Key(b, arm.name, seed): ids[b]
            for b in range(len(ids))
            for arm in self.arms
            for seed in args.seeds
        }
        self.settings = self._settings()

    def _arms(self) -> list[Arm]:
        a = self.args
        if a.audit:
            import audit

            return audit.arms(self)
        some = [
            i for i, row in enumerate(self.rows) if i == 0 or "team" in row
        ]  # all others share one
        lasts = [self.bench.team(i, Arm("", team=name)).agents[-1] for name in a.team for i in some]
        arms = grid(
            any(agent.latent_steps for agent in lasts), method=a.method, metric=a.metric, team=a.team,
            latent_steps=a.latent_steps, align=a.align, transfer=a.transfer, close=a.close, prefix=a.prefix,
            layout=a.layout,
        )  # fmt: skip
        return [
            dataclasses.replace(arm, samples=a.samples or 1) if arm.method == "single" else arm
            for arm in arms
        ]

    def _settings(self) -> Record:
        """What makes a result what it is: equal settings, equal results."""
        given = {
            name: value
            for name, value in arguments(self.args).items()
            if name not in NOT_SETTINGS | {"model"}
        }
        lm, text = self.lm, self.bench.feeder.text
        given |= {
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "device": lm.model.device.type,
        }
        # Of what is read, what was in it: a folder may be called something else from somewhere else.
        given |= {"model": lm.model.fingerprint(), "data": digest(self.rows)}
        given |= {"arms": [arm.name for arm in self.arms]} if self.args.audit else {}
        given |= {"fit_text": digest(text)} if text else {}
        maps = {kind: self.lm.aligner(kind) for kind in self.args.align if kind.endswith(FILE)}
        given |= {"maps": {kind: file_digest(kind) for kind in maps}} if maps else {}
        given |= {"sampling": dataclasses.asdict(self.bench.sampling), "math_verify": self.verifies}
        teams = lm.teams | {
            name: Team.from_json(name) for name in self.args.team if name.endswith(".json")
        }
        given |= {"default_steps": lm.default_steps}
        given |= (
            {"teams": digest({name: dataclasses.asdict(team) for name, team in teams.items()})}
            if teams
            else {}
        )
        return json.loads(json.dumps(given, default=str))

    def head(self) -> Record:
        """The record that opens a file: settings, and what they ran on."""
        device, model = self.lm.model.device, self.lm.model
        return {
            "settings": self.settings,
            "arguments": arguments(self.args),
            "arms": [dataclasses.asdict(arm) for arm in self.arms],
            "rank": self.rank,
            "ranks": self.ranks,
            "minimas": minimas.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "math_verify": version("math-verify") if self.verifies else None,
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"cpu, {platform.processor()}",
            "threads": torch.get_num_threads(),
            "model": {
                "name": model.name,
                "fingerprint": self.settings["model"],
                "steps": self.lm.default_steps,
            },
            "git": git_revision(),
            "code": "run in tools/sandbox.py"
            if self.args.run_untrusted_code
            else "not run, so not graded",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Compute every unit that is not there yet; of several ranks, those of this rank's batches."""
        name = "results.jsonl" if self.ranks == 1 else f"results-rank{self.rank}.jsonl"
        done, ledger = self._begin(self.folder / name)
        todo = [
            key for key in self.units if key not in done and key.batch % self.ranks == self.rank
        ]
        try:
            arms, start = {arm.name: arm for arm in self.arms}, time.perf_counter()
            for count, key in enumerate(todo, start=1):
                ledger.append(self.bench.compute(key.batch, arms[key.arm], key.seed))
                self._show(count, len(todo), time.perf_counter() - start)
        finally:
            ledger.close()
        if self.ranks > 1:
            distributed.barrier()

    def _begin(self, path: Path) -> tuple[set[Key], Ledger]:
        """Rank 0 repairs all files before any rank opens its own; a refusal ends all ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.ranks == 1:
            return take_up(self.folder, self.settings, self.units), Ledger(path, self.head())
        backend = "nccl" if self.lm.model.device.type == "cuda" else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(self.lm.model.device)
        # Ranks wait for each other at the end only, and the slowest may take long.
        distributed.init_process_group(backend, timeout=timedelta(days=7))
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                found = [take_up(self.folder, self.settings, self.units)]
            except (OSError, ValueError) as error:
                found = [error]
        distributed.broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0], Ledger(path, self.head())

    def _show(self, count: int, total: int, seconds: float) -> None:
        if not self.args.quiet:
            left = seconds / count * (total - count)
            end = "\r" if sys.stderr.isatty() and count < total else "\n"
            print(
                f"evaluate: {count} of {total} units, {left:,.0f} s left ",
                end=end,
                file=sys.stderr,
                flush=True,
            )

    def records(self) -> list[Record]:
        for path in files(self.folder):
            check(path, self.settings)
        return records(self.folder, self.units)

    def report(self) -> bool:
        """Summaries beside the results, and the table on stdout; whether every unit is in them."""
        found = self.records()
        summary = {"settings": self.settings, "arms": summarize(found)}
        text = table(summary["arms"], self.rows)
        if self.args.audit:
            import audit

            summary["audit"], more = audit.report(self, found)
            text = f"{text}\n\n{more}"
        write_whole(
            self.folder / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n"
        )
        write_whole(self.folder / "summary.md", text + "\n")
        print(text)
        if left := len(self.units) - len(there := {key_of(record) for record in found}):
            where = (
                f"{self.folder}: found {len(there)} of {len(self.units)} units, {left} are missing"
            )
            print(f"evaluate: {where}; ranks need a folder that all of them see", file=sys.stderr)
        return not left

    # -- a finished run again ------------------------------------------------------------------------------------------

    def replay(self, id_: str) -> int:
        """Compute one question's batches again and compare; status 1 if anything differs."""
        before = {(r["arm"], r["seed"]): r for r in self.records() if str(r["id"]) == id_}
        if not before:
            raise ValueError(
                f"replay (--replay): found {id_!r}, expected the id of a question in {self.folder}"
            )
        arms, status = {arm.name: arm for arm in self.arms}, 0
        for (arm, seed), old in before.items():
            again = self.bench.compute(old["batch"], arms[arm], seed)
            [new] = [record for record in again if record["id"] == old["id"]]
            why = difference(json.loads(json.dumps(old)), json.loads(json.dumps(new)))
            print(f"{id_}, {arm}, seed {seed}: {why or 'the same'}")
            status |= why is not None
        return status

    def regrade(self) -> None:
        """Judge every text anew, and write the files anew, each whole or as it was; not while a run writes there."""
        by_id, changed, head = {row["id"]: row for row in self.rows}, 0, self.head()
        anew = {
            name: self.settings[name] for name in ("run_untrusted_code", "math_verify")
        }  # how it is judged
        with contextlib.ExitStack() as held:
            for path in files(self.folder):
                lock(path, held.enter_context(path.open("rb")))
                old = (read_head(path) or {"settings": {}})["settings"]
                check(path, self.settings | {name: old.get(name) for name in anew})
            records(self.folder, self.units)  # refuses what is not as it should be
            for path in files(self.folder):
                # Not splitlines(), which cuts at characters that a text may hold; a half-written end is left out.
                first, *lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
                first |= {name: head[name] for name in ("code", "math_verify")}
                first["settings"] |= anew
                first["arguments"]["run_untrusted_code"] = anew["run_untrusted_code"]
                for record in lines:
                    if record["metric"] != "accuracy" or "votes" in record:
                        continue
                    row, prompt = by_id[record["id"]], record["agents"][-1]["prompt"]
                    answer, correct = judge(row, record["text"], prompt, self.bench.grader)
                    changed += (answer, correct) != (record["answer"], record["correct"])
                    record |= {"answer": answer, "correct": correct}
                write_whole(
                    path,
                    "".join(
                        json.dumps(line, ensure_ascii=False) + "\n" for line in [first, *lines]
                    ),
                )
        print(f"evaluate: {changed} grades changed", file=sys.stderr)


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The questions; ids are distinct and all fields that are needed are there, or it is an error."""
    if args.task:
        return load_task(args.task, args.data_dir, args.limit, 0)
    return read_rows(args.data)[: args.limit]


def grader(may_run: bool, verifies: bool = False) -> Grader:
    """How answers are judged: by rules, expressions by math-verify too if it is there, code by running its tests where
    that is allowed.
    """

    def judged(row: Row, text: str) -> bool | None:
        if may_run and kind_of(row) == "code":
            import sandbox

            return sandbox.run(code_program(row, text)).passed
        return plain_grader(row, text, verifies)

    return judged


def difference(old: Record, new: Record) -> str | None:
    """Where two records of one question part, in words; None: they do not."""
    for i, (a, b) in enumerate(zip(old["agents"], new["agents"], strict=True), start=1):
        for field in ("prompt", "thought", "text"):
            if a[field] != b[field]:
                return f"differs at agent {i}, {a['name']}: {field}: found {b[field]!r:.60}, expected {a[field]!r:.60}"
        if not same_mark(a["mark"], b["mark"]):
            return f"differs at agent {i}, {a['name']}: memory: found {b['mark']}, expected {a['mark']}"
    for field in ("text", "answer", "correct", "finish_reason"):
        if old.get(field) != new.get(field):
            return (
                f"differs in {field}: found {new.get(field)!r:.60}, expected {old.get(field)!r:.60}"
            )
    if "nll" in old and abs(old["nll"] - new["nll"]) > 1e-4 * max(1.0, old["nll"]):
        return f"differs in nll: found {new['nll']:.6f}, expected {old['nll']:.6f}"
    return None


# -- summaries --------------------------------------------------------------------------------------------------------


def summarize(found: Sequence[Record]) -> dict[str, Record]:
    """Each arm's numbers: questions, accuracy and loss with 95 % intervals, truncation, and the bill a question."""
    by_arm: dict[str, list[Record]] = {}
    for record in found:
        by_arm.setdefault(record["arm"], []).append(record)
    summary = {}
    for name, several_records in by_arm.items():
        n = len({r["id"] for r in several_records})
        line: Record = {
            "n": n,
            "metric": several_records[0]["metric"],
            "seeds": len(several_records) // n,
        }
        graded = of_questions(several_records, "correct")
        if graded:
            line["accuracy"] = share(graded)
        if losses := of_questions(several_records, "nll"):
            line["nll"] = list(bootstrap(losses))
        n = len(several_records)
        if "finish_reason" in several_records[0]:
            line["truncated"] = sum(r["finish_reason"] == "length" for r in several_records) / n
            line["empty"] = sum(not r["text"].strip() for r in several_records) / n
        line |= {
            name: sum(r[name] for r in several_records) / n
            for name in ("read", "thought", "written")
        }
        line["seconds"] = median(
            r["seconds"] for r in several_records
        )  # one stall of the machine is not the arm's
        summary[name] = line | {"memory_bytes": max(r["memory_bytes"] for r in several_records)}
    return summary


def of_questions(found: Sequence[Record], field: str) -> list[float]:
    """A field's mean over each question's seeds, in the data's order, of the questions that have it."""
    return by_question(
        {(r["id"], r["seed"]): float(r[field]) for r in found if r.get(field) is not None}
    )


def table(arms: dict[str, Record], rows: Sequence[Row]) -> str:
    """The summary as Markdown."""
    head = [
        "arm",
        "n",
        "right, 95 %",
        "gold NLL, 95 %",
        "cut off",
        "read",
        "thought",
        "written",
        "s a question",
    ]
    lines = [head, ["---"] * len(head)]
    for name, line in arms.items():
        right = "{:.1%} [{:.1%}, {:.1%}]".format(*line["accuracy"]) if "accuracy" in line else ""
        nll = "{:.3f} [{:.3f}, {:.3f}]".format(*line["nll"]) if "nll" in line else ""
        cut = f"{line['truncated']:.0%}" if "truncated" in line else ""
        counts = [f"{line[what]:,.0f}" for what in ("read", "thought", "written")]
        # Of losses, what the first arm on a batch has read the others need not: their seconds do not compare.
        seconds = "" if line["metric"] == "nll" else f"{line['seconds']:.3g}"
        lines.append([name, str(line["n"]), right, nll, cut, *counts, seconds])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    chances = [row["chance"] for row in rows if "chance" in row]
    text += (
        f"\n\nA guessed answer is right in {sum(chances) / len(chances):.1%}." if chances else ""
    )
    options = [1 / len(row["choices"]) for row in rows if row.get("choices")]
    by_loss = any(line["metric"] == "nll" for line in arms.values())
    if options and by_loss:  # the lowest of a few losses is right more often than a guessed answer
        text += f"\n\nThe lowest of the options' losses is right by chance in {sum(options) / len(options):.1%}."
    return text


# -- what a head says -------------------------------------------------------------------------------------------------


def arguments(args: argparse.Namespace) -> Record:
    """The command line as plain values."""
    kept = {
        k: v
        for k, v in vars(args).items()
        if k not in ("out", "replay", "regrade", "debug", "quiet")
    }
    return json.loads(json.dumps(kept, default=str))


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def git_revision() -> str | None:
    """The checkout's commit, with a mark if files differ from it; None outside of one."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
