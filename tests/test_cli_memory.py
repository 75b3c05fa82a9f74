"""Check `remember`, `ask --memory`, `--save-memory`, `info` of a memory, and `--show-thoughts`.

weights/tiny answers questions about remembered notes, as in a team of experts.
"""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from minimas import KVCache, Team, latent_mas, load, remember
from minimas.__main__ import main
from minimas.lens import Lens, ThoughtView

from .models import TINY, tiny_model, write_folder
from .text import tiny_tokenizer

EVA = (
    "Math expert: work it out. Eva has 5 coins. She buys 7 more. She eats 6. She doubles the coins."
)
TOM = "Science expert: work it out. Tom has 3 coins. He loses 1. He gets 7 more."
ASKED = "Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?"
READER = {"agents": [{"name": "reader", "prompt": "Summarizer: give the answer. {question}"}]}


class Files:
    """A folder with notes, their memories, and a team of one agent that answers from a memory."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self["team.json"].write_text(json.dumps(READER))
        self["eva.txt"].write_text(EVA)
        self["tom.txt"].write_text(TOM)

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def run(self, *argv: Any) -> tuple[int, str, str]:
        self.capsys.readouterr()
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            status = stop.code
        return status, *self.capsys.readouterr()

    def remember(self, note: str, *flags: Any) -> Path:
        out = self[f"{note}.safetensors"]
        how = ["--role", "agent", "--latent-steps", 6, "--out", out, "--quiet"]
        assert self.run("remember", self[f"{note}.txt"], *how, *flags) == (0, "", "")
        return out

    def read(self, question: str, *flags: Any) -> dict[str, Any]:
        """Return the record of the agent's answer."""
        argv = ["ask", question, "--team", self["team.json"], "--json", "--quiet", *flags]
        status, out, err = self.run(*argv)
        assert (status, err) == (0, "")
        record: dict[str, Any] = json.loads(out)
        return record

    def refused(self, *argv: Any) -> str:
        """Return the error of a command that prints this one line and nothing else."""
        status, out, err = self.run(*argv)
        assert status in (1, 2) and out == ""
        assert re.fullmatch(r"minimas: error: .*\n", err), err
        return err


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Files:
    return Files(tmp_path, capsys)


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """Return another model with the tokenizer of weights/tiny and a context of 300 slots."""
    model = tiny_model(vocab_size=tiny_tokenizer().size, max_position_embeddings=300)
    return write_folder(tmp_path / "stranger", model, tokenizer=TINY)


# -- memories ------------------------------------------------------------------------------------


