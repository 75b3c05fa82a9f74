"""Check that a report shows all records of a run in one file, and that no text becomes markup.

The page is also opened in a headless Chromium if there is one.
"""

import base64
import gzip
import html
import json
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from minimas.__main__ import main as minimas_main
from tools.evaluation.command import main as evaluate
from tools.evaluation.verdict import verdict
from tools.reporting.command import main
from tools.reporting.questions import own_parts
from tools.reporting.records import read_report

from ..processes import LIMIT
from .test_evaluate import write_data

Record = dict[str, Any]
HOSTILE = "</script><script>alert('&amp;')</script><img src=x onerror=alert(2)> \u2028 {{ 7 * 7 }}"
WORDS = "the planner reads a question and thinks of numbers before it says anything at all".split()
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def text_of(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(words))


def agent_of(rng: random.Random, name: str, question: str, steps: int, layers: int) -> Record:
    """Return an agent of a record in the format of tools/evaluate.py."""
    made: Record = {
        "name": name, "prompt": f"<|im_start|>user\nYou are the {name}.\n{question}<|im_end|>\n",
        "text": "", "read": 120, "thought": steps, "written": 0, "seconds": rng.random(),
        "memory_bytes": rng.randrange(10**7), "mark": [1.0] * layers,
    }  # fmt: skip
    if steps:
        made["thoughts"] = [
            {
                "tokens": [[f" {rng.choice(WORDS)}", round(rng.random(), 4)] for _ in range(3)],
                "entropy": round(rng.random(), 4), "norm": 0.7952,
                "cosine_before": round(rng.random(), 4) if step else None,
                "nearest": rng.choice(WORDS), "cosine_nearest": round(rng.random(), 4),
            }
            for step in range(steps)
        ]  # fmt: skip
        made["attention"] = {
            part: [[round(rng.random() / 9, 4) for _ in range(2)] for _ in range(layers)]
            for part in ("prompt", "thoughts")
        }
    return made


def record_of(number: int, arm: str = "latent_mas", steps: int = 4, layers: int = 3) -> Record:
    """Return a record with generated numbers and words."""
    rng = random.Random(number)
    question = f"{text_of(rng, 30)}?"
    names = ("planner", "critic", "refiner", "judger")
    agents = [agent_of(rng, n, question, 0 if n == "judger" else steps, layers) for n in names]
    agents[-1]["text"] = text_of(rng, 60)
    usage = {k: sum(a[k] for a in agents) for k in ("read", "thought", "written", "seconds")}
    gold = str(number % 7)
    return {
        "id": f"q-{number}", "batch": 0, "arm": arm, "method": "latent_mas", "metric": "accuracy",
        "seed": 0, "text": agents[-1]["text"], "answer": str(number % 5), "gold": gold,
        "correct": str(number % 5) == gold, "finish_reason": "stop", **usage, "memory_bytes": 10**7,
        "agents": agents,
    }  # fmt: skip


def write_run(folder: Path, records: Sequence[Record], **head: Any) -> Path:
    """Write the folder of a run as tools/evaluate.py leaves it before the summary."""
    arms = [{"name": name} for name in dict.fromkeys(record["arm"] for record in records)]
    questions = len({record["id"] for record in records})
    first = {
        "settings": {"seeds": [0], "audit": False, "model": "f1a9"},
        "arguments": {"align": ["ridge"], "layout": [None], "batch_size": 8, "limit": None},
        "arms": arms, "questions": questions, "model": {"name": "weights/tiny"},
        "device": "cpu, ",
    }  # fmt: skip
    folder.mkdir()
    lines = [json.dumps(line) + "\n" for line in [first | head, *records]]
    (folder / "results.jsonl").write_text("".join(lines))
    return folder


