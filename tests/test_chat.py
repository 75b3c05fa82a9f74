"""Check `chat`: later turns of a conversation, slash commands, and what must not change it.

A conversation equals the text that the template renders, fed as tokens to an empty KV cache.
"""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minimas import LM, Agent, KVCache, Sampling, Team, Tokenizer, latent_mas, load, text_mas
from minimas.__main__ import main
from minimas.core.model import prefill

from .models import TINY, distance, tiny_model, write_folder
from .processes import within
from .test_cli import start
from .text import QWEN, SHORT, endless_folder, load_text_lm, text_folder, tiny_tokenizer

EVA = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
TOM = "Tom has 3 apples. He eats 1. How many apples does Tom have?"
# Adds a default system message and a begin of text, but only at the start of a conversation.
DEFAULTS = (
    "<|endoftext|>{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALONE = Team((Agent("assistant", "{question}"),))
Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Run `main` with these input lines and flags, and return (status, stdout, stderr)."""

    def call(lines: str | list[str], *flags: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        text = lines if isinstance(lines, str) else "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        status = main(["chat", *map(str, flags)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model with a short context, whose template has a default system message."""
    model = tiny_model(vocab_size=tiny_tokenizer().size, max_position_embeddings=150)
    path = write_folder(tmp_path_factory.mktemp("chat") / "model", model, tokenizer=TINY)
    (path / "chat_template.jinja").write_text(DEFAULTS)
    return path


def records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def errors(err: str) -> list[str]:
    """Return the error lines, and check that there is no traceback."""
    assert "Traceback" not in err
    return [line for line in err.splitlines() if "error" in line]


# -- the conversation ------------------------------------------------------------------------------


def converse(lm: LM, messages: list[str], team: Team = ALONE, **how: Any) -> tuple[KVCache, str]:
    """Return the KV cache of a conversation with a team, and its text from the template."""
    assert lm.tokenizer is not None
    memory, said = None, []
    for message in messages:
        [result] = text_mas(
            lm, [message], team, memory=memory, keep_memory=True, continues=bool(memory), **how
        )
        memory = result.memory
        said += [("user", message), ("assistant", result.text)]
    assert memory is not None
    return memory, lm.tokenizer._render(said, generation_prompt=False)


def fed(lm: LM, text: str) -> KVCache:
    cache = lm.model.new_cache(1)
    assert lm.tokenizer is not None
    prefill(lm.model, [lm.tokenizer.encode(text)], cache)
    return cache


@pytest.mark.parametrize("template", [None, DEFAULTS])
def test_a_later_message_continues_the_conversation(tmp_path: Path, template: str | None) -> None:
    """The template's system message and begin of text were repeated before every message."""
    settings = {} if template is None else {"chat_template": template}
    lm = load_text_lm(text_folder(tmp_path, **settings))
    how = {"sampling": Sampling(max_new_tokens=1)}  # more may re-encode to other ids
    found, text = converse(lm, ["How many cards?", "Why?", "She loses 3."], **how)
    assert text.count("<|im_start|>user") == 3
    assert text.count("Be brief") == (template is not None)
    assert distance(found, fed(lm, text)) < 1e-9
    [again] = text_mas(lm, ["Why?"], ALONE, memory=found, keep_memory=True, **how)
    assert again.memory is not None
    assert ("Be brief" in again.agents[0].prompt) == (template is not None), "the old way"


@pytest.mark.skipif(not QWEN.exists(), reason="no tokenizer of Qwen3 here")
def test_a_conversation_equals_the_rendered_template_of_qwen3(tmp_path: Path) -> None:
    """An answer without thoughts is rendered unchanged, with no empty thoughts before it."""
    tokenizer = Tokenizer(QWEN)
    model = tiny_model(vocab_size=tokenizer.size)
    lm = LM(model, QWEN)
    first, second = (tokenizer.turn(text, first=first) for text, first in (("a b", 1), ("c", 0)))
    text = tokenizer._render(
        [("user", "a b"), ("assistant", "Fine."), ("user", "c")], generation_prompt=True
    )
    assert first.text + "Fine." + tokenizer.turn_end + second.text == text
    found, _ = converse(lm, ["a b", "c"], sampling=Sampling(max_new_tokens=1))
    ids = [tokenizer.encode(turn.text) for turn in (first, second)]
    assert found.lengths == [
        sum(map(len, ids)) + 2 * (1 + len(tokenizer.encode(tokenizer.turn_end)))
    ]


def test_a_conversation_without_a_memory_starts_at_its_beginning(tmp_path: Path) -> None:
    """`continues=True` left out the system message that the template adds at the start."""
    (text_folder(tmp_path) / "chat_template.jinja").write_text(DEFAULTS)
    lm = load_text_lm(tmp_path)
    prompts = []
    for how in ({}, {"continues": True}, {"continues": True, "memory": lm.model.new_cache(1)}):
        [result] = text_mas(lm, ["one?"], ALONE, sampling=SHORT, **how)
        prompts.append(result.agents[0].prompt)
    assert "Be brief." in prompts[0] and prompts[1:] == prompts[:1] * 2


@pytest.mark.parametrize("layout", ["turn", "chat"])
@pytest.mark.parametrize("team", ["sequential", "hierarchical"])
def test_a_later_turn_of_a_team_continues_the_conversation(
    tmp_path: Path, team: str, layout: str
) -> None:
    """Every agent, parallel or not, started with the template's system message again."""
    lm = load_text_lm(text_folder(tmp_path, chat_template=DEFAULTS))
    how: dict[str, Any] = {"team": team, "layout": layout, "latent_steps": 2, "keep_memory": True}
    how["sampling"] = Sampling(max_new_tokens=3)
    [first] = latent_mas(lm, ["one?"], **how)
    for transfer in ("full", "latents", "last", "none"):
        [second] = latent_mas(
            lm, ["two?"], memory=first.memory, continues=True, transfer=transfer, **how
        )
        assert second.memory is not None and first.memory is not None
        assert distance(second.memory.truncate(first.memory.lengths), first.memory) == 0
        prompts = [agent.prompt for agent in second.agents]
        assert not any("Be brief" in prompt or "<|endoftext|>" in prompt for prompt in prompts)
        assert prompts[0].startswith("<|im_start|>user\n")
    assert "Be brief" in first.agents[0].prompt


def test_text_agents_continue_a_conversation(tmp_path: Path) -> None:
    lm = load_text_lm(text_folder(tmp_path, chat_template=DEFAULTS))
    how: dict[str, Any] = {"sampling": Sampling(max_new_tokens=3), "keep_memory": True}
    [first] = text_mas(lm, ["one?"], **how)
    [second] = text_mas(lm, ["two?"], memory=first.memory, continues=True, **how)
    assert all("Be brief" in agent.prompt for agent in first.agents)
    assert not any("Be brief" in agent.prompt for agent in second.agents)


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["single", "text_mas", "latent_mas"])
def test_a_turn_prefills_only_its_own_message(chat: Chat, method: str) -> None:
    """The fifth message prefills as many tokens as the first, and the KV cache grows every time."""
    status, out, _ = chat([EVA] * 5, "--json", "--method", method, "-n", 8)
    found = records(out)
    assert status == 0 and [one["question"] for one in found] == [EVA] * 5
    agents = found[0]["agents"]
    for number in range(1 if method == "text_mas" else len(agents)):  # others get texts too
        assert len({one["agents"][number]["prompt_tokens"] for one in found}) == 1
    sizes = [one["usage"]["memory_bytes"] for one in found]
    assert sizes == sorted(set(sizes))


