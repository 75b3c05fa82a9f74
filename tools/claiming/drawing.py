"""Draw the pictures of tools/claims.py with matplotlib, from the figures of the findings.

This module does not depend on how the figures are measured.
"""

from typing import Any

from tools.evaluation.drawing import (
    BETTER,
    COLOURS,
    GRID,
    NOT_FOUND,
    WORSE,
    ZERO,
    draw_steps,
    error_of,
    scale_of_losses,
)
from tools.evaluation.figures import Figure

MAPS = {"ridge": BETTER, "identity": WORSE, "none": COLOURS[2], "random": NOT_FOUND}
SIZE = (6.4, 3.0)  # inches, of two panels
DOTS = {"linewidths": 0, "rasterized": True}
PARTS = {"read": "prefilled", "thought": "thoughts", "written": "generated"}


def draw_lossless(figure: Figure, canvas: Any) -> None:
    """Draw the differences for each question, of the hand-over and of the controls."""
    canvas.set_size_inches(5.2, 2.6)
    axes = canvas.subplots()
    names = [name for name in figure["by question"][0] if name != "positions"]
    for place, name in enumerate(names[::-1]):
        for part, mark in (("hidden states", "o"), ("logits", "x"), ("KV cache", "+")):
            found = [one[name][part] for one in figure["by question"]]
            style = {"color": BETTER if name == "hand-over" else WORSE, "markersize": 4}
            label = part if name == "hand-over" else None
            axes.plot(found, [place] * len(found), mark, label=label, **style)
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.set_xscale("log")
    axes.set_xlabel("largest difference from explicit input, relative, float64")
    axes.grid(axis="x", **GRID)
    axes.legend(loc="upper right")


def draw_expressiveness(figure: Figure, canvas: Any) -> None:
    """Draw the number of tokens that are read by N, with the bound and the controls."""
    canvas.set_size_inches(5.6, 2.8)
    axes = canvas.subplots()
    styles = {"thought": BETTER, "planted": NOT_FOUND, "shuffled": WORSE}
    labels = {"thought": "a thought", "planted": "a linear code", "shuffled": "wrong targets"}
    counts = [line["N"] for line in figure["lines"]["thought"]]
    for name, lines in figure["lines"].items():
        read = [line["read"] for line in lines]
        axes.plot(counts, read, "o-", color=styles[name], markersize=3.5, label=labels[name])
    axes.plot(counts, counts, color="#BBBBBB", linewidth=0.8, label="all N")
    label = f"d / log2 V = {figure['bound']:.1f}"
    axes.axhline(figure["bound"], linestyle="--", **ZERO, label=label)
    axes.set(xlabel="random tokens N", ylabel="tokens read by the probe")
    axes.grid(axis="y", **GRID)
    canvas.legend(loc="outside right upper")


def draw_complexity(figure: Figure, canvas: Any) -> None:
    """Draw FLOPs by thoughts, seconds by thoughts, and the prefill's share."""
    canvas.set_size_inches(8.4, 3.0)
    panels = canvas.subplots(1, 3)
    t = figure["usual"]["t"]
    labels = {"thoughts": "thoughts", "text": "generated tokens"}
    for axes, what in zip(panels, ("counted FLOPs", "measured seconds"), strict=False):
        for place, (name, points) in enumerate(figure[what].items()):
            chosen = [point for point in points if point["t"] == t]
            x, y = [point["m"] for point in chosen], [point["value"] for point in chosen]
            style = {"color": COLOURS[place], "markersize": 3.5, "label": labels[name]}
            axes.plot(x, y, "o-", **style)
        axes.set(xlabel="thoughts or generated tokens m", title=f"{what}, t = {t}")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", **GRID)
    panels[0].legend(loc="best")
    shares = {int(n): share for n, share in figure["prefill's share"].items()}
    panels[2].plot(list(shares), list(shares.values()), "o-", color=COLOURS[2], markersize=3.5)
    panels[2].set_xscale("log", base=2)
    panels[2].set_xticks(list(shares), [str(n) for n in shares])
    panels[2].minorticks_off()
    panels[2].set(xlabel="prompt tokens t", ylim=(0, 1.02))
    panels[2].set_title(f"prefill's share of FLOPs, m = {figure['usual']['m']}")
    panels[2].grid(axis="y", **GRID)


def draw_alignment(figure: Figure, canvas: Any) -> None:
    """Draw each map's accuracy or loss on the model and on its twin."""
    canvas.set_size_inches(SIZE[0], 2.7)
    grid = canvas.subplots(1, 2, sharex=True, sharey=True)
    for axes, (kind, points) in zip(grid, figure["panels"].items(), strict=True):
        names = list(points)[::-1]
        for place, name in enumerate(names):
            style = {"fmt": "o", "color": MAPS.get(name, "#222222"), "markersize": 4, "capsize": 2}
            axes.errorbar([points[name]["y"]], [place], xerr=error_of(points[name], "y"), **style)
        axes.set_yticks(range(len(names)), names)
        if figure["metric"] == "accuracy":
            axes.set(xlabel="right, 95 % interval", xlim=(-0.03, 1.03))
            axes.grid(axis="x", **GRID)
        else:
            scale_of_losses(axes, "x")
            axes.set_xlabel("gold NLL − no thoughts, nats")
        axes.set_title(f"{kind}, n = {points[names[0]]['n']}")


