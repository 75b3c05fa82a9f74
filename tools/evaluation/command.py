"""The command line of tools/evaluate.py: its flags, and the run that they describe."""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import minimas
from minimas.agents import TRANSFERS
from minimas.core.config import read_json
from minimas.core.errors import ParameterError
from minimas.fast.quantize import FORMATS
from minimas.lens import Lens
from minimas.teams import LAYOUTS, TEAMS, Team
from tools.shared.arguments import FAILURES, Parser, list_of, one_of, print_error, whole, yes_no
from tools.shared.files import write_whole

from . import audit, probe
from .arms import (
    AUDIT_MAPS,
    LATENT_SETTINGS,
    METHODS,
    METRICS,
    SAME_SECONDS,
    Arm,
    audit_arms,
    full_arm,
    grid,
)  # fmt: skip
from .bench import Bench, samples_in_same_time
from .feeders import Feeders, kind_of_map
from .grading import grader
from .layouts import VARIANTS
from .ledger import (
    Key,
    Ledger,
    all_records,
    check_can_lock,
    check_settings,
    files,
    key_of,
    read_head,
    remove_incomplete_units,
)
from .replay import regrade, replay
from .rows import Row, read_rows
from .sandbox import check_platform
from .settings import Record, has_math_verify, run_head, run_settings
from .summary import summarize, table
from .tasks import load_task

DIAGNOSED = 4  # questions
VOTE = f"accuracy: {SAME_SECONDS}"
UNIT = "a unit is one batch of questions with one arm and seed, and is written as a whole"
DESCRIPTION = (
    "Evaluate methods and their control arms on a task, and report the results. "
    "Lists of values are separated by commas. "
    f"Progress is shown in units: {UNIT}. The same command continues a stopped run."
)


def parser() -> Parser:
    """Return the parser of the command line."""
    top = Parser("evaluate", description=DESCRIPTION, allow_abbrev=False)
    add = top.add_argument
    add("--model", "-m", default="weights/tiny", help="folder, hub id or .gguf file")
    models = "the model that agents of a team call NAME; repeat the flag for more models"
    add("--models", action="append", type=named, metavar="NAME=FOLDER", help=models)
    add("--task", help="name of a benchmark, see tools/evaluation/tasks.py")
    add("--data", type=Path, metavar="FILE.jsonl", help="your own questions instead of --task")
    folder = "folder with the files of tools/download.py (default: %(default)s)"
    add("--data-dir", type=Path, default=Path("data"), help=folder)
    add_settings(top)
    metrics = "list of accuracy, nll (default: accuracy; with --audit: both)"
    add("--metric", type=list_of(one_of(METRICS)), help=metrics)
    add("--seeds", type=list_of(whole(0)), default=[0], help="list (default: 0)")
    add("--samples", type=whole(1), help="number of single-agent answers to vote on (default: 1)")
    add("--limit", type=whole(1), help="number of questions (default: all)")
    add("--batch-size", type=whole(1), default=8, help="questions per batch (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--top-p", type=float, default=1.0)
    limit = "maximum number of generated tokens per agent (default: %(default)s)"
    add("--max-new-tokens", type=whole(1), default=256, help=limit)
    add("--fit-text", type=Path, metavar="FILE", help="plain text for the maps mean and fitted")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--quantize", choices=FORMATS, help="weights in 4 or 8 bits (default: as in the file)")
    add("--run-untrusted-code", action="store_true", help="grade code by running it in a sandbox")
    lens = "record K tokens per thought and the last agent's attention, for tools/report.py"
    add("--lens", type=whole(1), metavar="K", help=lens)
    add("--audit", action="store_true", help="run all control arms, diagnostics and a verdict")
    add("--arms", type=list_of(str), metavar="NAMES", help="list of an audit's arms (default: all)")
    diagnose = f"questions whose attention and transplants an audit computes (default: {DIAGNOSED})"
    add("--diagnose", type=whole(1), metavar="N", help=diagnose)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add("--replay", metavar="ID", help="compute one question of a run again and compare")
    add("--regrade", action="store_true", help="grade the texts of a finished run again")
    many = "number of ranks of torchrun that hold one model together (without N: all ranks)"
    add("--parallel", nargs="?", const=0, type=whole(1), metavar="N", help=many)
    add("--debug", action="store_true", help="show a traceback with an error")
    add("--quiet", action="store_true", help="no progress on stderr")
    return top


