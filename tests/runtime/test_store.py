"""The resume store: an entry is whole and verified, or it is not there."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.runtime import store
from pipeline.runtime.store import LayerStore
from spectrim.errors import NumericalError, StorageError
from tests.runtime.test_artifacts import largest_file, tree

PROJECT = Path(__file__).parents[2]
KEY = "0" * 64


def write(text: str = "result"):
    def writer(folder: Path) -> None:
        (folder / "a.bin").write_bytes(text.encode() * 1000)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(b"b")

    return writer


def test_commit_then_lookup(tmp_path):
    kept = LayerStore(tmp_path / "layers")
    assert kept.lookup(KEY) is None
    assert not kept.root.exists()  # looking creates nothing
    entry = kept.commit(KEY, write())
    assert entry == kept.lookup(KEY) == kept.path(KEY) == tmp_path / "layers" / KEY
    assert tree(entry).keys() == {"a.bin", "sub/b.bin", "manifest.json"}
    assert [path.name for path in kept.root.iterdir()] == [KEY]
    assert (entry / "a.bin").stat().st_mode & 0o222 == 0


DAMAGE = {
    "truncated": lambda entry: os.truncate(entry / "a.bin", 5999),
    "emptied": lambda entry: os.truncate(entry / "sub" / "b.bin", 0),
    "grown": lambda entry: (entry / "a.bin").write_bytes((entry / "a.bin").read_bytes() + b"x"),
    "missing": lambda entry: (entry / "sub" / "b.bin").unlink(),
    "foreign": lambda entry: (entry / "c.bin").write_bytes(b""),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "half a manifest": lambda entry: os.truncate(entry / "manifest.json", 40),
    "manifest of another kind": lambda entry: (entry / "manifest.json").write_text("[1]"),
    "empty folder": lambda entry: [path.unlink() for path in entry.rglob("*") if path.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_reported_once_and_removed(tmp_path, capsys, damage):
    kept = LayerStore(tmp_path)
    entry = kept.commit(KEY, write())
    for path in entry.rglob("*"):
        path.chmod(0o755)
    DAMAGE[damage](entry)
    assert kept.lookup(KEY) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning:") and str(entry) in lines[0]
    assert list(tmp_path.iterdir()) == []
    assert tree(kept.commit(KEY, write()))["a.bin"] == b"result" * 1000
    assert kept.lookup(KEY)


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 6000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, position, bit):
    kept = LayerStore(tmp_path_factory.mktemp("flip"))
    entry = kept.commit(KEY, write())
    target = entry / "a.bin" if position < 6000 else entry / "sub" / "b.bin"
    data = bytearray(target.read_bytes())
    data[position % len(data)] ^= 1 << bit
    target.chmod(0o644)
    target.write_bytes(data)
    assert kept.lookup(KEY) is None


@pytest.mark.parametrize("error", [NumericalError("layer 3: NaN"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_nothing(tmp_path, error):
    def broken(folder: Path) -> None:
        write()(folder)
        raise error

    with pytest.raises(type(error)):
        LayerStore(tmp_path).commit(KEY, broken)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_writes_nothing_is_refused(tmp_path):
    with pytest.raises(StorageError, match="wrote no file"):
        LayerStore(tmp_path).commit(KEY, lambda folder: None)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_store_as_it_was(tmp_path):
    kept = LayerStore(tmp_path)
    kept.commit(KEY, write())
    before = tree(tmp_path)
    with largest_file(5000), pytest.raises(StorageError, match="free"):
        kept.commit("1" * 64, write())
    assert tree(tmp_path) == before


def test_a_store_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        LayerStore(tmp_path / "file" / "layers").commit(KEY, write())


def test_two_writers_of_one_key_agree(tmp_path):
    kept = LayerStore(tmp_path)
    meet = threading.Barrier(2)

    def slow(folder: Path) -> None:
        write()(folder)
        meet.wait(10)

    threads = [threading.Thread(target=kept.commit, args=(KEY, slow)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.lookup(KEY)
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


def test_sweep_removes_what_the_dead_left_and_spares_the_living(tmp_path):
    kept = LayerStore(tmp_path)
    script = (
        "import os, signal, sys; from pathlib import Path; from pipeline.runtime.store import LayerStore\n"
        "LayerStore(Path(sys.argv[1])).commit('dead', lambda folder: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=PROJECT, check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1

    def look(folder: Path) -> None:
        write()(folder)
        kept.sweep()
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    kept.commit(KEY, look)
    assert kept.lookup(KEY)


def test_gc_keeps_what_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    kept = LayerStore()
    assert kept.root == tmp_path / ".spectrim" / "layers"
    assert kept.gc() == (0, 0)
    old, used, new = (kept.commit(letter * 64, write()) for letter in "abc")
    for entry in (old, used):
        os.utime(entry, (0, time.time() - 31 * store.DAY))
    kept.lookup(used.name)
    size = sum(len(data) for data in tree(old).values())
    assert kept.gc(keep_days=30) == (1, size)
    assert not old.exists() and used.exists() and new.exists()
    environment = {**os.environ, "DVC_ROOT": str(tmp_path)}
    command = [sys.executable, "-m", "pipeline.prune", "--keep-days", "0"]
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    assert "2 entries removed" in result.stdout
    assert list(kept.root.iterdir()) == []


def test_link_or_copy(tmp_path):
    entry = LayerStore(tmp_path / "layers").commit(KEY, write())
    store.link_or_copy(entry, tmp_path / "out")
    assert tree(tmp_path / "out") == {name: data for name, data in tree(entry).items() if name != "manifest.json"}
    assert (tmp_path / "out" / "a.bin").stat().st_ino == (entry / "a.bin").stat().st_ino
    with pytest.raises(StorageError, match="file exists"):
        store.link_or_copy(entry, tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_link_or_copy_across_file_systems(tmp_path):
    import tempfile

    entry = LayerStore(tmp_path / "layers").commit(KEY, write())
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        store.link_or_copy(entry, Path(elsewhere, "out"))
        assert tree(Path(elsewhere, "out"))["a.bin"] == (entry / "a.bin").read_bytes()


def test_key_depends_on_every_part():
    keys = {
        store.key("capture", "l0", 1, {"a": 2}),
        store.key("capture", "l1", 1, {"a": 2}),
        store.key("remap", "l0", 1, {"a": 2}),
        store.key("capture", "l0", 2, {"a": 2}),
        store.key("capture", "l0", 1, {"a": 3}),
        store.key("capture", "l0", 1),
    }
    assert len(keys) == 6 and all(len(key) == 64 for key in keys)
    assert store.key("capture", "l0", 1, {"a": 2}) in keys


def test_the_lock_is_the_kernels(tmp_path):
    """The premise of sweep: a folder's lock is exclusive and ends with its descriptor."""
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    fcntl.flock(first, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError):
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(first)
    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(second)