def report(source: Path, out: Path) -> str:
    """Return the page of a run."""
    assert main([str(source), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def details_of(page: str) -> list[Record]:
    """Return the details that the page decompresses when its rows are opened."""
    [stored] = re.findall(r'<script type="application/json" id="details">(.*?)</script>', page)
    groups = json.loads(stored)["packed"]
    return [one for group in groups for one in json.loads(gzip.decompress(base64.b64decode(group)))]


class Seen(HTMLParser):
    """Collects all tags and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# -- what is shown ---------------------------------------------------------------------------------


def test_no_text_of_a_record_becomes_markup(tmp_path: Path) -> None:
    """Questions, answers, arms, prompts, tokens and settings may contain tags."""
    records = [record_of(i, arm=HOSTILE) for i in range(3)]
    for record in records:
        record |= {
            "id": record["id"] + HOSTILE,
            "answer": HOSTILE,
            "gold": HOSTILE,
            "text": HOSTILE,
        }
        for agent in record["agents"]:
            agent |= {"name": HOSTILE, "prompt": f"{record['id']}{HOSTILE}", "text": HOSTILE}
        record["agents"][0]["thoughts"][0]["tokens"][0][0] = HOSTILE
    head = {"arguments": {HOSTILE: HOSTILE}, "model": {"name": HOSTILE}}
    page = report(write_run(tmp_path / "run", records, **head), tmp_path / "report.html")
    plain = report(write_run(tmp_path / "plain", [record_of(0)]), tmp_path / "plain.html")
    seen = Seen(page)
    assert seen.tags.count("script") == Seen(plain).tags.count("script") == 2
    assert "img" not in seen.tags
    assert seen.links == []
    assert sum(HOSTILE in text for text in seen.texts) >= 4 * 3, "texts must be there as they are"
    first = details_of(page)[0]["agents"][0]
    assert (first["name"], first["thoughts"][0][0][0][0]) == (HOSTILE, HOSTILE)


def test_a_lone_surrogate_does_not_stop_a_report(tmp_path: Path) -> None:
    """A model may generate one, and it cannot be encoded as UTF-8."""
    record = record_of(0) | {"answer": "a\ud83d", "text": "\ud83d"}
    page = report(write_run(tmp_path / "run", [record]), tmp_path / "report.html")
    assert "a?" in page


def test_a_page_shows_settings_arms_and_questions(tmp_path: Path) -> None:
    """Settings are shown as text, without those that the run does not have."""
    records = [record_of(i, arm) for i in range(6) for arm in ("one", "two")]
    page = report(write_run(tmp_path / "my run", records), tmp_path / "report.html")
    seen = Seen(page)
    texts = [text.strip() for text in seen.texts]
    assert "my run" in texts
    assert {"model", "weights/tiny", "align", "ridge", "batch size", "8", "cpu", "f1a9"} <= set(
        texts
    )
    assert "layout" not in texts, "a setting without a value says nothing"
    assert "planner → critic → refiner → judger" in texts
    assert {"q-3", "✓ right", "✗ wrong"} <= set(texts)
    assert seen.tags.count("tbody") == 1 + len(records), "the arms, and each record"
    assert "prefers-color-scheme: dark" in page
    assert "http" not in page.replace('<meta http-equiv="', "")


def test_the_details_of_a_record_are_those_of_its_line(tmp_path: Path) -> None:
    """They match, also for the last record of several groups."""
    records = [record_of(i) for i in range(45)]
    page = report(write_run(tmp_path / "run", records), tmp_path / "report.html")
    found = details_of(page)
    assert len(found) == len(records)
    for one, record in zip(found, records, strict=True):
        assert [a["prompt"] for a in one["agents"]] == [a["prompt"] for a in record["agents"]]
        [tokens, entropy, *_] = one["agents"][1]["thoughts"][2]
        thought = record["agents"][1]["thoughts"][2]
        assert tokens == [[token, round(chance, 3)] for token, chance in thought["tokens"]]
        assert entropy == pytest.approx(thought["entropy"], rel=5e-3)
        heads = record["agents"][0]["attention"]["thoughts"][1]
        assert one["agents"][0]["attention"]["thoughts"][1] == pytest.approx(
            sum(heads) / 2, abs=1e-4
        )


def test_the_verdict_of_an_audit_is_on_the_page(tmp_path: Path) -> None:
    records = []
    for i in range(12):
        for arm, loss in (("full", 1.0), ("prompts only", 2.0), ("none", 3.0)):
            one = record_of(i, f"nll: {arm}") | {"metric": "nll", "nll": loss + i / 50}
            records.append({k: v for k, v in one.items() if k not in ("text", "finish_reason")})
    settings = {"settings": {"seeds": [0], "audit": True, "model": "f1a9"}}
    page = report(write_run(tmp_path / "run", records, **settings), tmp_path / "report.html")
    sentence = verdict(records)
    assert sentence.startswith("On these 12 questions the thoughts lowered the loss")
    assert sentence in Seen(page).texts
    plain = report(write_run(tmp_path / "plain", records), tmp_path / "plain.html")
    assert "What the audit says" not in plain


def test_a_run_without_thoughts_has_a_report(tmp_path: Path) -> None:
    """`single` has no thoughts, and neither have runs that were made before --lens existed."""
    records = [record_of(i, "single", steps=0) for i in range(3)]
    for record in records:
        record["agents"] = record["agents"][-1:]
    page = report(write_run(tmp_path / "run", records), tmp_path / "report.html")
    agents = [one["agents"] for one in details_of(page)]
    assert [(a["name"], a["thoughts"], a["attention"]) for [a] in agents] == [
        ("judger", [], {})
    ] * 3


@pytest.mark.slow
def test_a_thousand_records_with_thoughts_take_at_most_5_mb(tmp_path: Path) -> None:
    """Three agents have 20 thoughts each, with three tokens and a heat map of 24 layers."""
    records = [record_of(i, steps=20, layers=24) for i in range(1000)]
    page = report(write_run(tmp_path / "run", records), tmp_path / "report.html")
    assert len(page.encode()) <= 5e6
    assert len(details_of(page)) == 1000


def test_numbers_that_are_not_valid_json_do_not_break_the_page(tmp_path: Path) -> None:
    """JavaScript cannot parse NaN in JSON, and a loss may be NaN."""
    records = [record_of(i) | {"metric": "nll", "nll": float("nan")} for i in range(2)]
    run = write_run(tmp_path / "run", records)
    text = (
        (run / "results.jsonl").read_text().replace('"entropy": ', '"entropy": 1e999, "was": ', 1)
    )
    (run / "results.jsonl").write_text(text)
    [first, _] = details_of(report(run, tmp_path / "report.html"))
    assert first["agents"][0]["thoughts"][0][1] is None


# -- questions -------------------------------------------------------------------------------------


def test_a_question_is_the_part_in_which_prompts_differ() -> None:
    """A word at the start or the end of all questions is kept."""
    texts = [
        f"<|im_start|>user\nHelp: {q}?\n\nThink.<|im_end|>" for q in ("Is it 1 or 2", "Is it 2")
    ]
    assert own_parts(texts) == ["Is it 1 or 2?", "Is it 2?"]
    assert own_parts(["Name: ab", "Name: ac"]) == ["ab", "ac"]


def test_questions_come_from_the_data_file_only_if_it_is_unchanged(tmp_path: Path) -> None:
    """A file that was changed after the run does not have its questions."""
    data, run = write_data(tmp_path / "data.jsonl", 3), tmp_path / "run"
    command = ["--data", str(data), "--method", "single", "--out", str(run), "--quiet"]
    assert evaluate([*command, "--max-new-tokens", "2"]) == 0
    asked = [json.loads(line)["question"] for line in data.read_text().splitlines()]
    assert [one["question"] for one in read_report(run).entries] == asked
    data.write_text(data.read_text().replace("How many", "How few"))
    found = [one["question"] for one in read_report(run).entries]
    assert all(ours.endswith(theirs) for ours, theirs in zip(found, asked, strict=True))


# -- incomplete and invalid runs -------------------------------------------------------------------


def test_a_truncated_run_shows_its_complete_records_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cut may be within a line, within a character, or at the end of a line."""
    records = [record_of(i) | {"answer": "ж"} for i in range(3)]
    run = write_run(tmp_path / "run", records)
    path = run / "results.jsonl"
    path.write_text(
        "".join(
            json.dumps(json.loads(line), ensure_ascii=False) + "\n"
            for line in path.read_text().splitlines()
        )
    )
    whole = path.read_bytes()
    starts = [0, *(match.end() for match in re.finditer(b"\n", whole))]
    inside = whole.index("ж".encode(), starts[2]) + 1
    for cut, there, left_out in (
        (starts[3], 2, False), (starts[3] + 40, 2, True), (inside, 1, True), (starts[1], 0, False),
    ):  # fmt: skip
        path.write_bytes(whole[:cut])
        page = report(run, tmp_path / "report.html")
        said = capsys.readouterr().err
        note = f"{there} of 3 records: the run is not finished"
        assert note in said
        assert note in page
        assert ("is incomplete and left out" in said) == left_out
        assert len(details_of(page)) == there
    path.write_bytes(whole)
    assert 'class="note" role' not in report(run, tmp_path / "report.html")


def test_an_older_run_without_a_summary_is_marked_as_possibly_unfinished(tmp_path: Path) -> None:
    """Its head does not have the number of questions."""
    run = write_run(
        tmp_path / "run", [record_of(0), record_of(0, "b"), record_of(1)], questions=None
    )
    assert "may be unfinished" in read_report(run).notes[0]
    (run / "summary.json").write_text("{}")
    assert "from 1 to 2 records" in read_report(run).notes[0]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("nowhere", None, "nowhere: found no such file or folder, expected a run's folder"),
        ("empty/", None, "found no results*.jsonl, expected the folder of a run"),
        ("run/results.jsonl", "", "found no complete line with settings"),
        ("run/results.jsonl", '{"settings": {}', "found no complete line with settings"),
        ("run/results.jsonl", '{"id": 1}\n', "line 1: arm: found nothing, expected text"),
        ("run/results.jsonl", '{"settings": {}}\n7\n', "line 2: found b'7\\n', expected an object"),
        ("ask.json", "", "found no complete line, expected the output of minimas ask --json"),
        ("ask.json", "[]\n", "line 1: found b'[]\\n', expected an object"),
        ("ask.json", "no JSON\n{}\n", "line 1: not valid JSON"),
        ("ask.json", '{"question": 3}\n', "line 1: question: found 3, expected text"),
        ("ask.json", '{"settings": {}}\n', "found the head of a run"),
    ],
)
def test_invalid_input_gives_one_line_and_no_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | None,
    expected: str,
) -> None:
    source = tmp_path / name
    if name.endswith("/"):
        source.mkdir()
    if content is not None:
        source.parent.mkdir(exist_ok=True)
        source.write_text(content)
    before = sorted(tmp_path.rglob("*"))
    read = source.parent if source.name == "results.jsonl" else source
    assert main([str(read), "--out", str(tmp_path / "report.html")]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("report: error: ")
    assert expected in said.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("correct", "yes", "correct: found 'yes', expected true or false"),
        ("read", None, "read: found nothing, expected a number"),
        ("agents", {}, "agents: found {}, expected a list"),
        ("agents", [7], "agents: found 7, expected an object"),
        ("text", 7, "text: found 7, expected text"),
    ],
)
def test_a_field_of_another_type_is_refused_with_its_line(
    tmp_path: Path, field: str, value: Any, expected: str
) -> None:
    run = write_run(tmp_path / "run", [record_of(0), record_of(1) | {field: value}])
    with pytest.raises(ValueError, match=re.escape(f"results.jsonl: line 3: {expected}")):
        read_report(run)