def add_settings(top: Parser) -> None:
    """Add the flags for the settings of arms, which take lists."""
    add, team = top.add_argument, one_of(tuple(TEAMS), ".json")
    add(
        "--method",
        type=list_of(one_of(METHODS)),
        default=["latent_mas"],
        help=f"list of {', '.join(METHODS)}",
    )
    about = f"list of {', '.join(TEAMS)}, FILE.json"
    add("--team", type=list_of(team), default=["sequential"], help=about)
    steps = "list of numbers or auto (default: the model's)"
    add("--latent-steps", type=list_of(steps_or_auto), default=[None], help=steps)
    add(
        "--align",
        type=list_of(kind_of_map),
        default=["ridge"],
        help="list of maps (see feeders.py)",
    )
    add(
        "--transfer",
        type=list_of(one_of(TRANSFERS)),
        default=["full"],
        help=f"list of {', '.join(TRANSFERS)}",
    )
    add(
        "--close", type=list_of(yes_no), default=[True], help="list of yes, no: close agents' turns"
    )
    layout = one_of((*LAYOUTS, *VARIANTS))
    about = "list of turn, chat, or variants of tools/evaluation/layouts.py"
    add("--layout", type=list_of(layout), default=[None], help=about)
    prefix = "text before the thoughts, may contain commas; repeat the flag for a list"
    add("--prefix", action="append", metavar="TEXT", help=prefix)


def named(text: str) -> list[str]:
    """Convert NAME=FOLDER to the name and the folder."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"found {text!r:.40}, expected NAME=FOLDER")
    return [name, folder]


def steps_or_auto(text: str) -> int | str:
    """Convert a number of latent steps, or "auto"."""
    return text if text == "auto" else whole(0)(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0 if done, 1 if it failed or a replay differs, 130 if stopped by Ctrl-C.
    """
    args = parser().parse_args(argv)
    args.metric = args.metric or (["nll", "accuracy"] if args.audit else ["accuracy"])
    args.prefix = args.prefix or [None]
    try:
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"out (--out): found {args.out}, a file, expected a folder")
        check_can_lock()
        if args.replay or args.regrade:
            take_arguments_of_head(args)
        if args.run_untrusted_code:
            check_platform()
        run = Evaluation(args)
        if args.replay:
            return 0 if replay(run.bench, run.arms, run.records(), args.replay) else 1
        if args.regrade:
            changed = regrade(run.folder, run.bench, run.settings, run.head(), run.units)
            votes = sum("votes" in record for record in run.records())
            left_out = f"; {votes} votes are left out, as other samples are not stored"
            text = f"evaluate: {changed} grades changed{left_out if votes else ''}"
            print(text, file=sys.stderr)
        else:
            run.run()
        return 0 if run.process or run.report() or args.regrade else 1
    except KeyboardInterrupt:
        kept = f"{args.out} keeps finished results, and the same command continues"
        print(f"\nevaluate: stopped; {kept}", file=sys.stderr)
        return 130
    except FAILURES as error:
        if args.debug:
            raise
        print_error("evaluate", error)
        return 1
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def take_arguments_of_head(args: argparse.Namespace) -> None:
    """Read all arguments from the head of a run, so that --replay and --regrade need no other flag.

    Raises FileNotFoundError if there is no result file, and ValueError if it has no head.
    """
    if not (paths := files(args.out)):
        problem = f"found no results*.jsonl in {args.out}, expected the folder of a run"
        raise FileNotFoundError(f"out (--out): {problem}")
    head = read_head(paths[0])
    if head is None:
        raise ValueError(f"{paths[0]}: line 1: found no head, expected a run that has begun")
    may_run = args.run_untrusted_code  # may be added with --regrade
    for name, value in head["arguments"].items():
        is_path = name in ("data", "fit_text", "data_dir") and value
        setattr(args, name, Path(value) if is_path else value)
    args.run_untrusted_code = may_run or args.run_untrusted_code


