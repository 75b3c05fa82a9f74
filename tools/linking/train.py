"""Train a link: updates, held-out loss, early stopping, and runs that can be continued.

At any time, the file holds the link with the lowest held-out loss so far. Next to it are a state,
from which a run continues, and a log with one JSON object per line. This module does not depend on
the command line.
"""

import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from minimas import LM
from minimas.core.files import opened
from tools.evaluation.ledger import numbered_lines, parsed
from tools.evaluation.rows import Row, kind_of
from tools.evaluation.stats import bootstrap, wilson
from tools.shared.files import replacing, write_whole

from .data import Data
from .link import Link
from .rollout import OBJECTIVES, TeamSettings, answers, nll

T = TypeVar("T")
CLIP = 1.0  # the largest norm of all gradients together
# What the checksums in the settings of a run are made from.
SOURCES = {
    "rows_crc": "set of rows (--data, --rows, --held-out, --test)",
    "team_crc": "team (--team, --agents)",
    "start_crc": "map in the file of --start",
    "fingerprint": "model in the folder of --model",
}


@dataclass(frozen=True)
class Settings:
    """How to train. After `patience` evaluations without a lower held-out loss, the run ends.

    With `patience` 0, it does not end early.
    """

    objective: str = "nll"
    updates: int = 100
    batch_size: int = 8
    rate: float = 3e-3
    evaluate_every: int = 10
    patience: int = 0
    seed: int = 0


@dataclass
class Progress:
    """What has been done so far. `best` is the update with the lowest held-out loss."""

    update: int = 0
    seconds: float = 0.0
    held_out: float = float("inf")
    best: int = 0
    best_loss: float = float("inf")


