"""Collect the settings of a run and the head of its files. Equal settings give equal results.

This module does not depend on what the settings do.
"""

import argparse
import dataclasses
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import minimas
from minimas import Team

from .arms import Arm
from .bench import Bench
from .feeders import SUFFIX

ROOT = Path(__file__).resolve().parents[2]
# These have no effect on results.
NOT_ARGUMENTS = {"out", "replay", "regrade", "debug", "quiet", "parallel"}
# Paths, whose contents are settings.
NOT_SETTINGS = NOT_ARGUMENTS | {"data_dir", "data", "model", "models", "diagnose"}
Record = dict[str, Any]


def has_math_verify() -> bool:
    """Return True if math-verify is installed. Otherwise expressions are compared by rules."""
    return find_spec("math_verify") is not None


def arguments(args: argparse.Namespace) -> Record:
    """Return the arguments of the command line as JSON values."""
    return plain({k: v for k, v in vars(args).items() if k not in NOT_ARGUMENTS})


def run_settings(args: argparse.Namespace, bench: Bench, arms: Sequence[Arm]) -> Record:
    """Return all settings of a run as JSON values.

    Files and folders are represented by their contents, because the same file may have another path
    on another machine.
    """
    given = {k: v for k, v in arguments(args).items() if k not in NOT_SETTINGS}
    lm, text = bench.lm, bench.feeders.text
    given |= {
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": lm.model.device.type,
        "model": lm.model.fingerprint(),
        "data": digest(bench.rows),
        "sampling": dataclasses.asdict(bench.sampling),
        "math_verify": has_math_verify(),
        "default_steps": lm.default_steps,
    }
    if args.audit:
        given["arms"] = [arm.name for arm in arms]
    if bench.models:
        given["models"] = {name: one.model.fingerprint() for name, one in bench.models.items()}
    if text:
        given["fit_text"] = digest(text)
    if maps := [kind for kind in args.align if kind.endswith(SUFFIX)]:
        for kind in maps:
            lm.aligner(kind)  # raises an error for a wrong file before any work
        given["maps"] = {kind: digest_of(Path(kind).read_bytes()) for kind in maps}
    teams = dict(lm.teams)
    teams |= {name: Team.from_json(name) for name in args.team if name.endswith(".json")}
    if teams:
        given["teams"] = digest({name: dataclasses.asdict(team) for name, team in teams.items()})
    return plain(given)


def run_head(
    args: argparse.Namespace, settings: Record, bench: Bench, arms: Sequence[Arm]
) -> Record:
    """Return the head of a result file: settings, versions and machine."""
    model, on_gpu = bench.lm.model, bench.lm.model.device.type == "cuda"
    gpu = torch.cuda.get_device_name(model.device) if on_gpu else None
    runs_code = args.run_untrusted_code
    return {
        "settings": settings,
        "arguments": arguments(args),
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "questions": len(bench.rows),
        "minimas": minimas.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "math_verify": version("math-verify") if has_math_verify() else None,
        "device": gpu or f"cpu, {platform.processor()}",
        "threads": torch.get_num_threads(),
        "model": {
            "name": model.name,
            "fingerprint": settings["model"],
            "steps": bench.lm.default_steps,
        },
        "git": git_revision(),
        "code": "run in tools/sandbox.py" if runs_code else "not run, so not graded",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def plain(value: Record) -> Record:
    """Return a value after a round trip through JSON. Other types become text."""
    made: Record = json.loads(json.dumps(value, default=str))
    return made


def digest(value: Any) -> str:
    """Return a digest of a JSON value."""
    return digest_of(json.dumps(value, sort_keys=True).encode())


def digest_of(data: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def git_revision() -> str | None:
    """Return the commit of the checkout, with "-dirty" if files differ, or None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
