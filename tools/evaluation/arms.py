"""Arms: the settings under which questions are answered. A control arm differs from the full one in
a single setting. Every arm of an audit does so, so that a difference has one cause:

    full             the team as it is
    prompts only     no thoughts (0 latent steps)
    none             the memory is dropped
    shuffled         the memory of another question
    thoughts only    the next agent does not see the prompts
    one step         one thought of each agent
    random map       as many slots, thoughts without a direction
    a kind of map    another feeder, see feeders.py
    single           one agent, no team
    same seconds     that agent's vote over as many samples as the team's time allows

Does not know: models, how an arm is run.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

METHODS = ("single", "text_mas", "latent_mas")
METRICS = ("accuracy", "nll")
LATENT_SETTINGS = ("team", "latent_steps", "align", "transfer", "close", "prefix", "layout")
# Which settings a method uses. The others stay None, so that a grid has no arm twice.
SETTINGS = {"single": (), "text_mas": ("team",), "latent_mas": LATENT_SETTINGS}
# Settings without an effect on the last agent if no memory is handed over.
WITHOUT_EFFECT = ("latent_steps", "align", "close", "prefix", "layout")
AUDIT_MAPS = ("prenorm", "mean", "fitted", "soft", "gumbel", "token", "pause")
SAME_SECONDS = "same seconds"


@dataclass(frozen=True)
class Arm:
    """A method and its settings, None where the method does not use one. `name` is unique in a run.

    `latent_steps` None is the agents' or the model's own number, `layout` None the team's own.
    `prefix` is that of every agent but the last; None: the agents' own. `samples` are answers to
    vote on.
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
    """Return an arm for each combination of settings, by the names of `Arm`'s fields; none twice.

    `thinks_last`: the last agent thinks too, so that its settings distinguish arms without memory.
    """
    arms: dict[tuple[Any, ...], Arm] = {}
    for values in itertools.product(*lists.values()):
        given = dict(zip(lists, values, strict=True))
        used = {"method", "metric", *SETTINGS[given["method"]]}
        kept = {name: value for name, value in given.items() if name in used}
        dropped = WITHOUT_EFFECT if kept.get("transfer") == "none" and not thinks_last else ()
        kept |= {name: lists[name][0] for name in dropped if name in lists}
        if kept.get("latent_steps") == 0:
            kept.pop("align", None)  # without thoughts no map is used
        if kept.get("layout") == "turn":
            kept.pop("close", None)  # there is no turn to close
        # A name lists what distinguishes arms: not lists of one value, not settings of no effect.
        told = [given["method"]]
        for name, value in kept.items():
            if len(lists[name]) > 1 and name not in ("method", *dropped):
                told.append(f"{name}={value}")
        arms.setdefault(tuple(kept.items()), Arm(" ".join(told), **kept))
    return list(arms.values())


def full_arm(lists: Mapping[str, Sequence[Any]]) -> Arm:
    """Return the full arm of an audit, from one value of each setting and the first of the maps.

    Raises ValueError naming the flag of a setting that has other values than an audit's.
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
    """Return an audit's arms, named "METRIC: NAME", the main ones first.

    `maps` are further kinds of map, `chosen` the names of the arms that are wanted (None: all).
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