def test_a_thought_of_another_shape_is_refused(tmp_path: Path) -> None:
    record = record_of(0)
    record["agents"][1]["thoughts"][0]["tokens"][1] = ["a"]
    with pytest.raises(ValueError, match=r"line 2: tokens: found \['a'\], expected a token"):
        read_report(write_run(tmp_path / "run", [record]))
    record = record_of(0)
    record["agents"][1]["attention"]["prompt"] = [0.5]
    with pytest.raises(ValueError, match=r"line 2: attention: prompt: found 0\.5, expected a list"):
        read_report(write_run(tmp_path / "other", [record]))


def test_a_page_never_replaces_its_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not replace a folder either. A file that cannot be written is named."""
    run = write_run(tmp_path / "run", [record_of(0)])
    results = run / "results.jsonl"
    before = results.read_bytes()
    for out, expected in (
        (results, "which is an input file, expected another file"),
        (run, "out (--out): found the folder"),
        (tmp_path / "no" / "where.html", "where.html: cannot be written and is unchanged"),
    ):
        assert main([str(run), "--out", str(out)]) == 1
        assert expected in capsys.readouterr().err
    assert results.read_bytes() == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["results.jsonl", "run"]


# -- answers of minimas ask ------------------------------------------------------------------------


def test_answers_of_ask_with_thoughts_have_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output of `minimas ask --json --show-thoughts` may come from two calls in one file."""
    data = write_data(tmp_path / "data.jsonl", 2)
    command = ["ask", "--file", str(data), "--json", "--quiet", "-n", "4"]
    assert minimas_main([*command, "--show-thoughts", "--latent-steps", "3"]) == 0
    assert minimas_main([*command, "--method", "single"]) == 0
    source = tmp_path / "ask.json"
    source.write_text(capsys.readouterr().out)
    page = report(source, tmp_path / "report.html")
    steps = [[len(a["thoughts"]) for a in one["agents"]] for one in details_of(page)]
    assert steps == [[3, 3, 3, 0]] * 2 + [[0]] * 2
    asked = [json.loads(line)["question"] for line in data.read_text().splitlines()]
    found = read_report(source)
    assert [one["question"] for one in found.entries] == asked * 2
    assert found.settings["model"] == "weights/tiny"
    assert [arm.split()[0] for arm in found.arms] == ["latent_mas", "single"]
    source.write_text(source.read_text()[:-9])
    assert "line 4 is incomplete and left out" in read_report(source).notes[0]


