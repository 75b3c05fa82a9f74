"""Compare the arms of an audit, and state the verdict in one sentence.

The effect of the thoughts is the difference between full and prompts only. The effect of the
prompts is the difference between prompts only and none. The gold NLL (the loss of the right answer)
finds small effects, but rewards whatever makes the words of the solution likelier. Accuracy shows
how much an effect matters, but needs many questions. Neither can show that thoughts are useless for
other questions or models. This module uses only records.
"""

from collections.abc import Sequence
from typing import Any

from .stats import p_value, paired

Record = dict[str, Any]
ALPHA = 0.01  # an effect with p below it counts as found
AGAINST = ("full", "prompts only", "none")
NOTHING = (
    "No verdict is possible: it needs at least two of the arms 'full', 'prompts only' and 'none'."
)


def compare(found: Sequence[Record], metric: str, first: str, second: str) -> Record | None:
    """Return the paired difference between two arms, first − second, in the form of `stats.paired`.

    It includes the questions and seeds that both arms have. Returns None if there are none.
    """
    field = "nll" if metric == "nll" else "correct"
    values: dict[str, dict[tuple[str, int], float]] = {first: {}, second: {}}
    for record in found:
        record_metric, _, arm = record["arm"].partition(": ")
        if record_metric == metric and arm in values and record.get(field) is not None:
            values[arm][record["id"], record["seed"]] = float(record[field])
    return paired(values[first], values[second], exact=metric == "accuracy")


def comparisons(found: Sequence[Record]) -> Record:
    """Return the differences between each arm and the arms full, prompts only and none.

    The keys are "METRIC: ARM − OTHER".
    """
    compared = {}
    for name in dict.fromkeys(record["arm"] for record in found):
        metric, _, arm = name.partition(": ")
        for other in AGAINST:
            line = compare(found, metric, arm, other) if arm != other else None
            if line is not None:
                compared[f"{name} − {other}"] = line
    return compared


def verdict(found: Sequence[Record]) -> str:
    """Return the result of an audit in one sentence."""
    thoughts = compare(found, "nll", "full", "prompts only")
    prompts = compare(found, "nll", "prompts only", "none")
    memory = None if thoughts or prompts else compare(found, "nll", "full", "none")
    by_thoughts = compare(found, "accuracy", "full", "prompts only")
    by_memory = compare(found, "accuracy", "full", "none")
    parts = []
    if thoughts:
        parts.append(thoughts_sentence(found, thoughts, by_thoughts))
    if prompts:
        what = "it" if thoughts else "the loss of the right answer"
        parts.append(memory_sentence(prompts, "the prompts' memory", what))
    if memory:
        parts.append(memory_sentence(memory, "the memory", "the loss of the right answer"))
    if by_thoughts:
        parts.append(answers_sentence(by_thoughts, "the thoughts", "them", "they {}"))
    if by_memory:
        parts.append(answers_sentence(by_memory, "the memory", "it", "it {}s"))
    if not parts:
        return NOTHING
    n = next(line["n"] for line in (thoughts, prompts, memory, by_thoughts, by_memory) if line)
    return f"On these {n} questions {'; '.join(parts)}."


def answers_sentence(line: Record, what: str, pronoun: str, does: str) -> str:
    """Return a clause about a difference in accuracy. `does` has a place for the verb."""
    shares = f"with {what} {line['first']:.0%} of the answers are right"
    shares += f", without {pronoun} {line['second']:.0%}"
    effect = "no difference is found"
    if line["p"] < ALPHA:
        effect = does.format("help" if line["mean"] > 0 else "hurt")
    return f"{shares}: {effect} ({p_value(line)})"


def thoughts_sentence(found: Sequence[Record], line: Record, answers: Record | None) -> str:
    """Return a clause about the effect of the thoughts on the loss.

    The clause does not say "hurt" or "help" if the accuracy contradicts the loss.
    """
    if line["p"] >= ALPHA:
        what = "no effect of the thoughts on the loss of the right answer is found"
        return f"{what} ({size(line)}, {p_value(line)})"
    raised = line["mean"] > 0
    said = f"the thoughts {'raised' if raised else 'lowered'} the loss of the right answer by "
    said += f"{size(line)} ({p_value(line)})"
    if answers and answers["p"] < ALPHA and (answers["mean"] > 0) == raised:
        return f"{said}, and the answers say the opposite"
    if raised:
        return f"{said}: with this model they hurt"
    said = f"{said}: with this model they help"
    other = compare(found, "nll", "full", "shuffled")
    if other is None:
        return said
    if other["p"] < ALPHA and other["mean"] < 0:
        return f"{said}, and with another question's memory the loss is higher"
    return f"{said}, but no difference from another question's memory is found"


def memory_sentence(line: Record, memory: str, what: str) -> str:
    """Return a clause about the effect of a KV cache (`memory`) on the loss (`what`)."""
    if line["p"] >= ALPHA:
        return f"no effect of {memory} is found ({size(line)}, {p_value(line)})"
    verb = "raises" if line["mean"] > 0 else "lowers"
    return f"{memory} {verb} {what} by {size(line)} ({p_value(line)})"


def size(line: Record) -> str:
    """Return the absolute size of a difference with its standard error."""
    return f"{abs(line['mean']):.3g} ± {line['error']:.2g}"
