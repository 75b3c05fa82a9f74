"""Check that a copy of `minimas/` works elsewhere, and its folders stay separate and small.

Claims about size drift when nobody counts: gpt-fast says "<1000" lines and has 2,364.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import minimas

from .models import TINY, tiny_model, write_folder
from .processes import LIMIT
from .text import tiny_tokenizer

LIBRARY = Path(minimas.__file__).parent
FILES = sorted(path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py"))
NAMES = [str(path) for path in FILES]
NOT_COUNTED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip

# The folders that each folder may import from, besides itself. "" is the top level.
BELOW = {
    "core": set(),
    "text": {"core"},
    "formats": {"core"},
    "fast": {"core"},
    "": {"core", "text", "formats", "fast"},
}


def imports(path: Path, source: str) -> set[str]:
    """Return the library's modules that a file imports, as dotted names, also inside functions."""
    found: set[str] = set()
    package = ("minimas", *path.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            assert base, f"{path}: imports from outside the library"
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names if isinstance(node, ast.Import)]
            for name in modules:
                top = name.split(".")[0]
                foreign = top not in ("minimas", "tools", "tests", "examples")
                assert foreign, f"{path}: imports {name}, which a copy does not have"
    return found


def folder_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[1] in BELOW else ""


def modules_imported(source: str, path: Path) -> set[str]:
    """Return the names of the imported files: `core.cache` for `from .cache import KVCache`."""
    known = {".".join(("minimas", *file.with_suffix("").parts)) for file in FILES}
    found = set()
    for name in imports(path, source):
        stem = name if name in known else name.rpartition(".")[0]
        found |= {stem} & known
    return found


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_only_downwards(name: str) -> None:
    """This includes imports for types and imports inside functions."""
    path = Path(name)
    own = str(path.parent) if path.parent.parts else ""
    for module in imports(path, (LIBRARY / path).read_text(encoding="utf-8")):
        assert folder_of(module) in BELOW[own] | {own}, f"{name} imports {module}"


def test_an_upward_import_is_detected() -> None:
    """This is a negative control: inside a function, for types, and by the library's own name."""
    path = Path("core/cache.py")
    for source in ("def f():\n    from ..agents import Team\n", "if X:\n    from .. import load\n"):
        assert {folder_of(module) for module in imports(path, source)} == {""}
    with pytest.raises(AssertionError, match="which a copy does not have"):
        imports(path, "import minimas.load\n")
    with pytest.raises(AssertionError, match="from outside the library"):
        imports(path, "from ...tools import arms\n")


def test_no_file_is_part_of_an_import_cycle() -> None:
    graph = {}
    for path in FILES:
        name = ".".join(("minimas", *path.with_suffix("").parts))
        source = (LIBRARY / path).read_text(encoding="utf-8")
        graph[name] = modules_imported(source, path) - {name}
    while graph:
        free = {name for name, wanted in graph.items() if not wanted & graph.keys()}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {name: wanted for name, wanted in graph.items() if name not in free}


def test_a_copy_under_another_name_works(tmp_path: Path) -> None:
    """The error for the missing default model says what to pass. With a folder, all works."""
    shutil.copytree(
        LIBRARY,
        tmp_path / "project" / "latent",
        ignore=shutil.ignore_patterns("weights", "__pycache__"),
    )
    folder = write_folder(
        tmp_path / "model", tiny_model(vocab_size=tiny_tokenizer().size), tokenizer=TINY
    )
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
    """`core/` copied alone loads a folder of safetensors and runs the latent loop."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(LIBRARY / "core", tmp_path / "paper", ignore=ignore)
    folder = write_folder(tmp_path / "model", tiny_model())
    script = f"""
import sys
import torch
from paper import Aligner, KVCache, load_model, think
model = load_model({str(folder)!r})
cache = model.new_cache(1)
hidden = model(model.embed(torch.tensor([[1, 2, 3]])), cache)[:, -1:]
thoughts, hidden = think(model, Aligner.from_model(model), hidden, cache, 4)
cache.save("memory.safetensors")
memory = KVCache.load("memory.safetensors", model)
print(tuple(thoughts.shape), tuple(model.logits(hidden).shape), int(memory.lengths[0]))
assert "minimas" not in sys.modules and "tokenizers" not in sys.modules
"""
    done = run_python(tmp_path, script)
    assert (done.returncode, done.stdout) == (0, "(1, 4, 16) (1, 1, 41) 7\n"), done.stderr


def run_python(folder: Path, script: str) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT, check=False
    )


# -- size ----------------------------------------------------------------------------------------


def tokens(path: Path) -> int:
    """Return the number of Python tokens of a file without comments, docstrings and layout."""
    with path.open("rb") as file:
        found = [
            token for token in tokenize.tokenize(file.readline) if token.type not in NOT_COUNTED
        ]
    statements = [
        node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Expr)
    ]
    docs: set[int] = set()
    for node in statements:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(token.start[0] not in docs for token in found)


def test_the_core_is_small_enough_to_read_in_one_evening() -> None:
    """The aim is 6,800."""
    assert sum(tokens(path) for path in (LIBRARY / "core").glob("*.py")) <= 8_242


def test_the_library_does_not_grow() -> None:
    """The aim is 33,000. Before a feature is added, split a concept, move one out, or cut it."""
    assert sum(tokens(LIBRARY / path) for path in FILES) <= 41_389


@pytest.mark.parametrize("folder", ["minimas", "tests", "tools", "examples"])
def test_no_function_is_longer_than_a_screen_and_no_line_wider(folder: str) -> None:
    """Ruff does not count a comment such as `type: ignore` at the end of a line."""
    for path in sorted((LIBRARY.parent / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert max(map(len, source.split("\n"))) <= 100, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 50, f"{path}: {node.name}"
