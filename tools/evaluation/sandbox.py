"""Run an untrusted Python program in a sandbox, and report whether it reached its last statement.

The program runs as a module in a new interpreter without environment variables, input or network,
in its own empty folder. It is confined by these layers, from the outermost to the innermost:

* The caller stops the guard, a separate process, when the time is up. The guard then kills process
  1 of the program's PID namespace, and ends when none of its processes is left.
* The guard has its own session, and creates user, mount, PID, network and IPC namespaces. Process 1
  of the PID namespace dies with the guard, and then the kernel kills all other processes in it.
* Every mount is read-only, /run is empty, and the folder is a small file system in RAM that is
  removed at the end.
* The program has no capabilities. Under root it also has the user id of nobody, except for opening
  files: root is exempt from the limit on processes, but another user could not read an interpreter
  in /root.
* There are limits on memory, CPU time, processes, open files, file size and output. Landlock limits
  the files that can be opened.

If the kernel does not support a layer, its name is printed on stderr once. The program passes if a
secret token is returned, which is read only after the last statement. os._exit(0), SystemExit and
atexit do not reach that point. A program could find the token on purpose: the sandbox is meant for
programs that models write, and does not protect against malicious people. The memory limit applies
to each process, and there are at most PROCESSES of them. Files in memory (memfd, System V) are not
counted. The sandbox needs Linux.

This file is also the program of the guard, so it imports only the standard library. This module
does not depend on tasks, tests or answers.
"""

import contextlib
import ctypes
import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

PROCESSES = 8  # threads count too
MB = 2**20
FOLDER_MB = 64
FILE_MB = 16  # of one file, and of the output
NOBODY = 65534
_told: set[str] = set()


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `reason` is "passed", or one line that says why it did not pass."""

    passed: bool
    reason: str
    seconds: float
    timed_out: bool = False


def run(program: str, timeout: float = 20.0, memory_mb: int = 1024) -> Outcome:
    """Run `program` in all layers of the sandbox that the kernel supports.

    `timeout` is in seconds and includes the start. Raises OSError on systems other than Linux. The
    program itself cannot cause an exception here.
    """
    check_platform()
    start, token = time.monotonic(), secrets.token_hex(16)
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        order = {
            "program": program.encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
            "token": token,
            "folder": folder,
            "verdict": writing,
            "cpu": math.ceil(timeout),
            "memory": memory_mb * MB,
            "caller": os.getpid(),
        }
        guard = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", __file__, "--guard"],
            # This makes the order of sets the same in every run. The program does not see it.
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        try:
            assert guard.stdin is not None
            with contextlib.suppress(BrokenPipeError), guard.stdin:
                guard.stdin.write(json.dumps(order).encode())
            said, ended = _read(reading, start + timeout)
        finally:
            guard.terminate()  # it kills process 1 and waits until the kernel has killed the rest
            try:
                guard.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(guard.pid, signal.SIGKILL)
                guard.wait()
            os.close(reading)
    return _outcome(said, ended, token, timeout, time.monotonic() - start)


def check_platform() -> None:
    """Raise OSError on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        raise OSError(f"sandbox: found platform {sys.platform}, expected linux")


def _outcome(said: bytes, ended: bool, token: str, timeout: float, seconds: float) -> Outcome:
    """Return how a program ended, from the guard's report. Prints layers that are not supported."""
    head, _, verdict = said.partition(b"\n")
    for missing in json.loads(head) if verdict or head.endswith(b"]") else []:
        if missing not in _told:
            _told.add(missing)
            text = f"sandbox: this kernel does not allow {missing}; programs run without it"
            print(text, file=sys.stderr)
    if verdict == f"passed {token}".encode():
        return Outcome(True, "passed", seconds)
    if verdict.startswith(f"passed {token}".encode()):
        return Outcome(False, "reached its last statement twice, or left a process behind", seconds)
    if not ended:
        return Outcome(False, f"not done after {timeout:g} s", seconds, timed_out=True)
    if verdict.startswith(b"raised "):
        reason = " ".join(verdict[7:].decode("utf-8", "replace").split())[:300]
        return Outcome(False, reason, seconds)
    return Outcome(False, "ended before its last statement", seconds)


