"""`python` and `dvc` that start at once: forked from a process that has torch, transformers and dvc loaded already.

They are small programs in a folder for the front of the PATH. Each hands its arguments, folder, environment and
streams to a server, which forks a child to run them. What they run is the real stage and the real DVC; the project's
own modules are imported anew in every child, from the project's folder.
"""

import atexit
import json
import os
import runpy
import shutil
import socket
import socketserver
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.stage_process import FORKED, enter

CLIENT = """#!{interpreter} -ISB
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(asked)
    sys.exit(int(server.recv(16) or 1))
"""


@cache
def folder() -> Path:
    """Where the two programs are; the server behind them ends with this process."""
    found = Path(tempfile.mkdtemp(prefix="spectrim-programs-"))
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    address = found / "socket"
    for name in ("python", "dvc"):
        (found / name).write_text(CLIENT.format(interpreter=sys.executable, address=str(address), name=name))
        (found / name).chmod(0o755)
    server = FORKED.Process(target=_serve, args=(str(address),), daemon=True)
    server.start()
    while not address.exists():
        assert server.is_alive(), "the server did not start"
        time.sleep(0.05)
    return found


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    max_children = 8


class _Handler(socketserver.BaseRequestHandler):
    """One program, in a child of the server."""

    def handle(self) -> None:
        length, streams, *_ = socket.recv_fds(self.request, 8, 3)
        with self.request.makefile("rb") as asked:
            name, arguments, place, environment = json.loads(asked.read(int.from_bytes(length, "big")))
        for stream, given in enumerate(streams):
            os.dup2(given, stream)
            os.close(given)
        code = _run(name, arguments, Path(place), environment)
        for written in (sys.stdout, sys.stderr):
            written.flush()
        self.request.sendall(str(code).encode())


def _serve(address: str) -> None:
    with _Server(address, _Handler) as server:
        server.serve_forever(poll_interval=60)


def _run(name: str, arguments: list[str], place: Path, environment: Mapping[str, str]) -> int:
    """Exit code of `python -m MODULE …` or `dvc …`."""
    enter(place, environment)
    try:
        if name == "dvc":
            from dvc.cli import main

            return main(arguments)
        assert arguments[0] == "-m", f"python -m MODULE is served, not python {' '.join(arguments)}"
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