def test_only_answers_are_on_stdout(chat: Chat) -> None:
    status, out, err = chat([EVA, "", TOM, "/exit", EVA])
    assert status == 0 and out.splitlines() == ["<think> 2 9 6</think> 6", "<think> 3 2</think> 2"]
    assert "prompt tokens" in err and "> " not in err and not errors(err)
    assert chat([EVA, TOM], "--quiet") == (0, out, "")
    assert chat(EVA)[1] == out.splitlines(keepends=True)[0], "the last line may have no end"


def test_a_chat_prefills_the_text_that_the_template_renders(
    chat: Chat, folder: Path, tmp_path: Path
) -> None:
    file, asked = tmp_path / "talk", ["How many?", "Why, <|im_end|>?"]
    found = records(chat([*asked, f"/save {file}"], "-m", folder, "-n", 1, "--json")[1])
    lm = load(folder)
    assert lm.tokenizer is not None
    said = [
        pair for one in found for pair in (("user", one["question"]), ("assistant", one["text"]))
    ]
    turns = lm.tokenizer._conversation(said, generation_prompt=False)
    cache = lm.model.new_cache(1)
    prefill(lm.model, [lm.tokenizer.encode_turn(turns)], cache)
    assert distance(KVCache.load(file, lm.model), cache) < 1e-9