def _read(descriptor: int, until: float, most: int = 4096) -> tuple[bytes, bool]:
    """Return the bytes read before the time is up, and True if they ended or were too many."""
    said = b""
    while (left := until - time.monotonic()) > 0 and select.select([descriptor], [], [], left)[0]:
        piece = os.read(descriptor, most)
        said += piece
        if not piece or len(said) > most:
            return said[:most], True
    return said, False


# -- the guard, which runs in a separate process ----------------------------------------------

_C: Any = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
NEW_NAMESPACES = {
    "mount namespaces": 0x20000,
    "IPC namespaces": 0x8000000,
    "network namespaces": 0x40000000,
}
NEW_USER, NEW_PID = 0x10000000, 0x20000000
PR_SET_PDEATHSIG, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 1, 28, 38
NO_SETUID_FIXUP = 4
MS_NOSUID_NODEV, MS_REC_PRIVATE = 2 | 4, 0x4000 | 0x40000
SYS_MOUNT_SETATTR, SYS_LANDLOCK = 442, 444  # the same numbers on x86-64 and ARM64
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1


def _call(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _guard() -> None:
    order = json.load(sys.stdin)
    _die_with_parent()
    if os.getppid() != order["caller"]:  # the caller died before the line above
        return
    missing: list[str] = []
    token, secret = os.pipe()
    os.write(secret, order.pop("token").encode())
    os.close(secret)
    user = _attempt("user namespaces", missing, _enter_user_namespace) or 0
    for name, flag in NEW_NAMESPACES.items():
        _attempt(name, missing, partial(_unshare, flag))
    _attempt("PID namespaces", missing, partial(_unshare, NEW_PID))
    if not (init := os.fork()):
        _die_with_parent()
        if "mount namespaces" not in missing:
            _attempt("read-only mounts", missing, lambda: _mount(order["folder"]))
        if not (child := os.fork()):
            _program(order, token, user, missing)
        os.close(token)
        while os.wait()[0] != child:  # process 1 inherits orphans, which end when it ends
            pass
        with contextlib.suppress(ChildProcessError):  # no process is left
            while os.waitpid(-1, os.WNOHANG) != (0, 0):  # this process had already ended
                pass
            os.write(order["verdict"], b" left a process behind")
        os._exit(0)
    # Process 1 stays in the process table until all others of its namespace are gone. waitpid
    # therefore returns last, also for a program that closed its descriptors.
    signal.signal(signal.SIGTERM, lambda *_: _kill(init))
    os.closerange(3, 64)
    os.waitpid(init, 0)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, signal.SIGKILL)


def _unshare(flag: int) -> int:
    return _call(_C.unshare(flag))


