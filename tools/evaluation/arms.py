"""Define arms: settings with which questions are answered.

Each arm of an audit differs from the full arm in one setting, so that a difference has one cause.
"Memory" is the KV cache that the last agent gets.

    full             the team with all its settings
    prompts only     0 latent steps, so the memory holds only the prompts
    none             the memory is dropped
    shuffled         the memory of another question
    thoughts only    prompts are removed from the memory before the next agent
    one step         one latent step per agent
    random map       the same number of slots, with thoughts from a random map
    a kind of map    another feeder, see feeders.py
    single           one agent instead of a team
    same seconds     a vote over as many answers of one agent as fit in the team's time

This module does not use models, and does not run the arms.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minimas.teams import LAYOUTS

METHODS = ("single", "text_mas", "latent_mas")
METRICS = ("accuracy", "nll")
LATENT_SETTINGS = ("team", "latent_steps", "align", "transfer", "close", "prefix", "layout")
# The settings that each method uses. Other settings stay None, so that a grid has no arm twice.
SETTINGS = {"single": (), "text_mas": ("team",), "latent_mas": LATENT_SETTINGS}
# Settings that have no effect on the last agent if no KV cache is handed over.
WITHOUT_EFFECT: tuple[str, ...] = ("latent_steps", "align", "close", "prefix", "layout")
AUDIT_MAPS = ("prenorm", "mean", "fitted", "soft", "gumbel", "token", "pause")
SAME_SECONDS = "same seconds"


@dataclass(frozen=True)
class Arm:
    """A method and its settings. A setting that the method does not use is None.

    `name` is unique in a run. If `latent_steps` is None, the agents' or the model's default is
    used; if `layout` is None, the team's layout. `prefix` replaces the prefix of every agent except
    the last one (None: the agents' own prefixes). `samples` is the number of answers to vote on.
    """

    name: str
    method: str = "latent_mas"
    metric: str = "accuracy"
    team: str | None = None
    latent_steps: int | str | None = None
    align: str | None = None
    transfer: str | None = None
    close: bool | None = None
    prefix: str | None = None
    layout: str | None = None
    samples: int = 1


def grid(thinks_last: bool = False, **lists: Sequence[Any]) -> list[Arm]:
    """Return one arm for each combination of values. `lists` has values for fields of `Arm`.

    Combinations with the same effect give one arm. `thinks_last` means that the last agent has
    latent steps too, so that settings have an effect even if no KV cache is handed over.
    """
    arms: dict[tuple[Any, ...], Arm] = {}
    for values in itertools.product(*lists.values()):
        given = dict(zip(lists, values, strict=True))
        used = {"method", "metric", *SETTINGS[given["method"]]}
        kept = {name: value for name, value in given.items() if name in used}
        dropped = WITHOUT_EFFECT if kept.get("transfer") == "none" and not thinks_last else ()
        # The other layouts change the last agent's prompt too.
        if kept.get("layout") not in (None, *LAYOUTS):
            dropped = tuple(name for name in dropped if name != "layout")
        kept |= {name: lists[name][0] for name in dropped if name in lists}
        if kept.get("latent_steps") == 0:
            kept.pop("align", None)  # without latent steps no map is used
        if kept.get("layout") == "turn":
            kept.pop("close", None)  # there is only one turn
        # The name has only settings that distinguish arms: those with several values and an effect.
        told = [given["method"]]
        for name, value in kept.items():
            if len(lists[name]) > 1 and name not in ("method", *dropped):
                told.append(f"{name}={value}")
        arms.setdefault(tuple(kept.items()), Arm(" ".join(told), **kept))
    return list(arms.values())


def full_arm(lists: Mapping[str, Sequence[Any]]) -> Arm:
    """Return the full arm of an audit from one value per setting and the first of the maps.

    Raises ValueError naming the flag of a setting whose values an audit cannot use.
    """
    fixed = {"transfer": ["full"], "method": ["latent_mas"]}
    for name, values in lists.items():
        only = fixed.get(name)
        if name != "align" and (len(values) > 1 or (only and values != only)):
            flag = f"{name} (--{name.replace('_', '-')})"
            expected = f"expected {only or 'a single value'} in an audit"
            raise ValueError(f"{flag}: found {values}, {expected}")
    return Arm("full", **{name: values[0] for name, values in lists.items()})


def audit_arms(
    full: Arm, maps: Sequence[str], metrics: Sequence[str], chosen: Sequence[str] | None = None
) -> list[Arm]:
    """Return the arms of an audit, named "METRIC: NAME", the most important ones first.

    `maps` are additional kinds of map. `chosen` has the names of the arms to return (None: all).
    Raises ValueError for an unknown name.
    """
    arms = [
        full,
        replace(full, name="prompts only", latent_steps=0),
        replace(full, name="none", transfer="none"),
        replace(full, name="shuffled", transfer="shuffled"),
        replace(full, name="thoughts only", transfer="latents"),
        replace(full, name="one step", latent_steps=1),
        replace(full, name="random map", align="random"),
        *(replace(full, name=kind, align=kind) for kind in maps if kind != full.align),
        Arm("single", method="single"),
    ]
    names = [*(arm.name for arm in arms), SAME_SECONDS]
    chosen = names if chosen is None else chosen
    for name in chosen:
        if name not in names:
            expected = f"expected some of {', '.join(names)}"
            raise ValueError(f"arms (--arms): found {name!r}, {expected}")
    found = [
        replace(arm, name=f"{metric}: {arm.name}", metric=metric)
        for metric in metrics
        for arm in arms
        if arm.name in chosen
    ]
    if "accuracy" in metrics and SAME_SECONDS in chosen:
        found.append(Arm(f"accuracy: {SAME_SECONDS}", method="single"))
    return found
