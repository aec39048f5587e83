"""Finished layers, kept by the hash of everything they depend on, so that a killed run resumes.

    <root>/<key>/FILE…            what the layer wrote, read-only
    <root>/<key>/manifest.json    {"files": {FILE: {"size": bytes, "sha256": hex}}}, written last
    <root>/.partial-*             a layer being written; locked by its writer

An entry appears by one rename after all its bytes are on the disk. A lookup verifies every byte and discards what does
not match. DVC deletes a stage's outputs before it runs; the store lies outside them. It may be deleted at any time.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.runtime import artifacts, progress
from spectrim.errors import StorageError

LAYOUT = 1  # raise it when an entry's layout changes: old entries are then never found
MANIFEST = "manifest.json"
DAY = 86_400


def key(stage: str, layer: str, *parts: Any) -> str:
    """The hex name of a layer's result: hash of the stage, the layer, and ``parts``.

    ``parts`` is everything else the result depends on: parameters, sha256 of inputs, ``closure.code_digest``; see
    ``artifacts.digest`` for what it may hold.
    """
    return artifacts.digest([LAYOUT, stage, layer, list(parts)])


def default_root() -> Path:
    """``.spectrim/layers`` of the project; experiments that run in a copied tree share the project's."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()) / ".spectrim" / "layers"


class LayerStore:
    """The entries under ``root`` (created when first written to); safe for threads and for several processes."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or default_root()).absolute()

    def path(self, key: str) -> Path:
        """Where the entry of ``key`` lies or will lie."""
        return self.root / key

    def lookup(self, key: str) -> Path | None:
        """The entry's folder when every byte of it is what was committed, else None; a damaged entry is removed.

        Raises:
            StorageError: the store cannot be read.
        """
        entry = self.path(key)
        with artifacts.storage_errors(entry):
            if not entry.is_dir():
                return None
            if damage := _damage(entry):
                progress.say(f"warning: {entry}: {damage}; the entry is discarded and its layer computed again")
                self._discard(entry)
                return None
            os.utime(entry)  # last use, for gc
            return entry

    def commit(self, key: str, writer: Callable[[Path], None]) -> Path:
        """Let ``writer`` fill an empty folder and make that the entry of ``key``; an exception changes nothing.

        When another process committed the same key meanwhile, its entry stays: equal keys mean equal results.

        Raises:
            StorageError: disk full, store not writable, or a writer that wrote nothing.
        """
        entry = self.path(key)
        with artifacts.storage_errors(entry), self._partial() as partial:
            writer(partial)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            if not files:
                raise StorageError(f"{entry}: the layer wrote no file; a stage must write at least one per layer")
            manifest = {
                path.relative_to(partial).as_posix(): {
                    "size": path.stat().st_size,
                    "sha256": artifacts.sha256_file(path),
                }
                for path in files
            }
            for path in files:
                path.chmod(0o444)  # entries are hard-linked into artifacts/
            artifacts.sync_tree(partial)
            artifacts.write_json(partial / MANIFEST, {"files": manifest})
            while True:
                try:
                    partial.rename(entry)
                    break
                except OSError:
                    if not entry.is_dir():
                        raise
                if self.lookup(key):
                    break
            artifacts.sync(self.root)
        return entry

    def gc(self, keep_days: float = 30) -> tuple[int, int]:
        """Remove entries unused for ``keep_days`` and what killed runs left; returns (entries removed, bytes freed)."""
        removed = freed = 0
        self.sweep()
        if not self.root.is_dir():
            return removed, freed
        limit = time.time() - keep_days * DAY
        with artifacts.storage_errors(self.root):
            for entry in sorted(self.root.iterdir()):
                if not entry.name.startswith(".") and entry.stat().st_mtime < limit:
                    freed += sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
                    removed += 1
                    self._discard(entry)
        return removed, freed

    def sweep(self) -> None:
        """Remove the partial entries whose writer is dead: the system drops a lock with the process that held it."""
        if not self.root.is_dir():
            return
        with artifacts.storage_errors(self.root), _lock(self.root, fcntl.LOCK_EX):
            for partial in self.root.glob(".partial-*"):
                try:
                    with _lock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        shutil.rmtree(partial)
                except BlockingIOError:
                    continue

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        self.root.mkdir(parents=True, exist_ok=True)
        with _lock(self.root, fcntl.LOCK_SH):  # no sweep between the making of the folder and its lock
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.root))
            handle = os.open(partial, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)

    def _discard(self, entry: Path) -> None:
        with self._partial() as partial, suppress(FileNotFoundError):  # another process may have been faster
            entry.rename(partial / entry.name)


def link_or_copy(entry: Path, destination: Path) -> None:
    """Bring the files of ``entry`` (all but the manifest) into the folder ``destination``, by hard link where possible.

    Never write such a file in place: replace it. Raises StorageError.
    """
    with artifacts.storage_errors(destination):
        for source in sorted(path for path in entry.rglob("*") if path.is_file()):
            if source.name == MANIFEST:
                continue
            target = destination / source.relative_to(entry)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.hardlink_to(source)
            except FileExistsError:
                raise
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, target)


def _damage(entry: Path) -> str | None:
    manifest = entry / MANIFEST
    try:
        listed = artifacts.read_json(manifest)["files"]
        recorded = {name: (item["size"], item["sha256"]) for name, item in listed.items()}
    except (StorageError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    found = {path.relative_to(entry).as_posix() for path in entry.rglob("*") if path.is_file() and path != manifest}
    if found != recorded.keys():
        return f"{', '.join(sorted(found ^ recorded.keys()))} missing or not of this entry"
    for name, (size, sha256) in recorded.items():
        if (actual := (entry / name).stat().st_size) != size:
            return f"{name} has {actual} bytes instead of {size}"
        if artifacts.sha256_file(entry / name) != sha256:
            return f"{name} does not match its sha256"
    return None


@contextmanager
def _lock(folder: Path, mode: int) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, mode)
        yield
    finally:
        os.close(handle)