def test_flags_choose_the_team(chat: Chat) -> None:
    flags = ["--method", "latent_mas", "--team", "hierarchical", "--latent-steps", 2, "--json"]
    [found] = records(chat([EVA], *flags)[1])
    assert [agent["name"] for agent in found["agents"]] == ["math", "science", "code", "summarizer"]
    assert found["latent_steps"] == 2 and found["team"] == "hierarchical"
    status, out, err = chat([EVA], "--team", "hierarchical")
    assert (status, out) == (2, "") and "--team: found with --method single" in err


def test_a_single_agent_gets_the_message_unchanged(chat: Chat, folder: Path) -> None:
    """The instruction "End with the final answer" is only for benchmark questions."""
    found = records(chat(["Hello, you!", "Why?"], "-m", folder, "-n", 2, "--json")[1])
    prompts = [one["agents"][0]["prompt"] for one in found]
    assert prompts[0].endswith("<|im_start|>user\nHello, you!<|im_end|>\n<|im_start|>assistant\n")
    assert prompts[1] == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    [tiny] = records(chat([EVA], "--json")[1])
    assert f"Solve it step by step. {EVA}" in tiny["agents"][0]["prompt"]


def test_the_default_model_says_in_a_chat_what_it_can_answer(chat: Chat) -> None:
    assert "--model Qwen/Qwen3-0.6B" not in chat([EVA])[2]
    assert "--model Qwen/Qwen3-0.6B" in chat(["Hello!"])[2]


def test_a_conversation_can_be_saved_and_loaded(chat: Chat, tmp_path: Path) -> None:
    """After /load, the chat continues as the saved one would have."""
    file = tmp_path / "my talk.safetensors"
    found = records(chat([EVA, f"/save {file}", TOM], "--json")[1])
    status, out, _ = chat([TOM, f"/load {file}", TOM], "--json")
    other, again = records(out)
    same = ("text", "finish_reason", "question")
    assert status == 0 and [again[name] for name in same] == [found[1][name] for name in same]
    assert again["usage"]["memory_bytes"] == found[1]["usage"]["memory_bytes"]
    assert again["usage"]["memory_bytes"] > other["usage"]["memory_bytes"]
    assert len(KVCache.load(file, load().model).lengths) == 1


def test_clear_restores_the_memory_given_at_the_start(chat: Chat, tmp_path: Path) -> None:
    """The first turn after --memory, and after /clear, follows the given memory."""
    note = tmp_path / "note.txt"
    note.write_text("Ben has 4 coins.")
    file = tmp_path / "note.safetensors"
    assert main(["remember", str(note), "--out", str(file), "--quiet"]) == 0
    [slots] = KVCache.load(file, load().model).lengths
    status, out, err = chat([EVA, "/clear", EVA, "/clear", "/show"], "--memory", file, "--json")
    first, second = (one["usage"]["memory_bytes"] for one in records(out))
    [without] = records(chat([EVA], "--json")[1])
    assert status == 0 and first == second
    assert first == without["usage"]["memory_bytes"] + slots * 768
    assert f"KV cache: KVCache(lengths=[{slots}], " in err
    assert "KV cache: None" in chat([EVA, "/clear", "/show"])[2]


