"""Writes happen whole or not at all; equal values have equal hashes; a disk that cannot take it is one clear error."""

import errno
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.runtime import artifacts
from spectrim.errors import NumericalError, StorageError
from tests.tiny import tree

PROJECT = Path(__file__).parents[2]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond ``n_bytes``, as a quota or a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_artifact_is_relative_to_the_working_directory():
    assert artifacts.artifact("capture") == Path("artifacts/capture")
    assert artifacts.artifact("capture", "000.safetensors") == Path("artifacts/capture/000.safetensors")


@pytest.mark.parametrize("before", [None, {"old": b"1"}])
def test_fresh_folder_replaces_everything(tmp_path, before):
    path = tmp_path / "deep" / "capture"
    for name, data in (before or {}).items():
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    with artifacts.fresh_folder(path) as partial:
        assert list(partial.iterdir()) == []
        (partial / "sub").mkdir()
        (partial / "sub" / "new").write_bytes(b"2")
        assert tree(path) == (before or {})  # nothing changes before the end
    assert tree(path) == {"sub/new": b"2"}
    assert [entry.name for entry in path.parent.iterdir()] == ["capture"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_fresh_folder_that_fails_changes_nothing(tmp_path, error):
    path = tmp_path / "capture"
    path.mkdir()
    (path / "old").write_bytes(b"1")
    with pytest.raises(type(error)), artifacts.fresh_folder(path) as partial:
        (partial / "new").write_bytes(b"2")
        raise error
    assert tree(tmp_path) == {"capture/old": b"1"}


def test_fresh_folder_clears_what_a_kill_left(tmp_path):
    path = tmp_path / "capture"
    script = (
        "import os, signal, sys; from pathlib import Path; from pipeline.runtime import artifacts\n"
        "with artifacts.fresh_folder(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_bytes(b'x' * 1000); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=PROJECT, check=False)
    assert killed.returncode == -9
    assert not path.exists()
    assert len(tree(tmp_path)) == 1  # the negative control: the kill did leave something
    with artifacts.fresh_folder(path) as partial:
        (partial / "whole").write_bytes(b"y")
    assert tree(tmp_path) == {"capture/whole": b"y"}


def test_fresh_folder_recovers_the_old_result_when_killed_between_its_renames(tmp_path):
    (tmp_path / ".capture.old-abc").mkdir()
    (tmp_path / ".capture.old-abc" / "old").write_bytes(b"1")
    path = tmp_path / "capture"
    with pytest.raises(RuntimeError), artifacts.fresh_folder(path):
        raise RuntimeError
    assert tree(tmp_path) == {"capture/old": b"1"}


@given(JSON)
def test_json_round_trip_and_digest(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "x.json"
    artifacts.write_json(path, value)
    assert artifacts.read_json(path) == value
    assert artifacts.digest(value) == artifacts.digest(json.loads(path.read_text()))


def test_json_bytes_do_not_depend_on_key_order(tmp_path):
    artifacts.write_json(tmp_path / "a", {"x": 1, "y": [2.5]})
    artifacts.write_json(tmp_path / "b", {"y": [2.5], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~artifacts._umask()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_is_not_finite_and_keeps_the_old_file(tmp_path, value):
    path = tmp_path / "metrics.json"
    artifacts.write_json(path, {"perplexity": 1.0})
    with pytest.raises(NumericalError, match=r"metrics\.json"):
        artifacts.write_json(path, {"perplexity": value})
    assert tree(tmp_path) == {"metrics.json": b'{\n  "perplexity": 1.0\n}\n'}


def test_read_json_says_what_to_do(tmp_path):
    with pytest.raises(StorageError, match="dvc repro"):
        artifacts.read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(StorageError, match=r"half\.json: not JSON"):
        artifacts.read_json(tmp_path / "half.json")


def test_sha256_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert artifacts.sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_digest_tells_values_apart_and_refuses_the_unstable():
    @dataclass(frozen=True)
    class Point:
        x: int
        y: list[float]

    assert artifacts.digest(Point(1, [2.0])) == artifacts.digest({"y": [2.0], "x": 1})
    assert artifacts.digest([1, 2]) == artifacts.digest((1, 2)) != artifacts.digest([2, 1])
    assert artifacts.digest([["a"], "b"]) != artifacts.digest(["a", ["b"]])
    assert artifacts.digest(1) != artifacts.digest("1")
    for unstable in (object(), {1: 2}, {1, 2}, torch.zeros(1), Path("x")):
        with pytest.raises(TypeError):
            artifacts.digest(unstable)
    with pytest.raises(ValueError):
        artifacts.digest(float("nan"))


def test_provenance_names_versions_and_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert artifacts.provenance()["commit"] is None
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *author, *command], check=True, cwd=tmp_path)
    found = artifacts.provenance()
    assert len(found["commit"]) == 40 and found["modified"] is False
    assert found["versions"]["torch"] == torch.__version__
    (tmp_path / "spectrim").mkdir()
    (tmp_path / "spectrim" / "new.py").write_text("")
    assert artifacts.provenance()["modified"] is True


def test_full_disk_is_one_line_and_changes_nothing(tmp_path):
    path = tmp_path / "remap"
    path.mkdir()
    (path / "old").write_bytes(b"1")
    artifacts.write_json(tmp_path / "x.json", 1)
    before = tree(tmp_path)
    with largest_file(10_000):
        with pytest.raises(StorageError, match=r"remap.*free.*unchanged"), artifacts.fresh_folder(path) as partial:
            (partial / "big").write_bytes(bytes(100_000))
        with pytest.raises(StorageError, match="file too large"), artifacts.fresh_folder(path) as partial:
            save_file({"a": torch.zeros(100_000)}, partial / "big.safetensors")
        with pytest.raises(StorageError, match=r"x\.json"):
            artifacts.write_json(tmp_path / "x.json", "x" * 100_000)
    assert tree(tmp_path) == before


def test_full_device_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="no space left"), artifacts.storage_errors(tmp_path):
        Path("/dev/full").write_bytes(bytes(100_000))
    # safetensors keeps the operating system's code in the text only
    from safetensors import SafetensorError

    with pytest.raises(StorageError, match="no space left"), artifacts.storage_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_unwritable_folder_is_one_line_and_changes_nothing(open_folder):
    """As a user without rights (dropped, when the tests run as root, whom permissions do not stop)."""
    locked = open_folder / "locked"
    (locked / "capture").mkdir(parents=True)
    (locked / "capture" / "old").write_bytes(b"1")
    script = (
        "import os, sys; from pathlib import Path\n"
        "from pipeline.runtime import artifacts; from spectrim.errors import StorageError\n"
        "os.getuid() or (os.setgid(65534), os.setuid(65534))\n"
        "for write in (lambda p: artifacts.fresh_folder(p / 'capture').__enter__(),\n"
        "              lambda p: artifacts.write_json(p / 'x.json', 1)):\n"
        "    try: write(Path(sys.argv[1]))\n"
        "    except StorageError as error: print(error)\n"
    )
    locked.chmod(0o555)
    try:
        result = subprocess.run(
            [sys.executable, "-c", script, str(locked)], cwd=PROJECT, capture_output=True, text=True, check=True
        )
    finally:
        locked.chmod(0o755)
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and all("permission denied" in line and str(locked) in line for line in lines)
    assert tree(locked) == {"capture/old": b"1"}


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "artifacts").write_bytes(b"")
    with pytest.raises(StorageError, match="artifacts"), artifacts.fresh_folder(tmp_path / "artifacts" / "capture"):
        pytest.fail("must not be entered")


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), artifacts.storage_errors(tmp_path):
        (tmp_path / "none").read_bytes()
    with pytest.raises(OSError, match="odd") as caught, artifacts.storage_errors(tmp_path):
        raise OSError(errno.EAGAIN, "odd")
    assert not isinstance(caught.value, StorageError)