def _die_with_parent() -> None:
    _call(_C.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def _attempt(name: str, missing: list[str], action: Callable[[], int | None]) -> int | None:
    try:
        return action()
    except OSError:
        missing.append(name)
        return None


def _enter_user_namespace() -> int:
    """Enter a new user namespace, and return the user id for the program in it.

    Under root, the id is that of another user if the kernel allows it.
    """
    uid, gid, guard = os.getuid(), os.getgid(), os.getpid()
    wait, go = os.pipe()
    if not (helper := os.fork()):  # only a process outside can map a second user
        os.close(go)
        entered = os.read(wait, 1)
        maps = [f"0 {uid} 1\n1 {NOBODY} 1\n"] * (uid == 0) + [f"0 {uid} 1\n"]
        for attempt, users in enumerate(maps if entered else []):
            with contextlib.suppress(OSError):
                Path(f"/proc/{guard}/uid_map").write_text(users)
                Path(f"/proc/{guard}/setgroups").write_text("deny")
                Path(f"/proc/{guard}/gid_map").write_text(f"0 {gid} 1\n")
                os._exit(10 + (len(maps) - attempt) // 2)
        os._exit(1)
    try:
        _call(_C.unshare(NEW_USER))
        os.write(go, b"1")
    finally:
        os.close(go)
        os.close(wait)
        status = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if status < 10:
        raise PermissionError("uid_map")
    return status - 10


def _mount(folder: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    _call(_C.mount(b"none", b"/", None, MS_REC_PRIVATE, None))
    length = ctypes.sizeof(attributes)
    _call(_C.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, length))
    # /run has the sockets of services.
    for place, size in (("/run", "4k"), (folder, f"{FOLDER_MB}m")):
        options = f"size={size},nr_inodes=1024,mode=0700".encode()
        _call(_C.mount(b"tmpfs", place.encode(), b"tmpfs", MS_NOSUID_NODEV, options))


def _program(order: dict[str, Any], token: int, user: int, missing: list[str]) -> None:
    """Run the program, write the verdict, and end this process."""
    import resource  # does not exist on Windows

    verdict, read, write, leave, hear = order["verdict"], os.read, os.write, os._exit, repr
    try:
        os.setsid()  # so that kill(0) reaches neither process 1 nor the guard
        os.chdir(order["folder"])
        nothing, output = os.open(os.devnull, os.O_RDWR), os.memfd_create("output")
        for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, target)
        # One CPU only. Otherwise numpy would start a thread per CPU and exceed the limit on
        # processes.
        os.sched_setaffinity(0, {secrets.choice(sorted(os.sched_getaffinity(0)))})
        _attempt("Landlock", missing, lambda: _call(_C.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
        _drop_privileges(user, missing)
        _attempt("Landlock", missing, lambda: _landlock(order["folder"]))
        for limit, value in (
            (resource.RLIMIT_CPU, order["cpu"]),
            (resource.RLIMIT_AS, order["memory"]),
            (resource.RLIMIT_NPROC, PROCESSES),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_FSIZE, FILE_MB * MB),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        os.environ.clear()
        write(verdict, json.dumps(sorted(set(missing))).encode() + b"\n")
        # The name is not "__main__": the demonstration of a script is not part of the answer.
        module = types.ModuleType("program")
        sys.modules["program"] = module
        sys.argv = ["program"]
        exec(compile(order.pop("program"), "program", "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
        write(verdict, b"passed " + read(token, 64))
    except BaseException as error:
        with contextlib.suppress(BaseException):
            reason = f"raised {type(error).__name__}: {hear(str(error))[1:-1]}"
            write(verdict, reason[:1000].encode())
    finally:
        leave(0)


def _drop_privileges(user: int, missing: list[str]) -> None:
    if user:
        # The real, effective and saved user ids are those of nobody, for whom the limit on
        # processes applies. Files are still opened as root.
        _call(_C.prctl(PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0))
        os.setresuid(user, user, user)
        _C.setfsuid(0)
    elif os.getuid() == 0 and Path("/proc/self/uid_map").read_text().split()[1] == "0":
        missing.append("a limit on processes under root")
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call(_C.capset(header, nothing))


def _landlock(folder: str) -> None:
    """Allow access only to the interpreter, its libraries and the folder.

    TCP, and signals to other processes, are forbidden if the kernel supports this.
    """
    version = _call(_C.syscall(SYS_LANDLOCK, None, 0, 1))
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    network, signals = 3 if version >= 4 else 0, 3 if version >= 6 else 0
    attributes = (ctypes.c_uint64 * 3)(everything, network, signals)
    # The size of the attributes depends on the version.
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call(_C.syscall(SYS_LANDLOCK, attributes, size, 0))
    execute_and_read, read_file, read_write_file = 1 | 4 | 8, 4, 2 | 4
    libraries = {sys.prefix, sys.base_prefix, *sys.path}
    libraries |= {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib"}
    # An editable install puts the checkout, which has the gold answers, on sys.path, so it is left
    # out. A .venv inside the checkout has its own entries.
    checkout = Path(__file__).resolve().parents[2]
    rights = {
        path: execute_and_read for path in libraries - {""} if not checkout.is_relative_to(path)
    }
    rights |= {
        "/etc/ld.so.cache": read_file,
        "/etc/localtime": read_file,
        "/usr/share/zoneinfo": 4 | 8,
    }
    rights |= {"/dev/urandom": read_file, "/dev/null": read_write_file, folder: everything}
    for path, allowed in rights.items():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not Path(path).is_dir():
                allowed &= 1 | 2 | 4
            rule = allowed.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
            _call(_C.syscall(SYS_LANDLOCK + 1, ruleset, 1, rule, 0))
            os.close(descriptor)
    _call(_C.syscall(SYS_LANDLOCK + 2, ruleset, 0))
    os.close(ruleset)


if __name__ == "__main__":
    _guard()