# -- in a browser ----------------------------------------------------------------------------------

READY = """
const ready = async (selector) => {
  while (!document.querySelector(selector)) await new Promise((done) => setTimeout(done, 10));
};
"""
CLICKS = """
const rows = () => [...document.querySelectorAll("#records > tbody:not([hidden])")];
const ids = () => rows().slice(0, 3).map((body) => body.querySelector("small").textContent);
const heads = [...document.querySelectorAll("#records > thead button")];
const heading = (name) => heads.find((head) => head.textContent === name);
const set = (id, value) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
(async () => {
  const size = (part) => part.querySelectorAll("*").length;
  const found = { first: ids(), elements: size(document) };
  heading("#").click(); heading("#").click();
  found.down = ids();
  heading("question").click();
  set("filter", "Q-77");
  found.filtered = rows().length;
  set("filter", "no such text");
  found.none = [rows().length, document.getElementById("none").hidden];
  set("filter", "");
  set("grade", "right");
  found.right = rows().length;
  set("grade", "");
  heading("#").click();
  const [body] = rows();
  body.querySelector("button").click();
  await ready(".bill tbody");
  found.opened = size(body);
  found.agents = [...body.querySelectorAll(".agent h4 span")].map((one) => one.textContent);
  found.chips = body.querySelectorAll(".strip button").length;
  found.cells = body.querySelectorAll(".heatmap i").length;
  body.querySelector(".strip button").click();
  found.seen = body.querySelector(".seen").textContent.slice(0, 14);
  found.prompt = [body.querySelector("details").open, body.querySelector("pre").textContent];
  found.total = body.querySelector("table.bill").rows.length;
  body.querySelector("button").click();
  found.folded = body.rows[1].hidden;
  body.querySelector("button").click();
  found.again = [body.rows.length, body.rows[1].hidden];
  const { scrollWidth, clientWidth } = document.documentElement;
  found.wider = scrollWidth > clientWidth;
  document.body.dataset.found = JSON.stringify(found);
})();
"""


