"""Child processes and blocks of code that always end, even if the test fails."""

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

LIMIT = 120.0  # seconds; on an idle machine, every wait takes less than a tenth of it


class Process(subprocess.Popen[str]):
    """A child process that is killed if its `with` block fails, or after `limit` seconds.

    `Popen` alone waits at the end of the block, so a process that ignores Ctrl-C would never end.
    After the limit, a `read` in the block reaches the end of the stream.
    """

    def __init__(self, *args: Any, limit: float = LIMIT, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timer = threading.Timer(limit, self.kill)
        self._timer.start()

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self.kill()
        super().__exit__(*error)  # waits until the process ends, or the timer kills it
        self._timer.cancel()


@contextlib.contextmanager
def within(seconds: float = LIMIT) -> Iterator[None]:
    """Fail if the block takes longer than `seconds`: it hangs, or does far more work than it
    should.

    The limit is far above the time on an idle machine, because a tight limit would fail on a busy
    one.
    """

    def expired(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
