"""A program for the terminal: its command line, quiet libraries, and one line whatever ends it.

Exit codes: 0 done, 1 an error, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM. A stop first unwinds, so that temporary files go
away; code that does not return within GRACE seconds is abandoned: the resume store survives a death at any moment.
"""

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from spectrim.errors import SpectrimError

GRACE = 3.0  # seconds to unwind after a stop
M_ARENA_MAX = -8  # of malloc.h
POLL = 1.0  # seconds between looks at the parent
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
}


class Stopped(KeyboardInterrupt):
    """A person or the system asked the program to stop; ``code`` is the exit code to leave with."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


def run(main: Callable[..., None]) -> NoReturn:
    """Run ``main`` as a command line made from its signature and docstring, and leave with the right exit code.

    A SpectrimError is one ``error: …`` on stderr; its traceback shows only when SPECTRIM_DEBUG=1. Anything else that
    escapes is a defect and keeps its traceback. After a stop or an error no thread and no child process is left.
    """
    import typer

    _quiet()
    _one_arena()
    watch = _Watch()

    @functools.wraps(main)
    def guarded(*args: Any, **options: Any) -> None:
        try:
            with watch:
                main(*args, **options)
        except SpectrimError as error:
            if os.environ.get("SPECTRIM_DEBUG") == "1":
                traceback.print_exc()
            leave(f"error: {error}", 1)
        except KeyboardInterrupt as stop:
            leave(_stop_line(stop), getattr(stop, "code", 130))
        except Exception:
            leave(traceback.format_exc().rstrip(), 1)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(guarded)
    app()
    raise SystemExit(0)


def _quiet() -> None:
    """Errors only from the libraries; their bars, which fill a log file with redrawn lines, only on a terminal."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    terminal = sys.stderr.isatty()
    if not terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if (logging := sys.modules.get("transformers.utils.logging")) is not None:  # imported before: reads no variable now
        logging.set_verbosity_error()
        if not terminal:
            logging.disable_progress_bar()


def _one_arena() -> None:
    """Let glibc's malloc keep one heap for all threads: what tensors free in a thread's own heap stays unused there.

    A refinement's peak was 3.96 GB with a heap per thread and 3.41 GB with one.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def leave(line: str, code: int) -> NoReturn:
    """Print ``line`` on stderr, end every child process and exit at once, whatever other threads are doing."""
    try:
        if line:
            print(f"\r\x1b[K{line}" if sys.stderr.isatty() else line, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader of our output is gone: nobody to tell
        code = code or 1
    end_children()
    os._exit(code)


def end_children(patience: float = 1.0, only: int | None = None) -> None:
    """Terminate every descendant of this process, or its child ``only``; after ``patience`` seconds, kill."""
    import psutil

    children = [child for child in psutil.Process().children(recursive=True) if only in (None, child.pid)]
    for child in children:
        _signal(child, signal.SIGTERM)
    stubborn = psutil.wait_procs(children, timeout=patience)[1]
    for child in stubborn:
        _signal(child, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=patience)


def _signal(process: Any, number: int) -> None:
    import psutil

    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _stop_line(stop: BaseException) -> str:
    # the program that started us prints its own line
    if os.environ.get("SPECTRIM_FLOW"):
        return ""
    return f"stopped by {getattr(stop, 'reason', 'Ctrl-C')}; finished layers are kept, run again to resume"


class _Watch:
    """Signals become Stopped in the main thread; a thread sees to it that the program really ends.

    Python runs a signal handler only between two bytecodes of the main thread, and libraries may swallow what it
    raises: the C-level wakeup descriptor tells the thread at once. Another thread notices that the DVC that started
    this program was killed, which sends no signal.
    """

    def __enter__(self) -> None:
        self._parents = _dvc_ancestors()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._stop: Stopped | None = None
        self._raised = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._over = threading.Event()
        threading.Thread(target=self._signals, name="signals", daemon=True).start()
        if self._parents:
            threading.Thread(target=self._orphan, name="parent", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        signal.set_wakeup_fd(-1)
        # while leaving after a failure, one more Ctrl-C must not cut the line short
        rest = signal.SIG_DFL if error is None else signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, rest)
        if self._stop and isinstance(error, Exception):  # what the unwinding broke is not the reason
            raise self._stop from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._raised:  # a second signal must not interrupt the unwinding
            self._raised = True
            self._stop = self._stop or _stopped(number)
            raise self._stop

    def _signals(self) -> None:
        while numbers := os.read(self._reader, 1):
            if numbers[0] in (signal.SIGINT, signal.SIGTERM):
                break
        stop = self._stop = self._stop or _stopped(numbers[0])
        if not self._over.wait(GRACE):
            leave(_stop_line(stop), stop.code)

    def _orphan(self) -> None:
        while not self._over.wait(POLL):
            if not all(parent.is_running() for parent in self._parents):
                self._stop = Stopped("the end of the DVC that started it", 143)
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _stopped(number: int) -> Stopped:
    return Stopped("Ctrl-C", 130) if number == signal.SIGINT else Stopped("SIGTERM", 143)


def _dvc_ancestors() -> list[Any]:
    if "DVC_STAGE" not in os.environ:
        return []
    import psutil

    line = []
    for parent in psutil.Process().parents():
        line.append(parent)
        try:
            names = parent.cmdline()
        except psutil.Error:
            return []
        if "dvc" in {name.rsplit("/", 1)[-1] for name in names}:
            return line
    return []