def browse(page: Path, script: str) -> tuple[str, str]:
    """Open a copy of a page with a script at its end, and return its DOM and the console output.

    The browser's clock skips idle time, and the DOM is the final one. So a script may wait, however
    busy the machine is.
    """
    assert BROWSER is not None
    copy = page.with_name(f"copy of {page.name}")
    copy.write_text(page.read_text(encoding="utf-8") + f"<script>{READY}{script}</script>")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=10000000",
        "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_a_browser_opens_sorts_filters_and_expands_a_thousand_records(tmp_path: Path) -> None:
    """The page opens from disk without console messages.

    The content of a record is built only when it is opened: all of them together would be 180,000
    elements.
    """
    records = [record_of(i) for i in range(1000)]
    records[0]["agents"][0]["prompt"] = HOSTILE
    page = tmp_path / "report.html"
    report(write_run(tmp_path / "run", records), page)
    dom, console = browse(page, CLICKS)
    assert console == ""
    [text] = re.findall(r'data-found="(.*?)"', dom)
    found = json.loads(html.unescape(text))
    assert found.pop("elements") < 20 * len(records)
    assert found.pop("opened") > 50
    right = sum(record["correct"] for record in records)
    assert found == {
        "first": ["q-0", "q-1", "q-2"],
        "down": ["q-999", "q-998", "q-997"],
        "filtered": 11,
        "none": [0, False],
        "right": right,
        "agents": ["planner", "critic", "refiner", "judger"],
        "chips": 12,
        "cells": 7 * 3,
        "seen": "thought 1 of 4",
        "prompt": [False, HOSTILE],
        "total": 1 + 4 + 1,
        "folded": True,
        "again": [2, False],
        "wider": False,
    }


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_a_script_in_a_question_does_not_run_in_a_browser(tmp_path: Path) -> None:
    """No script may run, whether rows are open or not. A script that ran would leave a mark."""
    runs = "document.body.dataset.ran=1"
    mark = f"<img src=x onerror={runs}></script><script>{runs}</script>"
    records = [record_of(i, arm=mark) for i in range(2)]
    for record in records:
        record |= {"id": record["id"] + mark, "answer": mark, "gold": mark}
        for agent in record["agents"]:
            agent |= {"name": mark, "prompt": record["id"], "text": mark}
        for thought in record["agents"][0]["thoughts"]:
            thought |= {"tokens": [[mark, 0.5]], "nearest": mark}
    page = tmp_path / "report.html"
    report(write_run(tmp_path / "run", records), page)
    unfold = 'document.querySelectorAll(".question button").forEach((button) => button.click());'
    click = 'document.querySelector(".strip button").click()'
    dom, console = browse(page, f'{unfold} ready(".strip button").then(() => {click});')
    assert console == ""
    assert "thought 1 of 4" in dom
    assert "data-ran" not in dom.split("<main>")[0]