def test_a_remembered_note_is_used_and_not_prefilled_again(files: Files) -> None:
    """The answer equals that of `memory=`, with fewer prompt tokens than with the text."""
    question = "How many coins does Eva have?"
    found = files.read(question, "--memory", files.remember("eva"))
    lm = load()
    memory = remember(lm, EVA, 6, role="agent")
    [expected] = latent_mas(lm, [question], Team.from_json(files["team.json"]), memory=memory)
    assert (found["answer"], found["text"]) == ("Eva 12", expected.text)
    assert found["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert found["memory"] == [str(files["eva.safetensors"])]
    with_text = files.read(f"{EVA} {question}")
    assert found["usage"]["prompt_tokens"] < with_text["usage"]["prompt_tokens"] - 20
    assert files.read(question)["answer"] != "Eva 12" and with_text["memory"] is None


@pytest.mark.parametrize("method", ["single", "text_mas", "latent_mas"])
def test_every_method_starts_after_the_memory(files: Files, method: str) -> None:
    argv = ["ask", ASKED, "--method", method, "--json", "--quiet", "-n", 4]
    plain = json.loads(files.run(*argv)[1])
    used = json.loads(files.run(*argv, "--memory", files.remember("tom"))[1])
    assert used["agents"][0]["prompt_tokens"] == plain["agents"][0]["prompt_tokens"]
    assert used["agents"][0]["memory_bytes"] > plain["agents"][0]["memory_bytes"]


def test_two_memories_are_joined_in_order(files: Files) -> None:
    """Each note answers its own question. The second one was rotated to its new position."""
    both = ["--memory", files.remember("eva"), "--memory", files.remember("tom")]
    assert files.read("How many coins does Eva have?", *both)["answer"] == "Eva 12"
    found = files.read("How many coins does Tom have?", *both)
    lm = load()
    memory = KVCache.concat([KVCache.load(file, lm.model) for file in both[1::2]])
    [expected] = latent_mas(
        lm, ["How many coins does Tom have?"], Team.from_json(files["team.json"]), memory=memory
    )
    assert found["answer"] == "Tom 9" and found["text"] == expected.text


@pytest.mark.parametrize("as_json", [False, True])
def test_the_kv_cache_after_an_answer_can_be_saved_and_used(files: Files, as_json: bool) -> None:
    """The cache must not be in the JSON. It was copied there only to print its address."""
    saved = files["after.safetensors"]
    flags = ["--json"] if as_json else []
    status, out, err = files.run("ask", ASKED, "--save-memory", saved, *flags)
    assert status == 0 and "total" in err and "KVCache" not in out
    lm = load()
    [expected] = latent_mas(lm, [ASKED], keep_memory=True)
    assert expected.memory is not None
    assert KVCache.load(saved, lm.model).lengths == expected.memory.lengths
    again = json.loads(files.run("ask", ASKED, "--memory", saved, "--json", "--quiet")[1])
    assert again["agents"][0]["memory_bytes"] > expected.memory.nbytes


def test_info_describes_a_memory_file(files: Files) -> None:
    out = files.remember("eva")
    lm = load()
    status, said, err = files.run("info", out)
    assert (status, err) == (0, "")
    assert lm.model.name in said and lm.model.fingerprint() in said
    assert f"1 rows of {KVCache.load(out, lm.model).lengths} slots" in said


def test_remember_prints_what_it_saved_unless_it_is_quiet(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Eva has 2 cards."))
    monkeypatch.chdir(files.folder)
    status, out, err = files.run("remember", "-")
    assert (status, out) == (0, "")
    [slots] = KVCache.load("memory.safetensors", load().model).lengths
    assert err.startswith(f"memory.safetensors: {slots} slots, ") and err.count("\n") == 1


def test_a_memory_in_8_bits_makes_a_smaller_file_that_works(files: Files) -> None:
    """The printed size is that of the file, not of the cache in use."""
    plain = files.remember("eva")
    small = files["small.safetensors"]
    how = ["--role", "agent", "--latent-steps", 6, "--out", small, "--bits", 8]
    status, _, err = files.run("remember", files["eva.txt"], *how)
    assert status == 0
    ratio = small.stat().st_size / plain.stat().st_size
    assert ratio < 0.62 and f"{small.stat().st_size / 1e6:,.2f} MB" in err
    question = "How many coins does Eva have?"
    assert files.read(question, "--memory", small)["answer"] == "Eva 12"
    assert "torch.int8" in files.run("info", small)[1]
    assert "invalid choice: 4" in files.run("remember", files["eva.txt"], "--bits", "4")[2]


@pytest.mark.parametrize("role", ["user", "system", "agent", "plain"])
def test_role_and_latent_steps_work_as_in_python(files: Files, role: str) -> None:
    flags = ["--role", role, "--latent-steps", 2, "--align", "identity"]
    lm = load()
    found = KVCache.load(files.remember("tom", *flags), lm.model)
    expected = remember(lm, TOM, 2, "identity", role)
    assert found.lengths == expected.lengths
    assert float((found.keys[-1] - expected.keys[-1][:, :, : found.lengths[0]]).abs().max()) == 0


# -- errors --------------------------------------------------------------------------------------


def test_a_memory_of_another_model_is_refused_by_name(files: Files, stranger: Path) -> None:
    path = files.remember("eva")
    said = files.refused("ask", "q?", "-m", stranger, "--memory", path)
    assert f"{path}: model: found memory of " in said and f"'{load().model.name}'" in said
    assert f"expected {{'model': '{stranger}'" in said


def test_a_file_that_is_not_a_memory_is_refused_by_name(files: Files) -> None:
    load().aligner("identity").save(files["map.safetensors"])
    for name, problem in (
        ("none.safetensors", "no such file"),
        (".", "found a damaged file or another format, expected safetensors"),
        ("eva.txt", "found a damaged file or another format, expected safetensors"),
        ("map.safetensors", "format: found 'minimas-aligner-1', expected minimas-memory-1"),
    ):
        path = files[name]
        assert f"{path}: {problem}" in files.refused("ask", ASKED, "--memory", path)
    assert str(TINY / "model.safetensors") in files.refused("info", TINY / "model.safetensors")
    assert "none.safetensors: no such file" in files.refused("info", files["none.safetensors"])


def test_only_one_answer_can_be_saved(files: Files) -> None:
    """Two answers have two caches, and one file would have only the last one."""
    files["q.jsonl"].write_text('{"question": "one?"}\n{"question": "two?"}\n')
    argv = ["ask", "--file", files["q.jsonl"], "--save-memory", files["m.safetensors"]]
    assert "--save-memory: found 2 questions, expected one" in files.refused(*argv)
    assert not files["m.safetensors"].exists()


def test_a_memory_that_cannot_be_saved_does_not_lose_the_answer(files: Files) -> None:
    for path in (files["none/m.safetensors"], files.folder):
        status, out, err = files.run("ask", ASKED, "--quiet", "--save-memory", path)
        assert (status, out) == (1, " 6\n")
        assert re.fullmatch(rf"minimas: error: {path}: cannot write the memory .*\n", err), err
    said = files.refused("remember", files["eva.txt"], "--out", files.folder)
    assert f"{files.folder}: cannot write the memory" in said


def test_an_empty_file_name_is_not_ignored(files: Files) -> None:
    """With an unset variable, --file ended in a traceback and --save-memory wrote nothing."""
    status, out, err = files.run("ask", ASKED, "--quiet", "--save-memory", "")
    assert (status, out) == (1, " 6\n")
    assert "cannot write the memory" in err and "expected a file" in err
    assert "Is a directory" in files.refused("ask", "--file", "")


def test_a_memory_does_not_overwrite_its_own_text(files: Files) -> None:
    for path in (files["eva.txt"], files.folder / "none" / ".." / "eva.txt"):
        said = files.refused("remember", files["eva.txt"], "--out", path)
        assert "--out: found " in said and "expected a file other than the text" in said
        assert files["eva.txt"].read_text() == EVA


def test_a_folder_that_does_not_exist_is_found_before_the_text_is_prefilled(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long text was prefilled for minutes, and its KV cache was lost."""
    monkeypatch.setattr("minimas.commands.load_model", lambda *_: pytest.fail("it loaded a model"))
    said = files.refused("remember", files["eva.txt"], "--out", files["none"] / "m.safetensors")
    assert "--out: found " in said and "in a folder that exists" in said


def test_a_text_that_cannot_be_remembered_gives_one_line(
    files: Files, stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", files["m.safetensors"]]
    for text in ("", " \n", "\ud800"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert "FILE: found " in files.refused("remember", "-", *out)
    files["long.txt"].write_text("word " * 400)
    said = files.refused("remember", files["long.txt"], "-m", stranger, *out)
    assert "expected at most 300 (the context)" in said
    assert "none.txt" in files.refused("remember", files["none.txt"], *out)
    files["latin.txt"].write_bytes(b"caf\xe9")
    assert "latin.txt: found bytes" in files.refused("remember", files["latin.txt"], *out)
    assert "--role" in files.refused("remember", files["eva.txt"], "--role", "judge", *out)
    assert "--align: found 'rigde'" in files.refused(
        "remember", files["eva.txt"], "--align", "rigde", "--latent-steps", 1, *out
    )
    assert not files["m.safetensors"].exists()


def test_a_memory_that_fills_the_context_is_refused_before_any_work(
    files: Files, stranger: Path
) -> None:
    files["long.txt"].write_text("word " * 60)
    path = files.remember("long", "-m", stranger)
    argv = ["ask", "q?", "-m", stranger, "--method", "single", "-n", 250, "--memory", path]
    assert "working memory" in files.refused(*argv)


# -- thoughts ------------------------------------------------------------------------------------


def thoughts(err: str) -> list[str]:
    return [line for line in err.splitlines() if " entropy " in line]


def test_each_thought_is_a_line_after_its_agent(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thoughts of weights/tiny are the results of the calculation and the end of the turn."""
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = files.run("ask", ASKED, "--show-thoughts")
    assert (status, out) == (0, " 6\n")
    lines = err.splitlines()
    planner = next(i for i, line in enumerate(lines) if "planner:" in line)
    shown = lines[planner + 1 : planner + 7]
    assert [re.findall(r"'(.*?)'", line)[0] for line in shown[:3]] == [" 2", " 9", " 6"]
    assert "critic:" in lines[planner + 7] and len(thoughts(err)) == 18
    assert all(line.count("%") == 3 for line in shown)
    assert r"'\n'" in shown[4], "a control character would break the line"
    assert len({line.index("%") for line in shown}) == 1
    assert [line.split()[0] for line in shown] == list("123456")
    [first, *_] = thoughts(files.run("ask", ASKED, "--show-thoughts", 5)[2])
    assert first.count("%") == 5 or len(first) == 100


def test_a_thought_in_a_batch_names_its_question(files: Files) -> None:
    """Parallel experts also share a batch, and may have the same name."""
    agents = [{"name": name, "prompt": "{question}"} for name in ("expert", "expert", "last")]
    files["t.json"].write_text(json.dumps({"parallel": True, "agents": agents}))
    files["q.jsonl"].write_text('{"question": "one?"}\n' * 10)
    argv = ["ask", "--file", files["q.jsonl"], "--batch-size", 10, "--latent-steps", 2, "-n", 1]
    argv += ["--team", files["t.json"], "--show-thoughts", 1]
    status, out, err = files.run(*argv, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(thoughts(err)) == 40
    said = [line.split()[0] for line in thoughts(err)]
    assert said == [f"[{i}/10]" for i in range(1, 11) for _ in range(2)] * 2
    assert len({line.index(" entropy") for line in thoughts(err)}) == 1
    assert [[len(own) for own in record["thoughts"]] for record in records] == [[2, 2, 0]] * 10
    assert len({line.index("expert:") for line in err.splitlines() if "expert:" in line}) == 1


def test_json_has_the_thoughts_of_each_agent(files: Files) -> None:
    argv = ["ask", ASKED, "--json", "--quiet"]
    status, out, err = files.run(*argv, "--show-thoughts", 2)
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert [len(agent) for agent in found["thoughts"]] == [6, 6, 6, 0]
    fields = {"tokens", "entropy", "norm", "cosine_before", "nearest", "cosine_nearest"}
    for thought in found["thoughts"][1]:
        assert set(thought) == fields and len(thought["tokens"]) == 2
    plain = json.loads(files.run(*argv)[1])
    assert "thoughts" not in plain and plain["text"] == found["text"]


@pytest.mark.parametrize("columns", [40, 61])
def test_a_thought_fits_into_a_narrow_terminal(
    files: Files, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = thoughts(files.run("ask", ASKED, "--show-thoughts", 9)[2])
    assert len(lines) == 18 and max(map(len, lines)) <= columns
    assert all("'" in line for line in lines), "nothing of the token is left"


def test_a_wide_or_unencodable_token_neither_fails_nor_overflows(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Chinese character takes two columns, and an ASCII terminal cannot print it."""
    monkeypatch.setenv("COLUMNS", "40")
    plain = Lens._views

    def wide(*args: Any) -> list[ThoughtView]:
        views = plain(*args)
        return [
            view._replace(tokens=[("思考思考\x1b[1m", chance) for _, chance in view.tokens])
            for view in views
        ]

    monkeypatch.setattr(Lens, "_views", wide)
    lines = thoughts(files.run("ask", ASKED, "--show-thoughts")[2])
    assert lines and all("思考" in line and "\x1b" not in line for line in lines)
    assert max(len(line) + line.count("思") + line.count("考") for line in lines) <= 40
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert main(["ask", ASKED, "--show-thoughts"]) == 0
    stderr.flush()
    assert b"entropy" in stderr.buffer.getvalue()  # type: ignore[attr-defined]


def test_without_the_flag_no_lens_is_made(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise AssertionError("a lens was made")

    monkeypatch.setattr("minimas.lens.Lens.__init__", fails)
    assert files.run("ask", ASKED)[:2] == (0, " 6\n")


@pytest.mark.parametrize("before", [[], [2]])
def test_a_question_may_follow_show_thoughts(files: Files, before: list[int]) -> None:
    """`--show-thoughts "QUESTION"` is common, but the question was taken for the number K."""
    status, out, err = files.run("ask", "--show-thoughts", *before, ASKED)
    assert (status, out) == (0, " 6\n")
    assert {line.count("%") for line in thoughts(err)} == {2 if before else 3}


def test_a_flag_after_a_double_dash_is_a_question(files: Files) -> None:
    argv = ["ask", "-n", 1, "--json", "--quiet", "--", "--show-thoughts"]
    assert json.loads(files.run(*argv)[1])["question"] == "--show-thoughts"


@pytest.mark.parametrize("k", ["0", "-1", "1.5", "x", ""])
def test_a_wrong_number_of_tokens_gives_one_line(files: Files, k: str) -> None:
    said = files.refused("ask", ASKED, f"--show-thoughts={k}")
    assert "--show-thoughts" in said and "expected a whole number, 1 or more" in said
