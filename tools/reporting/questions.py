"""Find the questions of a run. Its records have prompts, but not the questions.

If the data file of the run still exists, the questions are read from it. Otherwise all prompts of
an agent begin and end with the same text, and the text between is shown as the question.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tools.evaluation.rows import read_rows
from tools.evaluation.settings import digest

Record = dict[str, Any]
CONTROL_TOKENS = re.compile(r"<\|\w+\|>(?:(?:system|user|assistant)\b)?")
PLACES = ("\n", ": ", "|>")  # a question may begin after one of these


def questions_of_data(head: Record) -> dict[str, str]:
    """Return id -> question from the file of --data in a run's head.

    Returns {} if the file is missing or has changed.
    """
    match head.get("arguments"):
        case {"data": str(data), "limit": (int() | None) as limit}:
            pass
        case _:
            return {}
    try:
        rows = read_rows(data)[:limit]
    except (OSError, ValueError):
        return {}
    same = digest(rows) == head["settings"].get("data")
    return {row["id"]: row["question"] for row in rows} if same else {}


def find_questions(records: Sequence[Record]) -> dict[str, str]:
    """Return id -> question, or the last agent's whole prompt if no question can be found in it."""
    by_arm: dict[str, dict[str, Record]] = {}
    # The prompts of text agents also have the texts of other agents, so they are tried last.
    for record in sorted(records, key=lambda record: record.get("method") == "text_mas"):
        by_arm.setdefault(record["arm"], {}).setdefault(record["id"], record)
    found: dict[str, str] = {}
    for arm in by_arm.values():
        for id_, question in questions_of_arm(arm).items():
            found[id_] = found.get(id_) or question
    return found


def questions_of_arm(records: Mapping[str, Record]) -> dict[str, str]:
    """Return id -> question of one arm's records, from the last agent whose prompts differ."""
    count = min(len(record["agents"]) for record in records.values())
    for agent in range(-1, -count - 1, -1):
        prompts = [record["agents"][agent]["prompt"] for record in records.values()]
        if len(set(prompts)) > 1:
            return dict(zip(records, own_parts(prompts), strict=True))
    last = {id_: record["agents"][-1:] for id_, record in records.items()}
    return {
        id_: CONTROL_TOKENS.sub("", agents[0]["prompt"]).strip() if agents else ""
        for id_, agents in last.items()
    }


def own_parts(texts: Sequence[str]) -> list[str]:
    """Return texts without the beginning and the end that all of them share.

    The shared beginning is cut back to the end of a line, of a control token or of ": ", and the
    shared end to the start of a line or of a control token, so that no word is split.
    """
    head = common_head(texts)
    start = max(head.rfind(place) + len(place) if place in head else 0 for place in PLACES)
    rest = [text[start:] for text in texts]
    tail = common_head([text[::-1] for text in rest])[::-1]
    ends = [at for mark in ("\n", "<|") if (at := tail.find(mark)) >= 0]
    cut = len(tail) - min(ends) if ends else 0
    return [text[: len(text) - cut].strip() for text in rest]


def common_head(texts: Sequence[str]) -> str:
    """Return the longest common prefix of all texts."""
    pairs = zip(min(texts), max(texts), strict=False)  # what these two share, all texts share
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