def draw_errors(figure: Figure, canvas: Any) -> None:
    """Draw the rates of both channels with their intervals, for both teams."""
    canvas.set_size_inches(*SIZE)
    kinds = {"flips": "now wrong", "follows": "plan's answer", "recovers": "still right"}
    panels = canvas.subplots(1, 2, sharey=True)
    shown: dict[str, Any] = {}
    for axes, (team, found) in zip(panels, figure["teams"].items(), strict=True):
        for number, (channel, rates) in enumerate(found["rates"].items()):
            for place, name in enumerate(kinds):
                low, high = rates[f"{name}, 95 %"]
                line = {"y": rates[name], "low": low, "high": high}
                style = {"width": 0.32, "color": COLOURS[number], "capsize": 2}
                at = place + 0.36 * number - 0.18
                shown[channel] = axes.bar([at], [line["y"]], yerr=error_of(line, "y"), **style)
        axes.set_xticks(range(len(kinds)), kinds.values())
        axes.set(title=team, ylim=(0, 1.05))
        axes.grid(axis="y", **GRID)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("share of answers right before")
    names = [f"wrong plan by {channel}" for channel in shown]
    canvas.legend(shown.values(), names, loc="outside lower center", ncols=2)


def draw_overlap(figure: Figure, canvas: Any) -> None:
    """Draw thoughts among the tokens of text agents, and what their nearest tokens are."""
    canvas.set_size_inches(*SIZE)
    places, says = canvas.subplots(1, 2, width_ratios=[3, 2])
    for name, cloud in figure["clouds"].items():
        x, y = zip(*cloud["places"], strict=True)
        style = {"s": 5, "color": MAPS[name], "alpha": 0.6, "label": f"thoughts, {name}"}
        places.scatter(x, y, **style, **DOTS)
    x, y = zip(*figure["tokens"]["places"], strict=True)
    places.scatter(x, y, s=10, color="#222222", marker="s", label="tokens in text", **DOTS)
    x, y = zip(*figure["ellipse"], strict=True)
    places.plot(x, y, linestyle="--", **ZERO)
    places.set(title="Plane of the main directions", xticks=[], yticks=[])
    places.legend(loc="best", fontsize=7, markerscale=2)
    bars = {"its own text": "says the token", "another text": "says the next question's"}
    for number, (name, cloud) in enumerate(figure["clouds"].items()):
        for place, field in enumerate(bars.values()):
            line = cloud[field] | {"y": cloud[field]["share"]}
            style = {"width": 0.32, "color": MAPS[name], "capsize": 2}
            at = place + 0.36 * number - 0.18
            says.bar([at], [line["y"]], yerr=error_of(line, "y"), **style)
    says.set_xticks(range(len(bars)), bars)
    says.set(title="Nearest token is that of …", ylim=(0, 1.02))
    says.grid(axis="y", **GRID)
    says.set_axisbelow(True)


def draw_drift(figure: Figure, canvas: Any) -> None:
    """Draw norms and cosines by step, with a line for each map."""
    canvas.set_size_inches(8.4, 3.0)
    norms, nearest, following = canvas.subplots(1, 3)
    shown: dict[str, Any] = {}
    for number, (name, one) in enumerate(figure["maps"].items()):
        style = {"color": MAPS[name], "linewidth": 2.4 - 0.5 * number}
        steps = range(1, len(one["norm"]) + 1)
        [shown[name]] = norms.plot(steps, one["norm before rescaling"], **style)
        nearest.plot(steps, one["cosine to the nearest token"], **style)
        following.plot(steps[1:], one["successive cosine"], **style)
    shown["embedding"] = norms.axhline(figure["embedding norm"], linestyle="--", **ZERO)
    norms.set_yscale("log")
    norms.set(title="Norm before rescaling", xlabel="thought")
    nearest.set(title="Cosine to the nearest token", xlabel="thought", ylim=(-0.1, 1.05))
    following.set(title="Cosine to the previous thought", xlabel="thought", ylim=(-0.1, 1.05))
    canvas.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown))


def draw_speed(figure: Figure, canvas: Any) -> None:
    """Draw the seconds per question by method."""
    draw_bars(figure, canvas, {"seconds": "seconds per question"}, "seconds per question")


def draw_tokens(figure: Figure, canvas: Any) -> None:
    """Draw the positions per question by method and kind."""
    draw_bars(figure, canvas, PARTS, "positions per question")


def draw_bars(figure: Figure, canvas: Any, fields: dict[str, str], label: str) -> None:
    """Draw a bar of stacked fields for each arm, with the share of right answers beside it."""
    canvas.set_size_inches(5.6, 2.6)
    axes = canvas.subplots()
    arms = figure["arms"]
    names = list(arms)[::-1]
    left = dict.fromkeys(names, 0.0)
    for number, (field, said) in enumerate(fields.items()):
        widths = [arms[name][field] for name in names]
        axes.barh(names, widths, left=list(left.values()), color=COLOURS[number], label=said)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    most = max(left.values())
    for place, name in enumerate(names):
        right = f"{arms[name]['right']['y']:.0%} right"
        axes.text(left[name] + 0.02 * most, place, right, va="center", fontsize=7)
    axes.set(xlabel=label, xlim=(0, 1.2 * most))
    axes.grid(axis="x", **GRID)
    axes.set_axisbelow(True)
    if len(fields) > 1:
        canvas.legend(loc="outside upper center", ncols=len(fields))


DRAWN = {
    "expressiveness": draw_expressiveness,
    "complexity": draw_complexity,
    "depth": draw_steps,
    "alignment": draw_alignment,
    "overlap": draw_overlap,
    "drift": draw_drift,
    "errors": draw_errors,
    "speed": draw_speed,
    "tokens": draw_tokens,
    "lossless": draw_lossless,
}
