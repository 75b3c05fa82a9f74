"""Measure what W_a adds, with the maps ridge, identity, none and random, on a model and its twin.

The model is tied or untied. Its twin is always untied, and computes the same function: the gain of
its final norm is multiplied by a power of two in each dimension, drawn at random, and the columns
of its LM head are divided by the same powers. Powers of two are exact in floating point, so all
logits are equal bit by bit, and only thoughts can differ. This shows that what a model computes
does not determine W_a.

In addition to the answers, the map itself is measured: how far it is from the identity, for the
model and, if the model is untied, for its embeddings tied by hand.

    V vocabulary   D hidden
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minimas import LM, alignment_matrix
from minimas.core.latent import LAMBDA
from tools.evaluation.arms import Arm
from tools.evaluation.figures import Point, paired_point, share_point
from tools.evaluation.stats import p_value, paired

from .setting import FAILS, HOLDS, NOT_SHOWN, Finding, Record, Setting, run_arms, values

MAPS = ("ridge", "identity", "none", "random")
ZERO = "no thoughts"


def measure(setting: Setting) -> Finding:
    """Return accuracy (weights/tiny) or gold NLL of each map, on the model and on its twin."""
    lm, twin = setting.lm, untied_twin(setting.lm, setting.seed)
    rows, metric = setting.rows(tiny=100, other=6), "accuracy" if setting.is_tiny else "nll"
    kind = "tied" if lm.model.config.tie_word_embeddings else "untied"
    names = {kind: lm, "untied twin": twin}
    found = {name: answers(setting, rows, metric, one) for name, one in names.items()}
    differences = {name: against_ridge(records, metric) for name, records in found.items()}
    panels = {name: points(records, metric) for name, records in found.items()}
    w_out, w_in = embeddings(lm)
    geometry = {kind: of_map(w_out, w_in)}
    if kind == "untied":
        geometry["embeddings tied by hand"] = of_map(w_in, w_in)
    same = max(
        abs(first["nll"] - second["nll"])
        for first, second in zip(
            zero_losses(setting, rows, lm), zero_losses(setting, rows, twin), strict=True
        )
    )
    distances = {name: one["from the identity"] for name, one in geometry.items()}
    sentence = (
        f"{said(kind, panels, differences, metric)}; the distance of W_a from the identity is "
        f"{' and '.join(f'{far:.2g} ({name})' for name, far in distances.items())}. "
        f"{said('untied twin', panels, differences, metric)}; the twin has the same logits, so "
        "what a model computes does not determine W_a."
    )
    figure = {
        "metric": metric,
        "panels": panels,
        "ridge − map": differences,
        "map": geometry,
        "twin's largest difference of a loss without thoughts": same,
    }
    return Finding(sentence, verdict(differences[kind]), figure)


def said(kind: str, panels: Mapping[str, Any], differences: Mapping[str, Any], metric: str) -> str:
    """Return what was found about the maps on one model, as a sentence without a full stop."""
    own = panels[kind]
    others = ", ".join(
        f"{value(own[name], metric)} with {name} ({p_value(differences[kind][name])})"
        for name in MAPS[1:]
    )
    return f"{kind.capitalize()}: {value(own['ridge'], metric)} with ridge, {others}"


def answers(setting: Setting, rows: Sequence[Any], metric: str, lm: LM) -> dict[str, list[Record]]:
    """Return the records with each map, and those without thoughts."""
    full = Arm("", metric=metric, team="sequential", transfer="full")
    arms = [replace(full, name=ZERO, latent_steps=0, align="ridge")]
    steps = setting.steps(most=10)
    arms += [replace(full, name=name, latent_steps=steps, align=name) for name in MAPS]
    records = run_arms(setting.bench(rows, lm), arms)
    return {arm.name: [record for record in records if record["arm"] == arm.name] for arm in arms}


def zero_losses(setting: Setting, rows: Sequence[Any], lm: LM) -> list[Record]:
    """Return the records of the first batch, for the gold NLL without thoughts."""
    arm = Arm(ZERO, metric="nll", team="sequential", latent_steps=0, align="ridge")
    return setting.bench(rows, lm).compute(0, replace(arm, transfer="full"), 0)


def points(records: Mapping[str, Sequence[Record]], metric: str) -> dict[str, Point]:
    """Return each map's share of right answers, or its loss minus that without thoughts."""
    if metric == "accuracy":
        return {name: share_point(values(found, "correct")) for name, found in records.items()}
    zero = values(records[ZERO], "nll")
    return {name: paired_point(values(found, "nll"), zero) for name, found in records.items()}


