"""Which files of a hub's repository are fetched, from a hub on this machine that notes what it is asked for."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import pytest

from tests.data.serving import served
from tests.tiny import REPOSITORY

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json")
BESIDE = ("README.md", "training_args.bin", "tf_model.h5", "onnx/model.onnx", "original/model.safetensors", "code.py")
TEXT = ("config.json", "tokenizer.json", "chat_template.jinja", "merges.txt")


class Hub(BaseHTTPRequestHandler):
    """The repository org/name, whose branch main stands at COMMIT and has ``files``; each holds its own name."""

    files: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        api, resolve = "/api/models/org/name", f"/org/name/resolve/{COMMIT}/"
        if path == f"{api}/revision/main":
            content = json.dumps({"id": "org/name", "sha": COMMIT}).encode()
        elif path == f"{api}/tree/{COMMIT}":
            listed = [{"type": "file", "path": name, "size": len(name), "oid": oid(name)} for name in self.files]
            content = json.dumps(listed).encode()
        else:
            assert path.removeprefix(resolve) in self.files
            content = path.removeprefix(resolve).encode()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{oid(content.decode())}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def oid(content: str) -> str:
    return hashlib.sha1(content.encode()).hexdigest()


@pytest.fixture
def endpoint() -> Iterator[str]:
    with served(Hub) as address:
        yield address


def run(code: str, home: Path, **environment: str) -> str:
    """What a process of its own prints: the hub's address is read when its library is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    more = {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(home / "hub"), "NO_PROXY": "127.0.0.1", **environment}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **more}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


FETCH = """
from pipeline.data.fetching import fetch
folder = fetch("hf:org/name@main", None, "model").path
print(*(file.relative_to(folder) for file in folder.rglob("*") if file.is_file()))
"""


@pytest.mark.parametrize(
    ("weights", "fetched"),
    [
        (SHARDS, SHARDS),
        (("model.safetensors", "consolidated.safetensors"), ("model.safetensors",)),
        (("model.safetensors", "pytorch_model.bin"), ("model.safetensors",)),
        ((*SHARDS, *PICKLES), (*SHARDS, "pytorch_model.bin.index.json")),
        (("pytorch_model.bin",), ("pytorch_model.bin",)),
        (PICKLES, PICKLES),
    ],
)
def test_the_weights_that_are_fetched(
    weights: tuple[str, ...], fetched: tuple[str, ...], endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "files", {*TEXT, *BESIDE, *weights})
    assert set(run(FETCH, tmp_path, HF_ENDPOINT=endpoint).split()) == {*TEXT, *fetched}
    assert set(run(FETCH, tmp_path, HF_HUB_OFFLINE="1").split()) == {*TEXT, *fetched}, "from the hub's own cache"


def test_a_fetched_revision_is_known_without_the_hub(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "files", {*TEXT, *BESIDE, "model.safetensors"})
    run(FETCH, tmp_path, HF_ENDPOINT=endpoint)
    ask = (
        "from pathlib import Path\nfrom pipeline.data.identity import Sources\n"
        f"sources = Sources(Path({str(tmp_path / 'none.json')!r}))\n"
        "print(sources.of('hf:org/name@main', None, 'model', 'model')['commit'])"
    )
    assert run(ask, tmp_path, HF_HUB_OFFLINE="1").split() == [COMMIT]