class Training:
    """One training run of `link`. Its state and its log store `identity`, its settings."""

    def __init__(
        self,
        lm: LM,
        link: Link,
        data: Data,
        team_settings: TeamSettings,
        settings: Settings,
        out: Path,
        identity: dict[str, Any],
    ) -> None:
        self.lm, self.link, self.data, self.team_settings = lm, link, data, team_settings
        self.settings, self.out, self.identity = settings, out, identity
        self.state, self.log = state_of(out), log_of(out)
        self.parameters = dict(link.named_parameters())
        self.adam = torch.optim.Adam(self.parameters.values(), lr=settings.rate)
        self.best = {name: part.detach().clone() for name, part in self.parameters.items()}
        self.progress = Progress()

    def run(self) -> Progress:
        """Train to the last update, or until the held-out loss no longer falls.

        Afterwards the link is the best one. Raises ValueError if an update fails, for example
        because a loss is not finite. Then, and after Ctrl-C, the file has the best link so far.
        """
        resumed = self.resume()
        try:
            if not resumed:
                write_whole(self.log, json.dumps({"settings": self.identity}) + "\n")
                self.evaluate()
            self.take_updates()
        except (ValueError, RuntimeError) as error:  # RuntimeError: torch is out of memory
            update = self.progress.update + 1
            raise ValueError(f"update {update}: {error}; {kept(self.out)}") from error
        self.set_parameters(self.best)
        return self.progress

    def take_updates(self) -> None:
        """Take the remaining updates, and evaluate after some of them and after the last one."""
        now, every = self.progress, self.settings.evaluate_every
        while now.update < self.settings.updates and not self.is_flat():
            began = time.perf_counter()
            loss = self.step()
            now.update += 1
            now.seconds += time.perf_counter() - began
            self.write({"loss": loss})
            if now.update % every == 0 or now.update == self.settings.updates:
                self.evaluate(loss)

    def is_flat(self) -> bool:
        """Return True if the held-out loss has not fallen for `patience` evaluations."""
        waited = (self.progress.update - self.progress.best) // self.settings.evaluate_every
        return 0 < self.settings.patience <= waited

    def step(self) -> float:
        """Take one update. Returns the loss per token before it."""
        batch = batch_of(self.data.train, self.progress.update, self.settings)
        self.adam.zero_grad()
        loss = self.losses(batch).mean()
        if not loss.requires_grad:
            raise ValueError("no gradient reaches the link: no agent hands thoughts over")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        if not (loss.isfinite() and norm.isfinite()):
            raise ValueError(f"found loss {loss:g} and a gradient of norm {norm:g}")
        self.adam.step()
        if not all(part.isfinite().all() for part in self.parameters.values()):
            raise ValueError("found NaN or infinity in the link")
        return loss.item()

    def losses(self, rows: Sequence[Row]) -> Tensor:
        """Return the objective's loss of each token of all rows (T,)."""
        objective = OBJECTIVES[self.settings.objective]
        return torch.cat(objective(self.lm, rows, self.team_settings, self.link.feeder()))

    @torch.no_grad()
    def evaluate(self, loss: float | None = None) -> None:
        """Measure the held-out loss, save the link if it is the best one, and the state."""
        began = time.perf_counter()
        batches = in_batches(self.data.held_out, self.settings.batch_size)
        each = torch.cat([self.losses(rows) for rows in batches])  # (T,)
        now = self.progress
        now.held_out = each.mean().item()
        if not math.isfinite(now.held_out):
            raise ValueError(f"found held-out loss {now.held_out:g}")
        now.seconds += time.perf_counter() - began
        self.write({"held_out": now.held_out})
        if now.held_out < now.best_loss:
            now.best, now.best_loss = now.update, now.held_out
            self.best = {name: part.detach().clone() for name, part in self.parameters.items()}
            self.link.save(self.out, self.lm.model)
        self.save_state()
        trained = "" if loss is None else f"loss {loss:.4f}, "
        best = "best so far" if now.best == now.update else f"best {now.best_loss:.4f}"
        line = f"update {now.update} of {self.settings.updates}: {trained}held-out "
        line += f"{now.held_out:.4f} ({best}), {now.seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record to the log, with the number of updates and the seconds so far."""
        done = {"update": self.progress.update, "seconds": round(self.progress.seconds, 2)}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done | record) + "\n")

    # -- states ------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """Save what a continued run needs in one file. An interrupted save keeps the old file."""
        tensors = {f"now/{name}": part.detach() for name, part in self.parameters.items()}
        tensors |= {f"best/{name}": part for name, part in self.best.items()}
        for index, moments in self.adam.state_dict()["state"].items():
            tensors |= {f"adam/{index}/{name}": value for name, value in moments.items()}
        metadata = {
            "settings": json.dumps(self.identity), "progress": json.dumps(asdict(self.progress)),
        }  # fmt: skip
        with replacing(self.state) as partial:
            stored = {name: part.contiguous().cpu() for name, part in tensors.items()}
            save_file(stored, partial, metadata=metadata)

    def resume(self) -> bool:
        """Continue from the state, if there is one. Raises ValueError if its settings differ."""
        if not self.state.exists():
            return False
        with opened(self.state) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if "progress" not in metadata:
            raise ValueError(
                f"{self.state}: found another file, expected the state of a run: use another "
                "--out, or --restart"
            )
        known = json.loads(metadata["settings"])
        for name, value in self.identity.items():
            if known.get(name) != value:
                problem = f"{name}: found {known.get(name)!r}, expected {value!r}"
                if name in SOURCES:
                    problem = f"found a run with another {SOURCES[name]}, expected the same"
                raise ValueError(f"{self.state}: {problem}: use another --out, or --restart")
        self.set_parameters(part_of(tensors, "best"))
        self.best = {name: part.detach().clone() for name, part in self.parameters.items()}
        self.link.save(self.out, self.lm.model)  # its files may have been deleted since
        self.progress = Progress(**json.loads(metadata["progress"]))
        self.set_parameters(part_of(tensors, "now"))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in part_of(tensors, "adam").items():
            index, moment = name.split("/")
            moments.setdefault(int(index), {})[moment] = value
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": moments, "param_groups": groups})
        # Records that were written after the state belong to updates that will be repeated, and a
        # test is repeated too.
        done = [
            record
            for record in read_log(self.log)
            if not {"settings", "test"} & record.keys()
            and record.get("update", 0) <= self.progress.update
        ]
        lines = [json.dumps(record) for record in ({"settings": self.identity}, *done)]
        write_whole(self.log, "\n".join(lines) + "\n")
        return True

    @torch.no_grad()
    def set_parameters(self, parts: dict[str, Tensor]) -> None:
        """Copy `parts` to the parameters of the link."""
        for name, part in self.parameters.items():
            part.copy_(parts[name])


