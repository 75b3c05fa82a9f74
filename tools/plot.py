"""Pictures of what tools/evaluate.py has found, each as SVG and PNG with the numbers beside it as JSON.

    python tools/plot.py steps RUN [RUN …] --out docs/pictures/steps        # loss and accuracy by number of thoughts
    python tools/plot.py costs RUN [RUN …] --paper paper_tables.json --task GSM8K --out docs/pictures/costs
    python tools/plot.py audit RUN --out docs/pictures/audit                # every arm's difference, as a forest plot
    python tools/plot.py thoughts --model DIR --data FILE.jsonl --align ridge,prenorm --out docs/pictures/thoughts
    python tools/plot.py again docs/pictures/steps.json --out elsewhere     # from the numbers, without the run

Writes OUT.json, OUT.svg and OUT.png. Needs matplotlib: pip install 'minimas[plot]'.
Does not know: how the numbers come about (figures.py).
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # minimas from the checkout

import figures  # noqa: E402
from evaluate import Parser, kind_of_map, several, single_value, whole  # noqa: E402
from figures import Figure  # noqa: E402
from ledger import write_whole  # noqa: E402
from tasks import kind_of, read_rows  # noqa: E402

import minimas  # noqa: E402

# Okabe and Ito's colours, which the colour-blind tell apart; black is for what all is compared with.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#B8A800",
    "#8C564B",
    "#332288",
)
MARKS = {"single": "o", "text_mas": "s", "latent_mas": "D"}
CONTROL_MARKS = dict(zip(figures.CONTROLS.values(), "vXs", strict=True))
SETTINGS = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
    "legend.fontsize": 8, "svg.hashsalt": "minimas", "figure.facecolor": "white",
}  # fmt: skip
MAPS = "ridge,prenorm,identity,fitted,token,pause,random"  # whose thoughts are drawn, if nothing else is asked
ORDER = (
    "ridge prenorm fitted token pause random mean soft gumbel identity".split()
)  # of colours, in all pictures
SMALL = 0.1  # a loss below it is drawn on a linear scale, above it on a logarithmic one


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        figure = collect(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            args.out.with_name(args.out.name + ".json"),
            json.dumps(figure, ensure_ascii=False) + "\n",
        )
        draw(figure, args.out)
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"plot: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    what = top.add_subparsers(dest="what", required=True, parser_class=Parser)
    for name, count in (("steps", "+"), ("costs", "+"), ("audit", 1)):
        command = what.add_parser(name)
        command.add_argument(
            "runs", type=Path, nargs=count, metavar="RUN", help="folder of results"
        )
    what.choices["costs"].add_argument(
        "--paper", type=Path, metavar="FILE", help="the paper's tables, beside ours"
    )
    what.choices["costs"].add_argument("--task", default="GSM8K", help="(default: %(default)s)")
    command = what.add_parser("thoughts")
    command.add_argument("--model", "-m", default="weights/tiny")
    command.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl", help="questions")
    command.add_argument(
        "--limit", type=single_value(whole(1)), default=8, help="so many (default: %(default)s)"
    )
    command.add_argument(
        "--align",
        type=several(kind_of_map),
        default=several(kind_of_map)(MAPS),
        help="list of maps",
    )
    command.add_argument(
        "--steps", type=single_value(whole(2)), default=80, help="(default: %(default)s)"
    )
    command.add_argument("--dtype", default="auto")
    command.add_argument("--device", default="auto")
    command = what.add_parser("again")
    command.add_argument("numbers", type=Path, metavar="FILE.json")
    for command in what.choices.values():
        command.add_argument(
            "--out", type=Path, required=True, metavar="OUT", help="path without an ending"
        )
    return top


def collect(args: argparse.Namespace) -> Figure:
    if args.what == "steps":
        return figures.steps(figures.runs(args.runs))
    if args.what == "costs":
        paper = json.loads(args.paper.read_text(encoding="utf-8")) if args.paper else None
        return figures.costs(figures.runs(args.runs), paper, args.task)
    if args.what == "audit":
        return figures.forest(figures.runs(args.runs))
    if args.what == "thoughts":
        rows = read_rows(args.data)[: args.limit]
        kind = kind_of(rows[0])
        lm = minimas.load(args.model, device=args.device, dtype=args.dtype)
        questions = [row["question"] for row in rows if kind_of(row) == kind]
        return figures.thoughts(lm, questions, args.align, args.steps, kind)
    figure = json.loads(args.numbers.read_text(encoding="utf-8"))
    if not isinstance(figure, dict) or figure.get("what") not in DRAWN:
        raise ValueError(
            f"{args.numbers}: what: found no picture's name, expected one of {', '.join(DRAWN)}"
        )
    return figure


def draw(figure: Figure, out: Path) -> None:
    """Write OUT.svg and OUT.png; the same figure gives the same bytes."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError("matplotlib is missing; pip install 'minimas[plot]'") from error
    with rc_context(SETTINGS):
        canvas = Canvas(layout="constrained")
        DRAWN[figure["what"]](figure, canvas)
        canvas.savefig(out.with_name(out.name + ".svg"), metadata={"Date": None})
        canvas.savefig(out.with_name(out.name + ".png"), dpi=150)


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name; the maps in all pictures the same."""
    order = dict.fromkeys([*ORDER, *(name for name in names if name not in CONTROL_MARKS)])
    colour_of = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(order)}
    return colour_of | dict.fromkeys(CONTROL_MARKS, "#222222")


def draw_steps(figure: Figure, canvas: Any) -> None:
    panels = {metric: lines for metric, lines in figure["panels"].items() if lines}
    canvas.set_size_inches(1.6 + 4.4 * len(panels), 3.6)
    named = dict.fromkeys(name for lines in panels.values() for name in lines)
    colour_of, shown = colours(named), {}
    for axes, (metric, lines) in zip(
        canvas.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        alone = [name for name in lines if sum(point["steps"] > 0 for point in lines[name]) == 1]
        for name in sorted(lines, key=list(colour_of).index):
            points, colour = lines[name], colour_of[name]
            x, y, low, high = (
                [point[key] for point in points] for key in ("steps", "y", "low", "high")
            )
            if len([count for count in x if count]) > 1:
                mark = CONTROL_MARKS.get(name, "o")
                shown[name] = axes.plot(x, y, f"{mark}-", color=colour, markersize=3.5)[0]
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            else:  # ran with one number of thoughts; several of them stand beside each other
                errors = [[y[-1] - low[-1]], [high[-1] - y[-1]]]
                apart = 0.85 * 1.35 ** (
                    alone.index(name) / max(1, len(alone) - 1)
                )  # around where they belong
                mark = CONTROL_MARKS.get(name, "o")
                style = {
                    "fmt": mark,
                    "markersize": 4,
                    "linewidth": 1,
                    "color": colour,
                    "capsize": 2,
                }
                shown[name] = axes.errorbar([x[-1] * apart], y[-1:], errors, **style)
        counts = sorted({point["steps"] for points in lines.values() for point in points})
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("thoughts of each agent (latent steps)")
        n = max(point["n"] for points in lines.values() for point in points)
        if metric == "nll":
            scale_of_losses(axes, "y")
            axes.set_ylabel("gold NLL − prompts only, nats a token")
            axes.set_title(f"Loss of the gold solution, n = {n}: lower is better")
        else:
            axes.set_ylim(-0.03, 1.03)
            axes.set_ylabel("right, 95 % interval")
            axes.set_title(f"Accuracy, n = {n}")
    canvas.legend(shown.values(), shown, loc="outside right upper")


def scale_of_losses(axes: Any, which: str) -> None:
    """Linear near 0, logarithmic beyond: one picture for harms of 2 and gains of 0.02; a line where nothing differs."""
    getattr(axes, f"set_{which}scale")("symlog", linthresh=SMALL, linscale=1.5)
    low, high = getattr(axes, f"get_{which}lim")()
    small = (0.05,) if max(-low, high) > SMALL else (0.005, 0.01, 0.02, 0.05)
    ticks = [sign * size for sign in (-1, 1) for size in (*small, 0.1, 0.3, 1, 3, 10)]
    ticks = sorted(tick for tick in [0, *ticks] if low <= tick <= high)
    getattr(axes, f"set_{which}ticks")(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis=which, color="#DDDDDD", linewidth=0.6)
    (axes.axhline if which == "y" else axes.axvline)(0, color="black", linewidth=0.8)


def draw_costs(figure: Figure, canvas: Any) -> None:
    rows = 2 if figure["paper"] else 1
    canvas.set_size_inches(10, 3.2 * rows)
    grid = canvas.subplots(rows, 2, squeeze=False)
    shown: dict[str, Any] = {}
    for axes, what in zip(grid[0], ("written", "seconds"), strict=True):
        for place, arm in enumerate(figure["arms"]):
            errors = [[arm["y"] - arm["low"]], [arm["high"] - arm["y"]]]
            mark = (
                MARKS[arm["method"]]
                if len(figure["arms"]) <= len(COLOURS)
                else "oDsv^<>pP*Xdh8"[place % 14]
            )
            style = {
                "fmt": mark,
                "color": COLOURS[place % len(COLOURS)],
                "markersize": 5,
                "capsize": 2,
            }
            shown[arm["name"]] = axes.errorbar([arm[what]], [arm["y"]], errors, **style)
        label = {"written": "tokens written a question", "seconds": "seconds a question"}[what]
        axes.set(xlabel=label, ylabel="right, 95 % interval", ylim=(-0.03, 1.03))
        axes.set_xlim(left=0)
        n = sorted({arm["n"] for arm in figure["arms"]})
        axes.set_title(
            f"Measured here, {figure['model']}, n = {n[0]}{f' to {n[-1]}' * (len(n) > 1)}"
        )
    canvas.legend(shown.values(), shown, loc="outside right upper")
    if rows == 1:
        return
    names = dict.fromkeys(point["name"] for point in figure["paper"])
    for axes, what in zip(grid[1], ("written", "seconds"), strict=True):
        for name in names:
            mine = [point for point in figure["paper"] if point["name"] == name]
            axes.plot(
                [p[what] for p in mine],
                [p["y"] for p in mine],
                MARKS[name],
                color="#444444",
                label=name,
            )
            for point in mine:
                place = (point[what], point["y"])
                axes.annotate(
                    point["model"], place, xytext=(5, 3), textcoords="offset points", fontsize=7
                )
        label = {"written": "tokens a question", "seconds": "seconds a run"}[what]
        axes.set(xlabel=label, ylabel="right")
        axes.set_xlim(left=0)
        axes.margins(x=0.1, y=0.1)
        axes.set_title(f"The paper: {figure['task']}, Qwen3")
    grid[1][0].legend(loc="best")


def draw_forest(figure: Figure, canvas: Any) -> None:
    panels = {metric: panel for metric, panel in figure["panels"].items() if panel["arms"]}
    rows = max(len(panel["arms"]) for panel in panels.values())
    canvas.set_size_inches(5.4 * len(panels), 1.1 + 0.27 * rows)
    grid = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axes, (metric, panel) in zip(grid, panels.items(), strict=True):
        names = list(panel["arms"])[::-1]
        for place, name in enumerate(names):
            line, better = panel["arms"][name], -1 if metric == "nll" else 1
            colour = (
                "#7F7F7F"
                if line["p"] >= figure["alpha"]
                else COLOURS[0 if line["mean"] * better > 0 else 1]
            )
            errors = [[line["mean"] - line["low"]], [line["high"] - line["mean"]]]
            axes.errorbar(
                [line["mean"]], [place], xerr=errors, fmt="o", color=colour, markersize=4, capsize=2
            )
        axes.set_yticks(range(len(names)), names)
        axes.margins(x=0.08)
        n = max(line["n"] for line in panel["arms"].values())
        if metric == "nll":
            scale_of_losses(axes, "x")
            axes.set_xlabel(f"gold NLL − {panel['against']}, nats a token: lower is better")
        else:
            axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel(f"accuracy − {panel['against']}: higher is better")
        axes.set_title(f"n = {n}; blue: better, orange: worse (p < {figure['alpha']:g})")


def draw_thoughts(figure: Figure, canvas: Any) -> None:
    canvas.set_size_inches(10.5, 7)
    (places, norms), (following, nearest) = canvas.subplots(2, 2)
    tokens, maps, shown = figure["tokens"], figure["maps"], {}
    colour_of, numbers = colours(maps), range(1, figure["steps"] + 1)
    # Rasterized: thousands of dots as paths would make a heavy file.
    dots = {"linewidths": 0, "rasterized": True}
    places.scatter(*zip(*tokens["places"], strict=True), s=2, color="#BBBBBB", **dots)
    for place, (name, one) in enumerate(maps.items()):
        points = [place for question in one["places"] for place in question]
        places.scatter(*zip(*points, strict=True), s=5, color=colour_of[name], alpha=0.6, **dots)
        # Ever thinner: of maps that are the same, both are seen.
        style = {"color": colour_of[name], "linewidth": max(0.8, 4 - 1.2 * place)}
        [shown[name]] = norms.plot(numbers, one["norm before rescaling"], **style)
        following.plot(numbers[1:], one["successive cosine"], **style)
        nearest.plot(numbers, one["cosine to the nearest token"], **style)
    shown["a token's embedding"] = norms.axhline(
        tokens["norm"], color="black", linewidth=0.8, linestyle="--"
    )
    norms.set_yscale("log")
    places.set(
        title="Thoughts, and token embeddings in grey",
        xlabel="first main direction",
        ylabel="second",
    )
    norms.set(title="Norm of the mapped state, before rescaling", xlabel="thought")
    following.set(title="Cosine to the thought before", xlabel="thought", ylim=(-0.1, 1.05))
    nearest.set(title="Cosine to the nearest token embedding", xlabel="thought", ylim=(-0.1, 1.05))
    canvas.legend(shown.values(), shown, loc="outside right upper")
    canvas.suptitle(
        f"{figure['model']}: {figure['steps']} thoughts on {figure['questions']} questions"
    )


DRAWN = {"steps": draw_steps, "costs": draw_costs, "forest": draw_forest, "thoughts": draw_thoughts}

if __name__ == "__main__":
    sys.exit(main())
