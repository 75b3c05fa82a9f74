"""Check that hostile programs are judged wrong quickly, and leave no process and no file."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.evaluation import sandbox
from tools.evaluation.sandbox import Outcome, run

from ..processes import LIMIT, Process, within

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="the sandbox is made of Linux's parts"
    ),
]


def guards(folder: Path) -> set[str]:
    """Return the process ids of the sandboxes in `folder` and of the programs in them.

    They have the same command line.
    """
    found = set()
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--guard" in words and any(word.startswith(bytes(folder)) for word in words):
            found.add(line.parent.name)
    return found


@pytest.fixture(autouse=True)
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the path of the sandbox's file for this test.

    It is a link, so that the command line distinguishes its processes from those of other tests. A
    program that is left running would slow the machine down unnoticed.
    """
    link = tmp_path / "guard" / "sandbox.py"
    link.parent.mkdir()
    link.symlink_to(sandbox.__file__)
    monkeypatch.setattr(sandbox, "__file__", str(link))
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    yield link
    assert not list(tmp_path.glob("sandbox-*"))
    assert not guards(link.parent)


GOOD = {
    "a last statement": "x = 1",
    "nothing": "",
    "numpy": "import numpy as np\nassert np.allclose(np.ones(3) @ np.ones(3), 3)",
    "its own folder": "open('a', 'w').write('b')\nassert open('a').read() == 'b'",
    "a folder that was empty": "import os\nassert os.listdir() == []",
    "no environment": "import os\nassert not os.environ",
    "output": "print('x' * 10**6)",
    "a temporary file": "import tempfile\ntempfile.TemporaryFile().write(b'x')",
    "dataclasses": (
        "from __future__ import annotations\n"
        "import dataclasses as d\n@d.dataclass\nclass A:\n    a: int"
    ),
    "deep recursion": "f = lambda n: n and f(n - 1)\nassert f(900) == 0",
    "a thread": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "a child that was waited for": "import os\nif os.fork() == 0:\n    os._exit(0)\nos.wait()",
    "a demonstration of its own": "if __name__ == '__main__':\n    input('?')",
    "a caught exit": "try:\n    raise SystemExit\nexcept SystemExit:\n    pass",
    "memory below the limit": "x = bytearray(200 * 2**20)",
    "Unicode": "ä = '\U0001f600'\nprint(ä)",
}


@pytest.mark.parametrize("name", GOOD)
def test_a_harmless_program_passes(name: str) -> None:
    """A sandbox that fails right answers would be worse than none."""
    assert run(GOOD[name]) == Outcome(True, "passed", pytest.approx(0, abs=20))


