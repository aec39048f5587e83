"""Names -> paths, and writes that either happen whole or not at all.

A result is written beside its final place, flushed to the disk and renamed: a run killed at any moment leaves the old
result or the new one, never half of one. A disk that cannot take it ends in a StorageError and changes nothing.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spectrim.errors import NumericalError, StorageError

VERSIONED = ("torch", "transformers", "safetensors", "tokenizers", "datasets", "lm-eval")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EIO}


def artifact(*parts: str | Path) -> Path:
    """``artifacts/PARTS``, relative to the working directory: the project's folder or an experiment's copy of it."""
    return Path("artifacts", *parts)


def require_model(folder: Path) -> None:
    """Raise StorageError unless ``folder`` holds a model: transformers would ask the hub for one of that name."""
    if not (file := folder / "config.json").is_file():
        raise StorageError(f"{file}: not found; run the stage that writes it (`dvc repro {folder.name}`)")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a failure of the disk under ``path`` into one line; every other exception passes unchanged.

    Raises:
        StorageError: disk or quota full, file-size limit, folder not writable, device error.
    """
    try:
        yield
    except Exception as error:
        code = _errno(error)
        if code not in FULL | UNWRITABLE:
            raise
        where = getattr(error, "filename", None) or path
        found = f"{where}: {os.strerror(code or 0).lower()}"
        if code in FULL:
            remedy = f"{_free(path)} free there; a write needs more: free some space (or raise the quota) and run again"
        else:
            remedy = "Spectrim must be able to read and write there; correct the path or its permissions and run again"
        raise StorageError(f"{found}; {remedy}. What was there before is unchanged.") from error


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends well; an exception leaves ``path`` as it was.

    Every file is flushed to the disk before the rename. Leftovers of a killed run beside ``path`` are removed first:
    a path has one writer at a time (DVC locks its stages).

    Raises:
        StorageError: see ``storage_errors``.
    """
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{path.name}.partial-*"):
            shutil.rmtree(leftover)
        for leftover in path.parent.glob(f".{path.name}.old-*"):
            # killed between the two renames below: the old result is the only one
            shutil.rmtree(leftover) if path.exists() else leftover.rename(path)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        try:
            partial.chmod(0o777 & ~_umask())
            yield partial
            for file in partial.rglob("*"):  # safetensors keeps its files to their owner; linked ones are read-only
                if file.is_file() and os.access(file, os.W_OK) and file.stat().st_nlink == 1:
                    file.chmod(0o666 & ~_umask())
            sync_tree(partial)
            _replace_folder(partial, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` (UTF-8) in one step. Raises StorageError; the old file then stays."""
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
            sync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON: keys sorted, so that equal values are equal bytes; one newline at the end.

    Raises:
        NumericalError: a NaN or an infinity in ``value``, which JSON cannot hold.
        StorageError: see ``storage_errors``.
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericalError(f"{path}: {error}; every number of a result must be finite") from error
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """The value in ``path``. Raises StorageError when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path}: not found; run the stage that writes it (`dvc repro`)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: not JSON ({error}); delete it and run `dvc repro` again") from error


def sha256_file(path: Path) -> str:
    """The 64 hexadecimal digits of the file's sha256; about 1 GB/s. Raises StorageError when the file is missing."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise StorageError(f"{path}: not found; run the stage that writes it (`dvc repro`)") from None


def files_sha256(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below ``folder``, in the order of the names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``: equal for equal values, whatever the order of a mapping's keys.

    ``value`` is made of None, bool, int, float, str, sequences, mappings with string keys, and dataclasses of these.

    Raises:
        TypeError: anything else, because its hash would not be stable.
        ValueError: a NaN or an infinity.
    """
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def provenance() -> dict[str, Any]:
    """What made a result: ``{"versions": {package: version}, "commit": hex or None, "modified": bool or None}``.

    ``modified`` says whether the code differs from ``commit``; both are None outside a git repository.
    """
    versions = {}
    for package in ("spectrim", *VERSIONED):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--", "spectrim", "pipeline", "stages") if commit else None
    return {"versions": versions, "commit": commit, "modified": None if status is None else bool(status)}


def sync(path: Path) -> None:
    """Flush the file or folder ``path`` to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file below ``folder``, then every folder, ``folder`` last."""
    below = sorted(folder.rglob("*"), key=lambda path: (path.is_dir(), -len(path.parts)))
    for path in (*below, folder):
        sync(path)


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    try:
        path.rename(old)  # a folder renames over an empty folder
        new.rename(path)
    except BaseException:
        if not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"a mapping to hash needs string keys, found {[*value][:3]!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot hash a {type(value).__name__}: no stable text form; pass its sha256 or its numbers")


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if type(error).__name__ == "SafetensorError":  # carries the code in its text only
        found = re.search(r"os error (\d+)", str(error))
        return int(found[1]) if found else None
    return None


def _free(path: Path) -> str:
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path("/"))
    return f"{shutil.disk_usage(existing).free / 1e6:,.0f} MB"


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
