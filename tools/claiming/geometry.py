"""Measure where thoughts lie: among token embeddings (overlap), and step by step (drift).

B rows   n thoughts   D hidden   V vocabulary
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimas import LM, Team, text_mas
from minimas.agents import choose_team
from tools.evaluation.feeders import Feeders
from tools.evaluation.figures import plane, rounded
from tools.evaluation.last_turn import latent_turn
from tools.evaluation.probe import Tap, walk
from tools.evaluation.rows import Row, kind_of
from tools.evaluation.stats import wilson

from .setting import FAILS, HOLDS, NOT_SHOWN, Finding, Setting, first_and_last

SHOWN = 400  # points of each cloud in the picture
INSIDE = 0.95  # share of the generated tokens that lie in the ellipse
DRIFT_STEPS = 80
DRIFT_MAPS = ("ridge", "identity", "none", "random")
CLOUDS = ("ridge", "random")


def tapped(
    lm: LM, rows: Sequence[Row], kinds: Sequence[str], steps: int, team: Team
) -> dict[str, Tap]:
    """Return the states and thoughts of all agents except the last one, for each kind of map."""
    feeders, questions = Feeders(lm), [row["question"] for row in rows]
    taps = {kind: Tap(feeders(kind)) for kind in kinds}
    asked: dict[str, Any] = {"kind": kind_of(rows[0]), "latent_steps": steps, "team": team}
    asked["choices"] = [row.get("choices") for row in rows]
    for tap in taps.values():
        latent_turn(lm, questions, align=tap, **asked)
    return taps


def vocabulary(lm: LM) -> Tensor:
    """Return the embeddings of all tokens that the tokenizer can produce, (V, D)."""
    w_in: Tensor = lm.model.model.embed_tokens.weight
    return w_in[: lm.tokenizer.size] if lm.tokenizer else w_in


# -- overlap ----------------------------------------------------------------------------------


def measure_overlap(setting: Setting) -> Finding:
    """Return where thoughts lie among the tokens that text agents generate for the same questions.

    "inside" is the share of thoughts inside the ellipse that holds 95 % of the generated tokens, in
    the plane of the two main directions. "says the token" is the share of the first agent's
    thoughts whose nearest token is the one that the same agent generates in text at the same place.
    The control is the text of the next question. The random map shows what any vectors of the same
    length would give.
    """
    lm, rows = setting.lm, setting.rows(tiny=40, other=4)
    if len(rows) < 2:
        raise ValueError("limit (--limit): found one question, expected two or more: the control "
                         "is the text of another one")  # fmt: skip
    team, steps = choose_team(lm, "sequential"), setting.steps(most=20)
    w_in = vocabulary(lm)
    texts = text_mas(
        lm, [row["question"] for row in rows], team=team, kind=kind_of(rows[0]),
        choices=[row.get("choices") for row in rows], sampling=setting.sampling,
    )  # fmt: skip
    assert lm.tokenizer is not None
    written = [[lm.tokenizer.encode(agent.text) for agent in one.agents[:-1]] for one in texts]
    every = [token for agents in written for ids in agents for token in ids]
    if not every:
        raise ValueError("found no text of the agents, expected at least one token")
    tokens = w_in[torch.tensor(every, device=w_in.device)].float()  # (tokens, D)
    taps = tapped(lm, rows, CLOUDS, steps, team)
    clouds = {name: torch.cat(tap.thoughts, 1).float() for name, tap in taps.items()}  # (B, n, D)
    place = plane(torch.cat([tokens, *(cloud.flatten(0, 1) for cloud in clouds.values())]))
    ellipse = Ellipse(torch.tensor(place(tokens)))
    first_texts = [agents[0] for agents in written]
    found: dict[str, Any] = {}
    for name, cloud in clouds.items():
        walked, points = walk(taps[name], w_in), torch.tensor(place(cloud.flatten(0, 1)))
        nearest = nearest_tokens(cloud[:, :steps], w_in)  # (B, steps), of the first agent
        found[name] = {
            "inside": ellipse.share(points),
            "cosine to the nearest token": float(walked["cosine to the nearest token"].mean()),
            "says the token": matches(nearest, first_texts),
            "says the next question's": matches(nearest, [*first_texts[1:], first_texts[0]]),
            "places": rounded(points[spread(len(points))].tolist()),
        }
    chosen = tokens[spread(len(tokens))]
    figures: dict[str, Any] = {
        "questions": len(rows),
        "latent steps": steps,
        "clouds": found,
        "tokens": {"places": place(chosen), "inside": INSIDE, "count": len(every)},
        "ellipse": rounded(ellipse.outline().tolist()),
    }
    return Finding(said_of_overlap(found), verdict_of_overlap(found), figures)


def said_of_overlap(found: dict[str, Any]) -> str:
    """Return the sentence about the overlap."""
    ridge, random = found["ridge"], found["random"]
    same, other = ridge["says the token"], ridge["says the next question's"]
    return (
        f"{ridge['inside']:.1%} of the ridge map's thoughts lie in the ellipse of 95 % of the "
        f"generated tokens (random map: {random['inside']:.1%}); their mean cosine to the nearest "
        f"token is {ridge['cosine to the nearest token']:.2f} (random map: "
        f"{random['cosine to the nearest token']:.2f}); in {same['share']:.1%} of cases the "
        "nearest token is the one that the text agent generates at the same place (another "
        f"question's text: {other['share']:.1%}, random map: "
        f"{random['says the token']['share']:.1%})."
    )


def verdict_of_overlap(found: dict[str, Any]) -> str:
    """Return the verdict: whether thoughts lie inside, and match their own text best."""
    same, other = found["ridge"]["says the token"], found["ridge"]["says the next question's"]
    if found["ridge"]["inside"] < 0.5:
        return FAILS
    return HOLDS if same["low"] > other["high"] else NOT_SHOWN


def nearest_tokens(thoughts: Tensor, w_in: Tensor) -> Tensor:
    """Return the token with the nearest direction, (B, n), for each of the thoughts (B, n, D)."""
    unit = F.normalize(thoughts.flatten(0, 1), dim=-1)
    scores = [unit @ F.normalize(part.float(), dim=-1).T for part in w_in.split(16384)]
    return torch.cat(scores, 1).argmax(-1).view(thoughts.shape[:2])


def matches(nearest: Tensor, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the share of places where the nearest token is that of the text, and its interval."""
    pairs = [
        token == said
        for row, text in zip(nearest.tolist(), texts, strict=True)
        for token, said in zip(row, text, strict=False)
    ]
    low, high = wilson(sum(pairs), len(pairs))
    return {"share": sum(pairs) / max(1, len(pairs)), "low": low, "high": high, "n": len(pairs)}