def test_show_describes_the_conversation(chat: Chat) -> None:
    _, out, err = chat([EVA, TOM, "/show"], "-n", 9, "--json")
    size = records(out)[-1]["usage"]["memory_bytes"]
    assert re.search(r"^ *turns: 2$", err, re.M)
    assert f"KVCache(lengths=[{size // 768}], {size:,} bytes, " in err
    assert re.search(r"^ *model: weights/tiny$", err, re.M) and "'max_new_tokens': 9" in err


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("/what", "'/what', expected .*/clear.*/save FILE.*/load FILE.*/show.*/exit"),
        ("/ clear", "'/ clear', expected"),
        ("/save", "'/save', expected .*/save FILE"),
        ("/load", "'/load', expected .*/load FILE"),
        ("/clear all", "'/clear all', expected"),
        ("/save {tmp}/none/talk", "none/talk: cannot write the memory"),
        ("/save {tmp}", "cannot write the memory"),
        ("/load {tmp}/none", "none: no such file"),
        ("/load {tmp}", "damaged file or another format"),
        ("/load {other}", "other: model: found memory of"),
        ("half \udcff of a character", "expected UTF-8 text"),
    ],
)
def test_an_error_is_one_line_and_leaves_the_conversation_unchanged(
    chat: Chat, tmp_path: Path, command: str, named: str
) -> None:
    stranger = tiny_model(vocab_size=tiny_tokenizer().size)
    cache = stranger.new_cache(1)
    prefill(stranger, [[1, 2]], cache)
    cache.save(tmp_path / "other")
    command = command.format(tmp=tmp_path, other=tmp_path / "other")
    status, out, err = chat([EVA, command, TOM], "--json")
    assert status == 0 and len(records(out)) == 2
    [line] = errors(err)
    assert re.match(rf"minimas: error: .*{named}", line), line
    expected = records(chat([EVA, TOM], "--json")[1])
    assert [one["text"] for one in records(out)] == [one["text"] for one in expected]
    sizes = [one["usage"]["memory_bytes"] for one in records(out)]
    assert sizes == [one["usage"]["memory_bytes"] for one in expected]


def test_an_empty_conversation_is_not_saved(chat: Chat, tmp_path: Path) -> None:
    """A conversation is also empty after a message that failed."""
    for lines in ([], ["a " * 20_000], [EVA, "/clear"]):
        status, _, err = chat([*lines, f"/save {tmp_path / 'talk'}"])
        assert status == 0 and "/save FILE (after a message)" in errors(err)[-1]
    assert not list(tmp_path.iterdir())


def test_a_full_context_is_an_error_that_suggests_clear(chat: Chat, folder: Path) -> None:
    """The error comes before prefill. After /clear there is room again."""
    lines = ["one two three"] * 9
    status, out, err = chat([*lines, "/clear", lines[0]], "-m", folder, "-n", 12, "--json")
    assert status == 0
    found, said = records(out), errors(err)
    assert len(found) + len(said) == len(lines) + 1 and len(said) > 1
    assert all("expected at most 150 (the context)" in line and "/clear" in line for line in said)
    assert found[-1]["usage"]["memory_bytes"] == found[0]["usage"]["memory_bytes"]