class Evaluation:
    """One run: the model and the rows, the arms, their units, and the folder of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Load the model and the data. Raises ValueError, OSError, ImportError for wrong input."""
        self.args, self.folder = args, Path(args.out)
        self.process = int(os.environ.get("RANK", 0))
        self.processes = int(os.environ.get("WORLD_SIZE", 1))
        # A rank is one process, or with --parallel a group of them that holds one model.
        size = 1 if args.parallel is None else args.parallel or self.processes
        check_parallel(args, size, self.processes)
        self.rank, self.place = divmod(self.process, size)
        self.ranks = self.processes // size
        rows, device = load_rows(args), args.device
        if self.processes > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        mesh = self.join(device, size) if args.parallel is not None else False
        how: dict[str, Any] = {"device": device, "dtype": args.dtype, "quantize": args.quantize}
        lm = minimas.load(args.model, parallel=mesh, **how)
        named_models = args.models or ()
        models = {name: minimas.load(path, parallel=mesh, **how) for name, path in named_models}
        sampling = replace(
            lm.sampling,
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
        )
        if args.temperature == 0:
            sampling = replace(sampling, repetition_penalty=1.0)
        graded = grader(args.run_untrusted_code, has_math_verify())
        text = args.fit_text.read_text(encoding="utf-8") if args.fit_text else None
        self.bench = Bench(lm, rows, args.batch_size, sampling, graded, Feeders(lm, text), models)
        self.check_models()
        self.lens = Lens(lm, args.lens) if args.lens else None
        self.arms = self.choose_arms()
        self.check_teams()
        if len(rows) == 1 and any(arm.transfer == "shuffled" for arm in self.arms):
            raise ValueError(
                "transfer (--transfer, --arms): found 'shuffled' with one question, expected two "
                "or more: it would get its own KV cache"
            )
        # All arms run on a batch before the next batch, so that an unfinished run has compared them
        # on the same questions.
        self.units: dict[Key, list[str]] = {}
        for number, batch in enumerate(self.bench.batches):
            ids = [rows[i]["id"] for i in batch]
            for arm in self.arms:
                self.units |= {Key(number, arm.name, seed): ids for seed in args.seeds}
        self.warned_arms: set[str] = set()  # those for which --lens records nothing
        self.settings = run_settings(args, self.bench, self.arms)

    def check_models(self) -> None:
        """Raise ValueError for a model that no team uses, and for models with --lens or --audit."""
        args, bench = self.args, self.bench
        used = {agent.model for team in self.teams() for agent in team.agents}
        if unused := sorted(bench.models.keys() - used):
            raise ValueError(f"models (--models): found {unused}, expected names that agents use")
        if bench.models and (args.lens or args.audit):
            raise ValueError(
                "models (--models): found models with --lens or --audit, expected none"
            )

    def rows_of_all_teams(self) -> list[int]:
        """Return all rows that have their own team, and one of those that share the run's."""
        own = [i for i, row in enumerate(self.bench.rows) if "team" in row]
        others = [i for i, row in enumerate(self.bench.rows) if "team" not in row]
        return own + others[:1]

    def teams(self) -> list[Team]:
        """Return the teams of the rows, and for rows that have none, those that --team names."""
        pairs = itertools.product(self.args.team, self.rows_of_all_teams())
        return [self.bench.team(i, Arm("", team=name)) for name, i in pairs]

    def check_teams(self) -> None:
        """Raise ValueError naming the flag if a team cannot work in the layout of an arm."""
        for arm, i in itertools.product(self.arms, self.rows_of_all_teams()):
            try:
                self.bench.team(i, arm)
            except ParameterError as error:
                name = error.parameter
                raise ValueError(f"{name} (--{name}): {error.problem}") from error

    def join(self, device: str, size: int) -> Any:
        """Return the mesh of the processes that hold one model together with this process."""
        from torch.distributed.device_mesh import init_device_mesh

        start_processes(torch.device("cpu" if device == "auto" else device))
        if self.place:
            self.args.quiet = True
        kind = device.partition(":")[0].replace("auto", "cpu")
        return init_device_mesh(kind, (self.ranks, size), mesh_dim_names=("rows", "model"))["model"]

    def choose_arms(self) -> list[Arm]:
        """Return the arms of the grid, or of the audit. Raises ValueError naming a wrong flag."""
        args, bench = self.args, self.bench
        lists = {name: getattr(args, name) for name in LATENT_SETTINGS}
        if args.audit:
            return self.choose_audit_arms(full_arm({"method": args.method, **lists}))
        if all("team" in row for row in bench.rows):
            if args.team != ["sequential"]:
                raise ValueError(
                    f"team (--team): found {args.team} with rows that have their own team, "
                    "expected none"
                )
            lists["team"] = [None]
        teams = self.teams()
        thinks_last = any(team.agents[-1].latent_steps is not None for team in teams)
        if args.layout == [None] and all(team.layout == "turn" for team in teams):
            lists["close"] = lists["close"][:1]  # there is only one turn
        arms = grid(thinks_last, method=args.method, metric=args.metric, **lists)
        samples = args.samples or 1
        for name in ("arms", "diagnose"):
            if getattr(args, name) is not None:
                expected = "found without --audit, expected it only with --audit"
                raise ValueError(f"{name} (--{name}): {expected}")
        votes = any(arm.method == "single" and arm.metric == "accuracy" for arm in arms)
        if args.samples and not votes:
            raise ValueError(
                "samples (--samples): found no single agent whose accuracy is measured, expected "
                "--method single"
            )
        return [replace(arm, samples=samples) if arm.method == "single" else arm for arm in arms]

    def choose_audit_arms(self, full: Arm) -> list[Arm]:
        """Return the audit's arms, with the number of samples to vote on."""
        args = self.args
        arms = audit_arms(full, args.align[1:] or AUDIT_MAPS, args.metric, args.arms)
        if arms and arms[-1].name == VOTE:
            arms[-1] = replace(arms[-1], samples=args.samples or self.samples_to_vote_on(full))
        elif args.samples and args.arms is not None:
            raise ValueError(
                f"samples (--samples): found without the arm {VOTE!r}, expected it in --arms"
            )
        return arms

    def samples_to_vote_on(self, full: Arm) -> int:
        """Return the number of samples from the head of the run, or measure it if there is no head.

        Raises ValueError if several ranks would have to measure it.
        """
        for path in files(self.folder):
            for arm in (read_head(path) or {}).get("arms", []):
                if arm["name"] == VOTE:
                    return int(arm["samples"])
        if self.processes > 1:
            expected = "expected a number, because several ranks share the audit"
            raise ValueError(f"samples (--samples): found no number, {expected}")
        return samples_in_same_time(self.bench, full)

    def head(self) -> Record:
        """Return the head of this rank's file."""
        head = run_head(self.args, self.settings, self.bench, self.arms)
        return head | {"rank": self.rank, "ranks": self.ranks}

    def run(self) -> None:
        """Compute all missing units. With several ranks, each computes those of its own batches."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.processes == 1:
            done, sizes = remove_incomplete_units(self.folder, self.settings, self.units)
        else:
            done, sizes = self.remove_incomplete_units_on_rank_0()
        name = "results.jsonl" if self.ranks == 1 else f"results-rank{self.rank}.jsonl"
        ledger = None
        if self.place == 0:  # the other processes of a group compute the same records
            ledger = Ledger(self.folder / name, self.head(), sizes.get(name, 0))
        mine = [key for key in self.units if key.batch % self.ranks == self.rank]
        todo = [key for key in mine if key not in done]
        arms, start = {arm.name: arm for arm in self.arms}, time.perf_counter()
        if todo:
            self.show(f"evaluate: {len(todo)} of {len(mine)} units to do; {UNIT}")
        try:
            for count, key in enumerate(todo, start=1):
                records = self.bench.compute(key.batch, arms[key.arm], key.seed, self.lens)
                if ledger:
                    ledger.append(records)
                self.warn_without_thoughts(key.arm, records)
                seconds = (time.perf_counter() - start) / count * (len(todo) - count)
                text = f"evaluate: {count} of {len(todo)} units, {seconds:,.0f} s left "
                self.show(text, ends=count == len(todo))
        finally:
            if ledger:
                ledger.close()
        if self.processes > 1:
            distributed.barrier()

    def remove_incomplete_units_on_rank_0(self) -> tuple[set[Key], dict[str, int]]:
        """Remove incomplete units on rank 0, before any rank opens its file.

        An error ends all ranks.
        """
        start_processes(self.bench.lm.model.device)
        found: list[Any] = [None]
        if self.process == 0:
            try:
                found = [remove_incomplete_units(self.folder, self.settings, self.units)]
            except (OSError, ValueError) as error:
                found = [error]
        distributed.broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        taken: tuple[set[Key], dict[str, int]] = found[0]
        return taken

    def warn_without_thoughts(self, arm: str, records: Sequence[Record]) -> None:
        """Print once per arm that --lens records nothing, if no agent has latent steps."""
        agents = [agent for record in records for agent in record["agents"]]
        if self.lens and arm not in self.warned_arms and not any("thoughts" in a for a in agents):
            self.warned_arms.add(arm)
            print(f"evaluate: --lens records nothing for {arm}: no thoughts", file=sys.stderr)

    def show(self, text: str, ends: bool = True) -> None:
        """Print progress on stderr. On a terminal the next text replaces it unless `ends`."""
        if not self.args.quiet:
            end = "\n" if ends or not sys.stderr.isatty() else "\r"
            print(text, end=end, file=sys.stderr, flush=True)

    def records(self) -> list[Record]:
        """Return all records of the run. Raises ValueError for files with other settings."""
        for path in files(self.folder):
            check_settings(path, self.settings)
        return all_records(self.folder, self.units)

    def report(self) -> bool:
        """Write the summaries and print the table. Returns True if no unit is missing."""
        found = self.records()
        summary = {"settings": self.settings, "arms": summarize(found)}
        text = table(summary["arms"], self.bench.rows)
        if self.args.audit:
            summary["audit"], more = audit.report(found, self.diagnostics())
            text = f"{text}\n\n{more}"
        as_json = json.dumps(summary, ensure_ascii=False, indent=1)
        write_whole(self.folder / "summary.json", as_json + "\n")
        write_whole(self.folder / "summary.md", text + "\n")
        print(text)
        there = {key_of(record) for record in found}
        missing = len(self.units) - len(there)
        if missing:
            units = f"found {len(there)} of {len(self.units)} units, {missing} are missing"
            advice = "all ranks need access to the same folder"
            print(f"evaluate: {self.folder}: {units}; {advice}", file=sys.stderr)
        return missing == 0

    def diagnostics(self) -> Record:
        """Return the diagnostics of an audit, which are stored because they take minutes.

        Those of a run with other settings are computed again.
        """
        path = self.folder / "diagnostics.json"
        most = self.args.diagnose or DIAGNOSED
        settings = json.loads(json.dumps(self.settings)) | {"diagnose": most}
        stored = read_json(path, needed=False)
        if stored.get("settings") != settings:
            found = probe.diagnose(self.bench, self.arms, most)
            records = [json.dumps(record) + "\n" for record in found.pop("transplants", [])]
            write_whole(self.folder / "transplants.jsonl", "".join(records))
            stored = {"settings": settings, "diagnostics": found}
            write_whole(path, json.dumps(stored, indent=1) + "\n")
            stored = read_json(path)
        diagnostics: Record = stored["diagnostics"]
        return diagnostics


def check_parallel(args: argparse.Namespace, size: int, processes: int) -> None:
    """Raise ValueError if --parallel does not fit the processes or the other flags."""
    if args.parallel is None:
        return
    for name in ("audit", "lens", "replay", "regrade"):
        if getattr(args, name):
            expected = "expected one process per model, as only one of several would run this"
            raise ValueError(f"{name} (--{name}): found with --parallel, {expected}")
    if "RANK" not in os.environ or processes % size:
        expected = "expected torchrun with a multiple of that number"
        raise ValueError(f"parallel (--parallel): found {size} of {processes} ranks, {expected}")


def start_processes(device: torch.device) -> None:
    """Join the process group of torchrun, unless this process has already joined it."""
    if distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ranks wait for each other mostly at the end, and the slowest one may take long.
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=7))


def load_rows(args: argparse.Namespace) -> list[Row]:
    """Return the questions of --task or --data. Raises ValueError for wrong input."""
    if (args.task is None) == (args.data is None):
        found = "neither of them" if args.task is None else "both of them"
        raise ValueError(f"task (--task): found {found}, expected --task or --data FILE.jsonl")
    if args.task:
        return load_task(args.task, args.data_dir, args.limit, 0)
    return read_rows(args.data)[: args.limit]
