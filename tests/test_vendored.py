"""Copying `minimas/` into another project must work, and its rooms must stay apart and small.

Claims about size drift when nobody counts: gpt-fast says "<1000" lines and has 2,364, nano-vllm "~1,200" and 1,385.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import minimas

from .models import TINY, tiny_model, write_folder
from .text import tiny_tokenizer

LIBRARY = Path(minimas.__file__).parent
ROOMS = {path.stem: path for path in sorted(LIBRARY.glob("*.py")) if path.stem != "__init__"}
CORE = ("config", "rotary", "cache", "model", "latent")
NOT_COUNTED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip

# Rooms by floor: a room imports from lower floors only, or, named here, from beside it.
FLOORS = (
    {"config", "rotary", "files", "tokenizer", "prompts", "answers", "bnb", "gguf_file", "hub", "few_rows", "order"},
    {"cache", "teams", "gguf", "packed"},
    {"model", "quantize", "results", "layout"},
    {"generate", "latent", "speed"},
    {"load"},
    {"info", "turns"},
    {"agents"},
    {"nll"},
    {"check"},
    {"__main__"},
)
# Rooms that must work when copied without the others: what each of them may import when it is imported.
ALONE = {
    "config": set(),
    "rotary": set(),
    "files": set(),
    "prompts": set(),
    "answers": set(),
    "tokenizer": {"config"},
    "cache": {"config", "rotary"},
    "model": {"config", "rotary", "cache"},
    "latent": {"cache", "model"},
    "generate": {"cache", "model", "tokenizer"},
    "load": {"config", "rotary", "cache", "model"},
}


def imported(room: str, at_import: bool) -> set[str]:
    """The rooms that a room imports: at import, or anywhere, for types and inside functions too."""
    found: set[str] = set()

    def visit(node: ast.AST) -> Iterator[ast.AST]:
        if at_import and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    for node in visit(ast.parse(ROOMS[room].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{room}: imports from outside the library"
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                assert top not in ("minimas", "tools", "tests"), f"{room}: imports {name}, which a copy has not"
    return found


def test_every_room_has_a_floor() -> None:
    """A new file must say where it stands, or the next two tests would not look at it."""
    assert set().union(*FLOORS) >= set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_no_arrow_runs_up(room: str) -> None:
    """Not for types, and not inside a function either."""
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[:floor])
    beside = {"config"} if floor == 0 else set()
    assert imported(room, at_import=False) <= below | beside


@pytest.mark.parametrize("room", ALONE)
def test_a_room_needs_only_the_rooms_below_it(room: str) -> None:
    assert imported(room, at_import=True) <= ALONE[room]


def test_an_upward_arrow_would_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The negative control: for types, inside a function, and by the library's own name."""
    room = tmp_path / "cache.py"
    monkeypatch.setitem(ROOMS, "cache", room)
    room.write_text("def f():\n    from .agents import Team\n")
    assert imported("cache", at_import=False) == {"agents"} and imported("cache", at_import=True) == set()
    room.write_text("if TYPE_CHECKING:\n    from . import load\n")
    assert imported("cache", at_import=False) == {"load"} and imported("cache", at_import=True) == set()
    room.write_text("import minimas.load\n")
    with pytest.raises(AssertionError, match="which a copy has not"):
        imported("cache", at_import=False)


def test_a_copy_under_another_name_works(tmp_path: Path) -> None:
    """Without weights/tiny beside it the default says what to pass; with a folder everything works."""
    shutil.copytree(LIBRARY, tmp_path / "project" / "latent", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    folder = write_folder(tmp_path / "model", tiny_model(vocab_size=tiny_tokenizer().size), tokenizer=TINY)
    script = f"""
import sys
from latent import Sampling, hierarchical, latent_mas, load, single, text_mas
from latent.__main__ import main
lm = load({str(folder)!r})
short = Sampling(max_new_tokens=3)
for results in (
    latent_mas(lm, ["one?", "a longer one?"], hierarchical(), 2, sampling=short),
    text_mas(lm, ["one?"], sampling=short),
    single(lm, ["one?"], sampling=short),
):
    assert all(r.usage.output_tokens <= 12 for r in results)
print(len(lm.aligner("ridge").matrix), "minimas" in sys.modules)
try:
    load()
except FileNotFoundError as error:
    print(error)
sys.exit(main(["ask", "hi", "-m", {str(folder)!r}, "-n", "3", "--quiet"]))
"""
    done = run_python(tmp_path / "project", script)
    assert done.returncode == 0, done.stderr
    sizes, error, _answer = done.stdout.split("\n", 2)
    assert sizes == "16 False"
    assert "weights/tiny" in error and re.search(r"--model \S+/\S+", error)


def test_the_core_works_without_the_rest(tmp_path: Path) -> None:
    """config, rotary, cache, model and load copied alone read a folder and run it."""
    (tmp_path / "core").mkdir()
    (tmp_path / "core/__init__.py").touch()
    for room in ("config", "rotary", "cache", "model", "load"):
        shutil.copy(ROOMS[room], tmp_path / "core")
    folder = write_folder(tmp_path / "model", tiny_model())
    script = f"""
import torch
from core.load import load
lm = load({str(folder)!r})
print(tuple(lm.model.logits(lm.model(lm.model.embed(torch.tensor([[1, 2, 3]])))).shape))
"""
    done = run_python(tmp_path, script)
    assert (done.returncode, done.stdout) == (0, "(1, 3, 41)\n"), done.stderr


def run_python(folder: Path, script: str) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


# -- size -------------------------------------------------------------------------------------------------------------


def lines(*rooms: str) -> int:
    return sum(len(ROOMS[room].read_text(encoding="utf-8").splitlines()) for room in rooms)


def test_the_core_is_read_in_one_sitting() -> None:
    assert lines(*CORE) <= 720


def tokens(path: Path) -> int:
    """The Python tokens of a file without comments, docstrings and layout: what there is to read."""
    with path.open("rb") as file:
        found = [token for token in tokenize.tokenize(file.readline) if token.type not in NOT_COUNTED]
    statements = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Expr)]
    texts = [node for node in statements if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    docs = {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return sum(token.start[0] not in docs for token in found)


def test_the_library_does_not_grow() -> None:
    """The aim is 29,000 tokens. This ceiling is where the library stands, and it only ever goes down."""
    assert sum(tokens(path) for path in LIBRARY.glob("*.py")) <= 38_500


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_overflows(room: str) -> None:
    """If a room overflows, split the concept, do not shrink the explanation."""
    assert lines(room) <= 340