def test_a_full_context_in_ask_does_not_suggest_a_chat_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ask` also suggested "/clear", which only a chat has."""
    assert main(["ask", "one two three " * 60, "-m", str(folder), "--method", "single"]) == 1
    err = capsys.readouterr().err
    assert "expected at most 150 (the context)" in err and "/clear" not in err


# -- processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model that never ends its turn."""
    return endless_folder(tmp_path_factory.mktemp("endless") / "model", 100_000)


class Terminal:
    """A pseudo-terminal: a process uses `end` as its streams, and a test types and reads."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self.master, self.end = ends
        self.shown = ""  # what was shown and not yet returned by `until`

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, text: str) -> str:
        """Return what the terminal shows, up to the end of `text`."""
        while text not in self.shown:
            self.shown += os.read(self.master, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before + text


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    ends = pty.openpty()
    try:
        with within():
            yield Terminal(ends)
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_keeps_the_chat(endless: Path) -> None:
    """The conversation stays as it was before the message. At the prompt, Ctrl-C ends the chat."""
    with terminal() as tty:
        flags = ["chat", "-m", endless, "-n", 90_000]
        with start(*flags, stdin=tty.end, stdout=tty.end) as process:
            assert process.stderr is not None
            tty.until("> ")
            tty.type("hi\n")
            tty.until("hi\r\n")
            assert os.read(tty.master, 5), "the answer begins"
            process.send_signal(signal.SIGINT)
            while "stopped" not in (line := process.stderr.readline()):
                assert line, "it ended"
            tty.until("\r\n> ")
            tty.type("/show\n")
            tty.until("/show\r\n> ")
            while "turns: 0" not in (line := process.stderr.readline()):
                assert line, "it ended"
            while "versions" not in process.stderr.readline():
                pass
            time.sleep(0.5)  # the sign is shown just before it waits for input
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "\nminimas: stopped\n")


@pytest.mark.slow
def test_the_prompt_sign_is_shown_on_a_terminal() -> None:
    with (
        terminal() as tty,
        start("chat", "--quiet", stdin=tty.end, stdout=tty.end) as process,
    ):
        assert tty.until("> ") == "> "
        tty.type(EVA + "\n")
        assert tty.until("</think> 6\r\n> ") == f"{EVA}\r\n<think> 2 9 6</think> 6\r\n> "
        tty.type("\x04")
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.slow
def test_the_prompt_sign_is_not_among_answers_that_are_redirected() -> None:
    with terminal() as tty, start("chat", "--quiet", stdin=tty.end) as process:
        tty.type(EVA + "\n\x04")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "<think> 2 9 6</think> 6\n", "")


@pytest.mark.slow
def test_a_long_message_from_a_terminal_is_complete(endless: Path) -> None:
    """A terminal's own lines end after 4,095 bytes. The rest was lost, without a word."""
    pytest.importorskip("readline")
    part = "Eva has 2 cards. " * 50
    flags = ["chat", "-m", endless, "-n", 1, "--json", "--quiet"]
    with terminal() as tty, start(*flags, stdin=tty.end, stdout=tty.end) as process:
        tty.until("> ")
        for _ in range(8):
            tty.type(part)
            tty.until("cards. ")
        tty.type("\n")
        tty.until("{")
        record = json.loads("{" + tty.until("}\r\n"))
        tty.until("> ")
        tty.type("\x04")
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert record["question"] == (8 * part).strip()


@pytest.mark.slow
def test_a_closed_stdout_ends_the_chat_quietly(endless: Path) -> None:
    flags = ["chat", "-m", endless, "-n", 90_000, "--quiet"]
    with start(*flags, stdin=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("hi\nhi\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_ends_the_chat() -> None:
    """The chat continued, and all later answers were lost."""
    how: dict[str, Any] = {"stdin": subprocess.PIPE}
    with Path("/dev/full").open("w") as full, start("chat", "--quiet", stdout=full, **how) as chat:
        _, err = chat.communicate(f"{EVA}\n{EVA}\n", timeout=60)
    assert chat.returncode == 1
    assert re.fullmatch(r"minimas: error: .*No space left on device.*\n", err), err