def against_ridge(records: Mapping[str, Sequence[Record]], metric: str) -> dict[str, Any]:
    """Return the paired difference ridge − map for each other map."""
    field = "correct" if metric == "accuracy" else "nll"
    ridge, exact = values(records["ridge"], field), metric == "accuracy"
    others = {name: values(found, field) for name, found in records.items() if name != "ridge"}
    lines = {name: paired(ridge, other, exact) for name, other in others.items()}
    sign = 1 if metric == "accuracy" else -1  # a lower loss is better
    return {name: line | {"better": sign * line["mean"]} for name, line in lines.items() if line}


def value(point: Point, metric: str) -> str:
    """Return a point of a panel as text."""
    return f"{point['y']:.1%}" if metric == "accuracy" else f"{point['y']:+.3f} nats"


def verdict(own: Mapping[str, Any]) -> str:
    """Return the verdict: whether ridge is better than rescaling alone and than no map."""
    others = [own["identity"], own["none"]]
    if all(line["better"] > 0 and line["p"] < 0.05 for line in others):
        return HOLDS
    worse = any(line["better"] < 0 and line["p"] < 0.05 for line in others)
    return FAILS if worse else NOT_SHOWN


# -- the map itself ---------------------------------------------------------------------------


def untied_twin(lm: LM, seed: int = 0) -> LM:
    """Return an untied model with the same logits and other hidden states, as the module explains.

    It shares all weights with `lm`, except the final norm and the LM head.
    """
    model = lm.model
    source = torch.Generator().manual_seed(seed)
    size = model.config.hidden_size
    scale = 2.0 ** torch.randint(-1, 2, (size,), generator=source)  # (D,), each ½, 1 or 2
    scale = scale.to(model.device, model.dtype)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.config = replace(model.config, tie_word_embeddings=False)
    twin.model = nn.ModuleDict(dict(model.model.items()))
    twin.model["norm"] = copy.deepcopy(model.model.norm)
    twin.model.norm.weight.mul_(scale)
    w_out, _ = embeddings(lm, all_rows=True)
    twin.lm_head = nn.Linear(size, len(w_out), bias=False, dtype=model.dtype, device="meta")
    twin.lm_head.weight = nn.Parameter(w_out / scale, requires_grad=False)
    twin.name = f"{model.name}, untied twin"
    return LM(twin, lm.folder, lm.files)


def embeddings(lm: LM, all_rows: bool = False) -> tuple[Tensor, Tensor]:
    """Return W_out and W_in of a model, (V, D) each, with the tokenizer's rows or all rows."""
    model, rows = lm.model, None if all_rows or not lm.tokenizer else lm.tokenizer.size
    w_in = model.model.embed_tokens.weight
    w_out = w_in if model.config.tie_word_embeddings else model.lm_head.weight
    return w_out[:rows], w_in[:rows]


def of_map(w_out: Tensor, w_in: Tensor) -> dict[str, float]:
    """Return measures of the ridge map between two embeddings (V, D), and its computing time.

    "residual" is ‖W_out W_a − W_in‖ / ‖W_in‖. "normal equations" is how far the gradient that
    defines W_a is from 0, relative to W_outᵀ W_in. "bound", which only tied embeddings have, is the
    largest possible distance of W_a from the identity: λ / σ², where σ is the smallest singular
    value.
    """
    start = time.perf_counter()
    matrix = alignment_matrix(w_out, w_in)
    seconds = time.perf_counter() - start
    out, into = w_out.double(), w_in.double()
    gram, cross = out.T @ out, out.T @ into
    gradient = gram @ matrix + LAMBDA * matrix - cross
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    found = {
        "seconds": seconds,
        "residual": float((out @ matrix - into).norm() / into.norm()),
        "normal equations": float(gradient.norm() / cross.norm()),
        "from the identity": float(torch.linalg.matrix_norm(matrix - one, 2)),
    }
    if w_out.data_ptr() == w_in.data_ptr():
        found["bound"] = LAMBDA / float(torch.linalg.eigvalsh(gram)[0])
    return found
