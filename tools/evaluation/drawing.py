"""Draw the pictures of tools/plot.py with matplotlib, from the numbers of figures.py.

This module does not compute the numbers.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .figures import CONTROLS, Figure

# The colours of Okabe and Ito, which colour-blind people can distinguish, and a few more.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800",
    "#8C564B", "#332288",
)  # fmt: skip
BETTER, WORSE, NOT_FOUND = COLOURS[0], COLOURS[1], "#7F7F7F"
GRID = {"color": "#DDDDDD", "linewidth": 0.6}
ZERO = {"color": "black", "linewidth": 0.8}
MARKS = {"single": "o", "text_mas": "s", "latent_mas": "D"}
MANY_MARKS = "oDsv^<>pP*Xdh8"
CONTROL_MARKS = dict(zip(CONTROLS.values(), "vXs", strict=True))
SETTINGS: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "legend.frameon": False, "legend.fontsize": 8, "svg.hashsalt": "minimas",
    "figure.facecolor": "white",
}  # fmt: skip
ORDER = "ridge prenorm fitted token pause random mean soft gumbel identity".split()  # of colours
LINEAR_BELOW = 0.1  # differences of losses: linear scale below, logarithmic scale above


def draw(
    figure: Figure, out: Path, drawn: Mapping[str, Callable[[Figure, Any], None]] | None = None
) -> None:
    """Write OUT.svg and OUT.png. The same figure always gives the same bytes.

    `drawn` has the function that draws each kind of figure (None: `DRAWN`). Raises ImportError
    with the command that installs matplotlib if it is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError("matplotlib is missing; pip install matplotlib") from error
    with rc_context(SETTINGS):
        canvas = Canvas(layout="constrained")
        (drawn or DRAWN)[figure["what"]](figure, canvas)
        canvas.savefig(out.with_name(out.name + ".svg"), metadata={"Date": None})
        canvas.savefig(out.with_name(out.name + ".png"), dpi=150)


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name. A map has the same colour in all pictures."""
    others = [name for name in names if name not in CONTROL_MARKS]
    order = dict.fromkeys([*ORDER, *others])
    colour_of = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(order)}
    return colour_of | dict.fromkeys(CONTROL_MARKS, "#222222")


def error_of(line: Any, value: str) -> list[list[float]]:
    """Return the lengths of an error bar from `value` to "low" and to "high"."""
    return [[line[value] - line["low"]], [line["high"] - line[value]]]


# -- by number of thoughts --------------------------------------------------------------------


def draw_steps(figure: Figure, canvas: Any) -> None:
    """Draw loss and accuracy by the number of latent steps, with one line per map."""
    panels = {metric: lines for metric, lines in figure["panels"].items() if lines}
    canvas.set_size_inches(1.6 + 4.4 * len(panels), 3.6)
    colour_of = colours(dict.fromkeys(name for lines in panels.values() for name in lines))
    shown: dict[str, Any] = {}
    grid = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axes, (metric, lines) in zip(grid, panels.items(), strict=True):
        shown |= draw_lines(axes, lines, colour_of)
        every_point = [point for points in lines.values() for point in points]
        counts = sorted({point["steps"] for point in every_point})
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("thoughts of each agent (latent steps)")
        n = max(point["n"] for point in every_point)
        if metric == "nll":
            scale_of_losses(axes, "y")
            axes.set_ylabel("gold NLL − prompts only, nats per token")
            axes.set_title(f"Loss of the gold solution, n = {n}: lower is better")
        else:
            axes.set_ylim(-0.03, 1.03)
            axes.set_ylabel("right, 95 % interval")
            axes.set_title(f"Accuracy, n = {n}")
    canvas.legend(shown.values(), shown, loc="outside right upper")


def draw_lines(axes: Any, lines: Figure, colour_of: dict[str, str]) -> dict[str, Any]:
    """Draw the lines of one panel. A line with only one point is drawn as a point.

    Returns name -> artist for the legend.
    """
    shown: dict[str, Any] = {}
    single = [name for name in lines if len(lines[name]) == 1]
    for name in sorted(lines, key=list(colour_of).index):
        points, colour, mark = lines[name], colour_of[name], CONTROL_MARKS.get(name, "o")
        x = [point["steps"] for point in points]
        if len(x) > 1:
            y, low, high = ([point[key] for point in points] for key in ("y", "low", "high"))
            shown[name] = axes.plot(x, y, f"{mark}-", color=colour, markersize=3.5)[0]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            continue
        # Several points with the same number of steps are drawn side by side.
        apart = 1.0
        if len(single) > 1:
            apart = 0.85 * 1.35 ** (single.index(name) / (len(single) - 1))
        [last] = points
        style = {"fmt": mark, "markersize": 4, "linewidth": 1, "color": colour, "capsize": 2}
        errors = error_of(last, "y")
        shown[name] = axes.errorbar([last["steps"] * apart], [last["y"]], errors, **style)
    return shown


def scale_of_losses(axes: Any, which: str) -> None:
    """Make an axis linear near 0 and logarithmic elsewhere, with a line at 0.

    So one picture can show both a rise of 2 and a fall of 0.02.
    """
    getattr(axes, f"set_{which}scale")("symlog", linthresh=LINEAR_BELOW, linscale=1.5)
    low, high = getattr(axes, f"get_{which}lim")()
    small = (0.05,) if max(-low, high) > LINEAR_BELOW else (0.005, 0.01, 0.02, 0.05)
    sizes = [*small, 0.1, 0.3, 1, 3, 10]
    ticks = sorted([-size for size in sizes] + [0] + sizes)
    ticks = [tick for tick in ticks if low <= tick <= high]
    getattr(axes, f"set_{which}ticks")(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis=which, **GRID)
    (axes.axhline if which == "y" else axes.axvline)(0, **ZERO)


# -- what an answer costs ---------------------------------------------------------------------


def draw_costs(figure: Figure, canvas: Any) -> None:
    """Draw accuracy by generated tokens and by seconds, and below it the paper's table if given."""
    rows = 2 if figure["paper"] else 1
    canvas.set_size_inches(10, 3.2 * rows)
    grid = canvas.subplots(rows, 2, squeeze=False)
    shown = draw_our_costs(figure, grid[0])
    canvas.legend(shown.values(), shown, loc="outside right upper")
    if figure["paper"]:
        draw_the_papers_costs(figure, grid[1])