ESCAPE = "/tmp/minimas-escaped"
FORK = (
    "import os, time\nif os.fork() == 0:\n"
    "    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n"
)
HOSTILE = {  # program, expected part of the reason
    "os._exit": ("import os\nos._exit(0)", "ended before its last statement"),
    "sys.exit in a function": ("import sys\ndef f():\n    sys.exit()\nf()", "SystemExit"),
    "atexit": ("import atexit, os\natexit.register(os._exit, 0)\nassert False", "AssertionError"),
    "a patched os._exit": ("import os\nos._exit = lambda n: None\nassert False", "AssertionError"),
    "a patched os.write": ("import os\nos.write = lambda *a: 0\nassert False", "AssertionError"),
    "a patched print": ("import builtins\nbuiltins.print = None\nassert False, 'no'", "no"),
    "a trace function": (
        "import sys\nsys.settrace(lambda *a: None)\nassert False",
        "AssertionError",
    ),
    "a failed test": ("assert 1 == 2, 'one\\ntwo'", "one"),
    "a thread that exits": (
        (
            "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\n"
            "time.sleep(5)"
        ),
        "ended before its last statement",
    ),
    "a syntax error": ("def f(:", "SyntaxError"),
    "a null character": ("x = '\0'", "null"),
    "lone surrogates": ("x = \udcff", "SyntaxError"),
    "an endless loop that catches all": (
        (
            "while True:\n    try:\n        while True:\n"
            "            pass\n    except BaseException:\n        pass"
        ),
        "not done after 1 s",
    ),
    "an endless loop without descriptors": (
        "import os\nos.closerange(0, 64)\nwhile True:\n    pass",
        "not done after 1 s",
    ),
    "a sleeper that ignores signals": (
        "import signal, time\nfor s in set(signal.valid_signals()) - {9, 19, 32, 33}:\n"
        "    signal.signal(s, signal.SIG_IGN)\ntime.sleep(600)",
        "not done after 1 s",
    ),
    "a pattern that backtracks": ("import re\nre.match('(a+)+b', 'a' * 60)", "not done after 1 s"),
    "a fork bomb": ("import os\nwhile True:\n    os.fork()", "Error"),
    "a fork bomb that catches all": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "not done after 1 s",
    ),
    "a thread bomb": (
        (
            "import threading, time\nwhile True:\n"
            "    threading.Thread(target=time.sleep, args=(600,)).start()"
        ),
        "can't start new thread",
    ),
    "a 10 GB list": ("x = [0] * (10 * 2**30 // 8)", "MemoryError"),
    "a flood of errors": (
        "import os\nwhile True:\n    os.write(2, b'x' * 10**6)",
        "File too large",
    ),
    "a flood of verdicts": (
        "import os\nwhile True:\n    for fd in range(3, 64):\n        try:\n"
        "            os.write(fd, b'passed ' * 999)\n        except OSError:\n            pass",
        "ended before its last statement",
    ),
    "a forged verdict": (
        "import os\nfor fd in range(3, 64):\n"
        "    try:\n        os.write(fd, b'passed ')\n    except OSError:\n"
        "        pass\nos._exit(0)",
        "ended before its last statement",
    ),
    "a large file": (
        "f = open('x', 'wb')\nwhile True:\n    f.write(bytes(10**6))",
        "File too large",
    ),
    "many files": (
        "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w').close()",
        "No space left",
    ),
    "many large files": (
        "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(10**7))",
        "No space left",
    ),
    "a file outside": (f"open({ESCAPE!r}, 'w')", "Error"),
    "a file above": ("open('../x', 'w')", "Error"),
    "a link outside": (f"import os\nos.symlink({ESCAPE!r}, 'x')\nopen('x', 'w')", "Error"),
    "reading the golds": (f"open({str(ROOT / 'pyproject.toml')!r})", "Error"),
    "reading passwords": ("open('/etc/passwd')", "Error"),
    "looking at processes": ("import os\nos.listdir('/proc')", "Error"),
    "deleting what is there": (f"import os\nos.remove({str(ROOT / 'pyproject.toml')!r})", "Error"),
    "the network": ("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)", "Error"),
    "a server": ("import socket\nsocket.create_server(('127.0.0.1', 0))", "Error"),
    "another program": (
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
        "Error",
    ),
    "another user": ("import os\nos.setuid(0)\nos.setuid(1)\nos.setuid(0)", "Error"),
    "higher limits": ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "Error"),
    "a mount": (
        "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/mnt', b'tmpfs', 0, None) == 0",
        "AssertionError",
    ),
    "a detached child": (FORK + "        os._exit(0)\n    os._exit(0)", "left a process behind"),
    "a detached child, and an error": (FORK + "assert False", "AssertionError"),
    "a child that goes on": ("import os\nos.fork()", "twice, or left a process behind"),
    "killing the parent": ("import os\nos.kill(os.getppid(), 9)", "Error"),
    "killing the group": ("import os\nos.kill(0, 9)", "ended before its last statement"),
    "killing all": ("import os\nos.kill(-1, 9)\nos._exit(0)", ""),
    "a crash": ("import ctypes\nctypes.string_at(0)", "ended before its last statement"),
    "reading input": ("input()", "EOFError"),
    "a debugger's prompt": ("breakpoint()", "BdbQuit"),
    "closing everything": ("import os\nos.closerange(0, 64)", "ended before its last statement"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_ends_soon_and_is_judged_wrong(name: str) -> None:
    """The authors run these with exec() in a fork of the evaluation, with the user's rights.

    There, SystemExit ends the run.
    """
    program, reason = HOSTILE[name]
    with within():
        outcome = run(program, timeout=1 if reason == "not done after 1 s" else 20)
    assert not outcome.passed
    assert reason in outcome.reason and "\n" not in outcome.reason and len(outcome.reason) <= 300
    assert not Path(ESCAPE).exists()
    assert (ROOT / "pyproject.toml").exists()


@pytest.fixture
def without_landlock(guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Landlock in the sandbox with a system call that no kernel has."""
    source = guard.read_text(encoding="utf-8")
    assert "SYS_MOUNT_SETATTR, SYS_LANDLOCK = 442, 444" in source
    weaker = guard.with_name("weaker.py")
    weaker.write_text(
        source.replace("SYS_LANDLOCK = 442, 444", "SYS_LANDLOCK = 442, 9999"), encoding="utf-8"
    )
    monkeypatch.setattr(sandbox, "__file__", str(weaker))


@pytest.mark.usefixtures("without_landlock")
def test_namespaces_alone_confine_files_and_network() -> None:
    """Without Landlock, the namespaces must still confine a program.

    A layer that is never needed may not work.
    """
    assert run("import os\nassert os.listdir() == []\nopen('x', 'w')").passed
    assert "Read-only" in run(f"open({ESCAPE!r}, 'w')").reason
    assert (
        "unreachable" in run("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)").reason
    )
    assert run("import os\nassert os.listdir('/run') == []").passed


@pytest.mark.usefixtures("without_landlock")
def test_an_isolation_that_the_kernel_refuses_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a sandbox could have no effect without a message."""
    monkeypatch.setattr(sandbox, "_told", set())
    assert run("x = 1").passed and run("x = 1").passed
    assert (
        capsys.readouterr().err
        == "sandbox: this kernel does not allow Landlock; programs run without it\n"
    )


def test_this_kernel_allows_every_layer_of_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests would pass even if half of the layers were missing."""
    told: set[str] = set()
    monkeypatch.setattr(sandbox, "_told", told)
    assert run("x = 1").passed
    if told:
        pytest.skip(f"this kernel refuses {', '.join(sorted(told))}")


def test_killing_the_caller_ends_the_program(tmp_path: Path, guard: Path) -> None:
    """The program of a stopped run must not continue.

    Only an empty folder is left.
    """
    (tmp_path / "left").mkdir()
    code = (
        "import os; from tools.evaluation import sandbox; sandbox.__file__ = os.environ['GUARD']\n"
        "sandbox.run('import time; time.sleep(600)', 600)"
    )
    variables = {"TMPDIR": str(tmp_path / "left"), "GUARD": str(guard)}
    with within(), Process([sys.executable, "-c", code], env=os.environ | variables, cwd=ROOT) as p:
        while len(guards(guard.parent)) < 3:  # the guard, process 1, the program
            time.sleep(0.05)
        p.kill()
        p.wait()
        while guards(guard.parent):
            time.sleep(0.05)
    assert [list(folder.iterdir()) for folder in (tmp_path / "left").iterdir()] == [[]]


@pytest.mark.parametrize(("program", "status"), [("x = 1", 0), ("assert False", 1), (None, 2)])
def test_the_exit_status_of_the_command_is_the_verdict(
    program: str | None, status: int, tmp_path: Path
) -> None:
    """A script must be able to use the exit status alone."""
    file = tmp_path / "program.py"
    if program is not None:
        file.write_text(program)
    command: list[Any] = [
        sys.executable,
        ROOT / "tools" / "sandbox.py",
        file,
        "--timeout",
        "10",
        "--memory",
        "512",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("\n") == 1 and ("Traceback" not in done.stderr)


def test_the_guard_imports_only_the_standard_library() -> None:
    """The guard runs without the library's folder on its path."""
    tree = ast.parse(Path(sandbox.__file__).read_text(encoding="utf-8"))
    names = {
        n.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for n in node.names
    }
    names |= {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert names <= sys.stdlib_module_names