def spread(count: int) -> Tensor:
    """Return at most `SHOWN` indices below `count`, the same at every call."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SHOWN]


class Ellipse:
    """The ellipse around points of the plane (n, 2) that holds 95 % of them."""

    def __init__(self, points: Tensor) -> None:
        self.middle = points.mean(0)  # (2,)
        centred = (points - self.middle).double()
        covariance = centred.T @ centred / max(1, len(points) - 1)
        self.axes = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(2))
        self.radius = float(self.distance(points).quantile(INSIDE))

    def distance(self, points: Tensor) -> Tensor:
        """Return the distances from the middle in units of the axes, (n,)."""
        centred = (points - self.middle).double().T
        solved = torch.linalg.solve_triangular(self.axes, centred, upper=False)
        lengths: Tensor = torch.linalg.vector_norm(solved, dim=0)
        return lengths

    def share(self, points: Tensor) -> float:
        """Return the share of points that lie inside."""
        return float((self.distance(points) <= self.radius).double().mean())

    def outline(self) -> Tensor:
        """Return points of the ellipse, (n, 2)."""
        angle = torch.linspace(0, 2 * torch.pi, 73, dtype=torch.float64)
        circle = self.radius * torch.stack([angle.cos(), angle.sin()])  # (2, n)
        points: Tensor = (self.axes @ circle).T + self.middle
        return points


# -- drift ------------------------------------------------------------------------------------


def measure_drift(setting: Setting) -> Finding:
    """Return norms and cosines of the first agent's thoughts, step by step, for four maps.

    "shift of the mean" is how far the mean of states or thoughts is from the mean embedding, in
    units of the mean norm of an embedding.
    """
    lm, rows = setting.lm, setting.rows(tiny=24, other=3)
    pair = first_and_last(choose_team(lm, "sequential"))
    w_in = vocabulary(lm)
    norm = float(w_in.float().norm(dim=-1).mean())
    middle = w_in.float().mean(0)
    maps: dict[str, Any] = {}
    for name, tap in tapped(lm, rows, DRIFT_MAPS, DRIFT_STEPS, pair).items():
        walked = {what: value.mean(0).tolist() for what, value in walk(tap, w_in).items()}
        shift = {
            what: float((torch.cat(kept, 1).float().mean((0, 1)) - middle).norm() / norm)
            for what, kept in (("states", tap.states), ("thoughts", tap.thoughts))
        }
        maps[name] = rounded(walked | {"shift of the mean": shift})
    near = "cosine to the nearest token"

    def mean(name: str, what: str) -> float:
        return fmean(maps[name][what])

    ridge, raw = maps["ridge"], maps["none"]
    sentence = (
        f"A state is {raw['state norm'][0] / norm:.2f} times as long as an embedding, a ridge "
        f"thought {ridge['norm'][0] / norm:.2f} times; over {DRIFT_STEPS} steps the mean cosine to "
        f"the nearest token is {mean('ridge', near):.2f} with ridge, {mean('identity', near):.2f} "
        f"with the identity, {mean('none', near):.2f} without a map and {mean('random', near):.2f} "
        f"with a random map; in the same order, the last two thoughts have cosines of "
        f"{ridge['successive cosine'][-1]:.2f}, {maps['identity']['successive cosine'][-1]:.2f}, "
        f"{raw['successive cosine'][-1]:.2f} and {maps['random']['successive cosine'][-1]:.2f}."
    )
    margin = mean("ridge", near) - max(mean(name, near) for name in DRIFT_MAPS[1:])
    figures = {"questions": len(rows), "embedding norm": norm, "maps": maps}
    verdict = HOLDS if margin > 0.05 else NOT_SHOWN if margin > -0.05 else FAILS
    return Finding(sentence, verdict, figures)