def draw_our_costs(figure: Figure, panels: Any) -> dict[str, Any]:
    """Draw one point per arm in two panels. Returns name -> artist for the legend."""
    shown: dict[str, Any] = {}
    arms = figure["arms"]
    labels = {"written": "generated tokens per question", "seconds": "seconds per question"}
    for axes, (what, label) in zip(panels, labels.items(), strict=True):
        for place, arm in enumerate(arms):
            many = len(arms) > len(COLOURS)  # colours repeat, so marks must differ
            mark = MANY_MARKS[place % len(MANY_MARKS)] if many else MARKS[arm["method"]]
            colour = COLOURS[place % len(COLOURS)]
            style = {"fmt": mark, "color": colour, "markersize": 5, "capsize": 2}
            bar = axes.errorbar([arm[what]], [arm["y"]], error_of(arm, "y"), **style)
            shown[arm["name"]] = bar
        axes.set(xlabel=label, ylabel="right, 95 % interval", ylim=(-0.03, 1.03))
        axes.set_xlim(left=0)
        n = sorted({arm["n"] for arm in arms})
        count = f"{n[0]} to {n[-1]}" if len(n) > 1 else f"{n[0]}"
        axes.set_title(f"Measured here, {figure['model']}, n = {count}")
    return shown


def draw_the_papers_costs(figure: Figure, panels: Any) -> None:
    """Draw the paper's table in two panels, with one mark per method."""
    names = dict.fromkeys(point["name"] for point in figure["paper"])
    labels = {"written": "tokens per question", "seconds": "seconds per run"}
    for axes, (what, label) in zip(panels, labels.items(), strict=True):
        for name in names:
            points = [point for point in figure["paper"] if point["name"] == name]
            x, y = [p[what] for p in points], [p["y"] for p in points]
            axes.plot(x, y, MARKS[name], color="#444444", label=name)
            for point in points:
                place = (point[what], point["y"])
                style = {"xytext": (5, 3), "textcoords": "offset points", "fontsize": 7}
                axes.annotate(point["model"], place, **style)
        axes.set(xlabel=label, ylabel="right")
        axes.set_xlim(left=0)
        axes.margins(x=0.1, y=0.1)
        axes.set_title(f"The paper: {figure['task']}, Qwen3")
    panels[0].legend(loc="best")


# -- an audit ---------------------------------------------------------------------------------


