"""Check the output of `ask` besides the answer: question numbers, token counts, JSON, thinking."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minimas import LM, __version__, load, text_mas
from minimas.__main__ import main
from minimas.results import Event, Piece
from minimas.text.generate import Sampling

from .models import TINY, tiny_model, write_folder
from .text import endless_folder

THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model that never ends its turn."""
    return endless_folder(tmp_path_factory.mktemp("ask") / "model", 4096)


@pytest.fixture
def thinker(folder: Path, tmp_path: Path) -> Path:
    """Return the same model with a template that opens <think> unless it is told not to."""
    copied = tmp_path / "thinker"
    write_folder(copied, load(folder).model, tokenizer=TINY)
    (copied / "chat_template.jinja").write_text(THINKING)
    return copied


def ask(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[str, str]:
    assert main(["ask", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_rows_can_come_from_standard_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may have a byte order mark, Windows line endings, and no newline at the end."""
    rows = '\ufeff{"question": "Müller?"}\r\n\r\n{"question": "two?"}'
    for stdin in (io.StringIO(rows[1:]), io.TextIOWrapper(io.BytesIO(rows.encode()), "ascii")):
        monkeypatch.setattr(sys, "stdin", stdin)
        out, _ = ask(capsys, "-m", folder, "--file", "-", "-n", 2, "--json")
        found = [json.loads(line) for line in out.splitlines()]
        assert [record["question"] for record in found] == ["Müller?", "two?"]
        assert [record["id"] for record in found] == ["line-1", "line-3"]
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"question": "one?"}\n{'))
    assert main(["ask", "--file", "-"]) == 1
    assert "-: line 2: found bad JSON" in capsys.readouterr().err


def test_each_line_about_an_agent_has_the_number_of_its_question(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With forty questions, it was not clear whose answer had been cut off."""
    (tmp_path / "q.jsonl").write_text('{"question": "q?"}\n' * 5)
    argv = ["-m", folder, "-n", 2, "--latent-steps", 1, "--method", "latent_mas"]
    _, err = ask(capsys, *argv, "--file", tmp_path / "q.jsonl")
    for number in range(1, 6):
        assert re.search(rf"^ *\[{number}/5\] planner: ", err, re.M), err
        assert re.search(rf"^ *\[{number}/5\] cut off at --max-new-tokens 2$", err, re.M), err
    _, err = ask(capsys, *argv, "--file", tmp_path / "q.jsonl", "--batch-size", 2)
    said = re.findall(r"^ *(.*) judger: ", err, re.M)
    assert said == ["[1/5] to [2/5]", "[3/5] to [4/5]", "[5/5]"]
    assert len(re.findall(r"\[\d/5\] cut off", err)) == 5
    assert "[" not in ask(capsys, *argv, "q?")[1]


def test_an_empty_answer_keeps_its_place_in_the_output(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The third answer looked like the second one, because the second one was empty."""
    ends: list[bool] = []

    def pieces(*args: Any, **options: Any) -> Any:
        ends.append(len(ends) == 1)
        from minimas.text.generate import GeneratedText

        text = "" if ends[-1] else "word"
        yield 0, text, GeneratedText(text, [5] if text else [], "stop")

    monkeypatch.setattr("minimas.turns.stream", pieces)
    (tmp_path / "q.jsonl").write_text('{"question": "q?"}\n' * 3)
    argv = ["-m", folder, "--method", "single", "--file", tmp_path / "q.jsonl"]
    assert ask(capsys, *argv)[0] == "word\n\n\n\nword\n"


def test_the_wall_time_is_reported_last(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The agents' seconds did not include loading, which is most of a short run."""
    bill = "\n".join(ask(capsys, "-m", folder, "q?", "-n", 2)[1].splitlines()[-2:])
    found = re.fullmatch(r" +total: .*, (\S+) s, KV cache .* MB\n +wall time: (\S+) s", bill)
    assert found and 0 < float(found[1]) < float(found[2])


def test_a_record_has_everything_its_result_depends_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defaults are recorded like values that were given."""
    (tmp_path / "q.jsonl").write_text('{"question": "q?", "answer": 7, "id": 1.5}\n')
    flags = ["--json", "-n", 3, "--temp", 0.5, "--dtype", "float32", "--device", "cpu"]
    out, _ = ask(capsys, "-m", folder, *flags, "--file", tmp_path / "q.jsonl")
    found = json.loads(out)
    given = {"temperature": 0.5, "max_new_tokens": 3, "top_p": 1.0, "top_k": 0}
    assert found["sampling"].items() >= given.items()
    assert found["versions"] == {"minimas": __version__, "torch": torch.__version__}
    expected = {"dtype": "float32", "device": "cpu", "quantization": None, "kind": "math"}
    expected |= {"latent_steps": 40, "layout": "turn", "team": "sequential", "id": "1.5"}
    assert found.items() >= expected.items()
    out, _ = ask(
        capsys, "q?", "--json", "--quantize", "q8", "--layout", "chat", "--latent-steps", 2
    )
    expected = {"quantization": "q8", "layout": "chat", "latent_steps": 2, "kind": "free"}
    assert json.loads(out).items() >= expected.items()
    assert json.loads(ask(capsys, "q?", "--json", "-n", 2)[0])["latent_steps"] == 6  # teams.json
    for method in ("single", "text_mas"):
        found = json.loads(ask(capsys, "q?", "--json", "-n", 2, "--method", method)[0])
        assert (found["latent_steps"], found["layout"]) == (0, "chat")


def test_a_record_says_that_a_gguf_file_is_quantized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers keep the 4-bit blocks of the file, but "quantization" was null."""
    pytest.importorskip("gguf")
    from .formats.test_gguf import trained, words_of, write

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 500}
    model = tiny_model(dtype=torch.float32, **sizes)
    words = words_of(trained("qwen2"), "qwen2")
    path = write(tmp_path / "a.gguf", model, kinds="Q4_0", extra=words)
    argv = ["q?", "-m", path, "-n", 1, "--latent-steps", 0, "--json", "--quiet", "--device", "cpu"]
    assert json.loads(ask(capsys, *argv)[0])["quantization"] == "as in the file"
    assert json.loads(ask(capsys, *argv, "--quantize", "q8")[0])["quantization"] == "q8"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_agents_that_pass_text_show_their_speed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A team that generates four texts showed no progress until the last one."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["ask", "-m", str(folder), "q?", "-n", "40", "--method", "text_mas"]) == 0
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"planner: \d+ prompt tokens: \d+ tokens \[.* tokens/s\]", said), said


def test_there_is_an_event_for_every_token(folder: Path) -> None:
    """The speed is computed from these events, also for agents that pass text."""
    heard: list[Event] = []
    how = Sampling(max_new_tokens=5)
    results = text_mas(load(folder), ["one?", "two?"], sampling=how, on_event=heard.append)
    pieces = [event for event in heard if isinstance(event, Piece)]
    assert len(pieces) == sum(result.usage.output_tokens for result in results) == 40


def test_compiling_is_announced_and_timed_separately(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a minute of compiling was counted as time of the first agent."""

    def loaded(
        name: str, device: str, dtype: str, quantize: None, compile: bool, *rest: bool
    ) -> LM:
        assert compile
        return load(name, device, dtype, quantize)

    monkeypatch.setattr("minimas.commands.load", loaded)
    for method in ("latent_mas", "text_mas", "single"):
        argv = ["-m", folder, "q?", "-n", 2, "--method", method]
        first, second, *_ = ask(capsys, *argv, "--compile")[1].splitlines()
        assert first == "minimas: compiling, up to a minute"
        assert re.fullmatch(r" +compile: \d+\.\d\d s", second)
        assert "compil" not in ask(capsys, *argv, "--quiet", "--compile")[1]


def test_thinking_can_be_switched_off(
    thinker: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template has a switch for it that no flag could set."""
    argv = ["-m", thinker, "q?", "-n", 2, "--json", "--quiet", "--method", "single"]
    prompts = [
        json.loads(ask(capsys, *argv, *flag)[0])["agents"][-1]["prompt"]
        for flag in ([], ["--think"], ["--no-think"])
    ]
    assert prompts[0] == prompts[1] and prompts[0].endswith("assistant\n<think>\n")
    assert prompts[2].endswith("assistant\n<think>\n\n</think>\n\n")
    assert main(["ask", "-m", str(folder), "q?", "--no-think"]) == 1
    err = capsys.readouterr().err
    assert "chat_template: found no enable_thinking" in err and "--no-think" in err


def test_a_truncated_thought_is_reported_as_one(
    thinker: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default limit of 256 tokens can stop a thinking model before its answer."""
    for flags, thinks in (
        (["-m", thinker], True),
        (["-m", thinker, "--no-think"], False),
        (["-m", folder], False),
    ):
        _, err = ask(capsys, "q?", "--method", "single", *flags)
        [line] = [line for line in err.splitlines() if "cut off at --max-new-tokens 256" in line]
        assert ("still thinking: pass more, such as 4096, or --no-think" in line) == thinks


@pytest.mark.parametrize("question", ["Eva has 2 <think> cards?", "Why </think> not <think>"])
def test_a_think_tag_in_the_question_does_not_count_as_a_thought(
    thinker: Path, folder: Path, capsys: pytest.CaptureFixture[str], question: str
) -> None:
    """Only the template and the model open a thought. A user may ask about the tag."""
    for flags, thinks in (([folder], False), ([thinker, "--no-think"], False), ([thinker], True)):
        for method in (["single"], ["latent_mas", "--latent-steps", 0]):
            _, err = ask(capsys, question, "-n", 1, "-m", *flags, "--method", *method)
            assert ("still thinking" in err) == thinks
