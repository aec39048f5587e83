"""A source is what its bytes are: a file by its hash, remembered until it is touched; a revision by its commit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from pipeline.data import identity
from pipeline.data.identity import Sources, tasks_identity
from spectrim.errors import SourceError
from tests.data.serving import served
from tests.tiny import REPOSITORY

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were really hashed."""
    seen: list[str] = []
    real = identity.sha256_file
    monkeypatch.setattr(identity, "sha256_file", lambda file: (seen.append(Path(file).name), real(file))[1])
    return seen


def look(memory: Path, path: Path) -> dict[str, object]:
    sources = Sources(memory)
    found = sources.of(str(path), None, "data.a", "dataset")
    sources.save()
    return found


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, hashed: list[str]) -> None:
    file, memory = tmp_path / "a.txt", tmp_path / "kept" / "sources.json"
    file.write_text("one")
    first = look(memory, file)
    assert look(memory, file) == first and hashed == ["a.txt"]
    before = file.stat()
    file.write_text("two")  # as long as before
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert look(memory, file) != first and hashed == ["a.txt"] * 2
    file.write_text("one")
    assert look(memory, file) == first, "equal content is equal, whenever it was written"
    memory.write_text("{damaged")
    assert look(memory, file) == first


def test_a_folder_is_its_files_and_not_what_is_hidden(tmp_path: Path, hashed: list[str]) -> None:
    folder, memory = tmp_path / "model", tmp_path / "sources.json"
    (folder / "deep").mkdir(parents=True)
    for name in ("config.json", "deep/x.safetensors", ".git"):
        (folder / name).write_text(name)
    first = look(memory, folder)
    assert set(first["files"]) == {"config.json", "deep/x.safetensors"}  # type: ignore[call-overload]
    (folder / ".git").write_text("other")
    assert look(memory, folder) == first and len(hashed) == 2
    (folder / "deep" / "x.safetensors").write_text("other weights")
    assert look(memory, folder) != first


def test_what_is_missing_is_named_by_its_parameter(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "sources.json")
    with pytest.raises(SourceError, match=r"data\.a\.source: .*gone\.txt: no such file or folder"):
        sources.of(str(tmp_path / "gone.txt"), None, "data.a", "dataset")
    with pytest.raises(SourceError, match=r"evaluate\.tasks\.piqa: .*gone\.jsonl"):
        tasks_identity({"piqa": str(tmp_path / "gone.jsonl")}, sources)
    assert set(tasks_identity({"piqa": "hub"}, sources)["piqa"]) == {"lm-eval"}


def test_a_pinned_wheel_and_a_commit_need_no_network(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "sources.json")
    assert sources.of("pypi:tiny==1.0/tiny/words.txt", "a" * 64, "model", "model") == {"sha256": "a" * 64}
    assert sources.of(f"hf:org/name@{COMMIT}", None, "model", "model") == {"commit": COMMIT}


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, whose branch main stands at ``commit``."""

    commit = COMMIT

    def do_GET(self) -> None:
        known = self.path.startswith(("/api/models/org/name/revision/main", "/api/models/org/name?"))
        body = json.dumps({"id": "org/name", "sha": self.commit} if known else {"error": "Repository not found"})
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    with served(Hub) as address:
        yield address
    Hub.commit = COMMIT


def resolve(tmp_path: Path, endpoint: str, source: str = "hf:org/name@main", **environment: str) -> tuple[str, str]:
    """What a process of its own finds, whose hub is at ``endpoint``, and what it says."""
    code = (
        "from pathlib import Path\nfrom pipeline.data.identity import Sources\n"
        "from spectrim.errors import SourceError\n"
        f"sources = Sources(Path({str(tmp_path / 'sources.json')!r}))\n"
        f"try: print(sources.of({source!r}, None, 'model', 'model')['commit'])\n"
        "except SourceError as error: print(error)\nsources.save()"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    everything = {
        **clean, "PYTHONPATH": str(REPOSITORY), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"),
        "NO_PROXY": "127.0.0.1", **environment,
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=everything, capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr


def test_a_branch_is_resolved_to_its_commit_and_followed(tmp_path: Path, hub: str) -> None:
    assert resolve(tmp_path, hub)[0] == COMMIT
    Hub.commit = OTHER
    assert resolve(tmp_path, hub)[0] == OTHER
    nowhere = "http://127.0.0.1:9"
    found, said = resolve(tmp_path, nowhere)
    assert found == OTHER and "the hub cannot be reached; taking the last known commit" in said
    assert resolve(tmp_path, hub, HF_HUB_OFFLINE="1")[0] == OTHER
    assert "cannot be had from the hub" in resolve(tmp_path, hub, "hf:org/other@main")[0]
    assert "cannot be had from the hub" in resolve(tmp_path / "new", nowhere)[0], "never seen, and out of reach"