def log_of(out: Path) -> Path:
    """Return the path of the log of the run that trains the link `out`."""
    return out.with_suffix(".jsonl")


def state_of(out: Path) -> Path:
    """Return the path of the state of the run that trains the link `out`."""
    return out.with_suffix(".state" + out.suffix)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, [] if it is missing. An incomplete last line is left out.

    Raises ValueError naming the file and the line for any other damage.
    """
    if not path.exists():
        return []
    lines = [(number, line) for number, _, line in numbered_lines(path) if line.endswith(b"\n")]
    try:
        return [parsed(path, number, line) for number, line in lines]
    except ValueError as error:
        raise ValueError(f"{error}; --restart begins again") from error


def kept(out: Path) -> str:
    """Return a text that says what is in `out` after a run that stopped early."""
    return f"{out} has the best link so far" if out.exists() else f"{out} was not written"


def part_of(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the tensors of one part of a state, without its name."""
    start = f"{part}/"
    return {name[len(start) :]: x for name, x in tensors.items() if name.startswith(start)}


def batch_of(rows: Sequence[Row], update: int, settings: Settings) -> list[Row]:
    """Return the batch of one update.

    Each epoch has all rows in another order. If its last batch would be incomplete, it is dropped.
    The batch depends only on the seed and the number of the update, so a continued run repeats an
    uninterrupted one exactly.
    """
    size = min(settings.batch_size, len(rows))
    epoch, batch = divmod(update, len(rows) // size)
    order = random.Random(f"{settings.seed}/{epoch}").sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[batch * size : (batch + 1) * size]]


def in_batches(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return all items in order, in batches of at most `size`.

    If possible, no batch has only one row, which could not get another row's thoughts. For that, a
    last batch of size 2 may have three rows.
    """
    starts = list(range(0, len(rows), size))
    if size > 1 and len(starts) > 1 and len(rows) - starts[-1] == 1:
        if size == 2:
            starts.pop()
        else:
            starts[-1] -= 1
    ends = [*starts[1:], len(rows)]
    return [rows[start:end] for start, end in zip(starts, ends, strict=True)]


@torch.no_grad()
def measure(
    lm: LM, link: Link, rows: Sequence[Row], team_settings: TeamSettings, batch_size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the gold NLL and the number of right answers on rows that were not used in training.

    "other" is the loss with the next question's thoughts, which is a control. The 95 % intervals
    are a bootstrap over questions for losses, and Wilson's for the share of right answers. The
    second result has the same values for each question, for paired comparisons between links.
    """
    own, other, right = list[float](), list[float | None](), list[bool]()
    grades = kind_of(rows[0]) != "code"  # programs are not run here
    for batch in in_batches(rows, batch_size):
        feed = link.feeder()
        own += [tokens.mean().item() for tokens in nll(lm, batch, team_settings, feed)]
        if len(batch) > 1:
            pairs = nll(lm, batch, team_settings, link.feeder(), others=True)
            other += [tokens.mean().item() for tokens in pairs]
        else:
            other.append(None)  # there is no other question
        if grades:
            right += answers(lm, batch, team_settings, feed)
    mean, *interval = bootstrap(own)
    found = {"n": len(rows), "loss": mean, "interval": interval}
    columns: dict[str, list[Any]] = {"id": [row["id"] for row in rows], "loss": own}
    compared = [loss for loss in other if loss is not None]
    if compared:
        mean, *interval = bootstrap(compared)
        found |= {"other": mean, "other_interval": interval}
        columns["other"] = other
    if grades:
        found |= {"right": sum(right), "right_interval": wilson(sum(right), len(right))}
        columns["right"] = right
    questions = zip(*columns.values(), strict=True)
    return found, [dict(zip(columns, values, strict=True)) for values in questions]