def draw_forest(figure: Figure, canvas: Any) -> None:
    """Draw the paired difference of each arm with its interval, one panel per metric."""
    panels = {metric: panel for metric, panel in figure["panels"].items() if panel["arms"]}
    rows = max(len(panel["arms"]) for panel in panels.values())
    canvas.set_size_inches(5.4 * len(panels), 1.1 + 0.27 * rows)
    grid = canvas.subplots(1, len(panels), squeeze=False)[0]
    alpha = figure["alpha"]
    for axes, (metric, panel) in zip(grid, panels.items(), strict=True):
        names = list(panel["arms"])[::-1]
        for place, name in enumerate(names):
            line = panel["arms"][name]
            better = (line["mean"] < 0) if metric == "nll" else (line["mean"] > 0)
            colour = NOT_FOUND if line["p"] >= alpha else BETTER if better else WORSE
            style = {"fmt": "o", "color": colour, "markersize": 4, "capsize": 2}
            axes.errorbar([line["mean"]], [place], xerr=error_of(line, "mean"), **style)
        axes.set_yticks(range(len(names)), names)
        axes.margins(x=0.08)
        n = max(line["n"] for line in panel["arms"].values())
        if metric == "nll":
            scale_of_losses(axes, "x")
            axes.set_xlabel(f"gold NLL − {panel['against']}, nats per token: lower is better")
        else:
            axes.grid(axis="x", **GRID)
            axes.axvline(0, **ZERO)
            axes.set_xlabel(f"accuracy − {panel['against']}: higher is better")
        axes.set_title(f"n = {n}; blue: better, orange: worse (p < {alpha:g})")


# -- how thoughts drift, and the attention on them ----------------------------------------------


def draw_drift(figure: Figure, canvas: Any) -> None:
    """Draw the cosine of successive thoughts by step, and the attention on them by layer."""
    canvas.set_size_inches(9, 3.6)
    cosines, attention = canvas.subplots(1, 2)
    shown: dict[str, Any] = {}
    for place, (name, arm) in enumerate(figure["arms"].items()):
        style = {"color": COLOURS[place % len(COLOURS)], "linewidth": 1.6}
        # The first thought has no previous thought.
        steps = range(2, len(arm["cosines"]) + 2)
        [shown[name]] = cosines.plot(steps, arm["cosines"], **style)
        attention.plot(range(len(arm["attention"])), arm["attention"], **style)
    cosines.set(title="Cosine to the previous thought", xlabel="thought", ylim=(-0.1, 1.05))
    attention.set(title="The last agent's attention on all thoughts", xlabel="layer")
    attention.set_ylim(bottom=0)
    for axes in (cosines, attention):
        axes.grid(axis="y", **GRID)
        axes.xaxis.get_major_locator().set_params(integer=True)
    canvas.legend(shown.values(), shown, loc="outside lower center", ncols=2)
    canvas.suptitle(f"{figure['questions']} questions")


# -- where thoughts lie -----------------------------------------------------------------------


def draw_thoughts(figure: Figure, canvas: Any) -> None:
    """Draw thoughts among token embeddings, and their norms and cosines by step."""
    canvas.set_size_inches(10.5, 7)
    (places, norms), (following, nearest) = canvas.subplots(2, 2)
    tokens, maps = figure["tokens"], figure["maps"]
    colour_of, numbers = colours(maps), range(1, figure["steps"] + 1)
    shown: dict[str, Any] = {}
    # The dots are rasterized, because thousands of paths would make the file large.
    dots = {"linewidths": 0, "rasterized": True}
    places.scatter(*zip(*tokens["places"], strict=True), s=2, color="#BBBBBB", **dots)
    for number, (name, one) in enumerate(maps.items()):
        colour = colour_of[name]
        points = [place for question in one["places"] for place in question]
        places.scatter(*zip(*points, strict=True), s=5, color=colour, alpha=0.6, **dots)
        # Later lines are thinner, so that two equal lines are both visible.
        style = {"color": colour, "linewidth": max(0.8, 4 - 1.2 * number)}
        [shown[name]] = norms.plot(numbers, one["norm before rescaling"], **style)
        following.plot(numbers[1:], one["successive cosine"], **style)
        nearest.plot(numbers, one["cosine to the nearest token"], **style)
    shown["a token's embedding"] = norms.axhline(tokens["norm"], linestyle="--", **ZERO)
    norms.set_yscale("log")
    cosines = {"xlabel": "thought", "ylim": (-0.1, 1.05)}
    places.set(title="Thoughts, and token embeddings in grey")
    places.set(xlabel="first main direction", ylabel="second")
    norms.set(title="Norm of the mapped state, before rescaling", xlabel="thought")
    following.set(title="Cosine to the previous thought", **cosines)
    nearest.set(title="Cosine to the nearest token embedding", **cosines)
    canvas.legend(shown.values(), shown, loc="outside right upper")
    what = f"{figure['steps']} thoughts on {figure['questions']} questions"
    canvas.suptitle(f"{figure['model']}: {what}")


DRAWN = {
    "steps": draw_steps,
    "costs": draw_costs,
    "forest": draw_forest,
    "drift": draw_drift,
    "thoughts": draw_thoughts,
}
