"""What a source really is at this moment: sha256 of files, the commit of a hub's revision.

A file is hashed again only when its size, its time of change or its place on the disk is another one; what was found is
kept in ``.spectrim/sources.json``, with the last known commit of every hub revision, for when the hub is out of reach.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.config.source_syntax import Hub, Wheel, parse
from pipeline.data.fetching import fetch, hub_error, missing
from pipeline.runtime.artifacts import read_json, sha256_file, write_json
from pipeline.runtime.progress import progress, say
from spectrim.errors import StorageError

COMMIT = re.compile(r"[0-9a-f]{40}")
LARGE = 1 << 30  # bytes that take about a second to hash
TIMEOUT = 10.0  # seconds until the hub counts as out of reach


class Sources:
    """Identities of sources, with the memory of earlier ones in ``file``; ``save`` keeps what was learned."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or Path(os.environ.get("DVC_ROOT", "."), ".spectrim", "sources.json")
        self._known: dict[str, Any] = _memory(self.file)
        self._before = dict(self._known)

    def of(self, source: str, sha256: str | None, key: str, kind: Literal["model", "dataset"]) -> dict[str, Any]:
        """What ``source`` is: a file's sha256, those of a folder's files, or a hub repository's commit.

        Args:
            source: as in params.yaml.
            sha256: required of a file or of a wheel's member, or null; a wheel pinned by it is not looked at.
            key: the section that holds the source, for messages.

        Raises:
            SourceError: missing, unreachable and never seen before, or another sha256.
        """
        where = parse(source)
        if isinstance(where, Wheel):
            return {"sha256": sha256 or fetch(source, None, key).sha256}
        if isinstance(where, Hub):
            return {"commit": self._commit(where, key, kind)}
        return self.local(where, f"{key}.source")

    def local(self, path: Path, parameter: str) -> dict[str, Any]:
        """``{"sha256": hex}`` of a file; ``{"files": {name: hex}}`` of a folder, without hidden files.

        Raises SourceError when what ``parameter`` names is not there.
        """
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
            large = sum(file.stat().st_size for file in files) > LARGE
            shown = progress(files, f"sources: {path}", len(files)) if large else files
            return {"files": {file.relative_to(path).as_posix(): self._sha256(file) for file in shown}}
        if not path.is_file():
            raise missing(path, parameter)
        return {"sha256": self._sha256(path)}

    def save(self) -> None:
        """Keep what was learned, where anything was."""
        if self._known != self._before:
            write_json(self.file, self._known)

    def _sha256(self, file: Path) -> str:
        found, name = file.stat(), str(file.resolve())
        stamp = [found.st_size, found.st_mtime_ns, found.st_ino]
        if (known := self._known.get(name)) and known[:-1] == stamp:
            return str(known[-1])
        self._known[name] = [*stamp, sha256_file(file)]
        return str(self._known[name][-1])

    def _commit(self, hub: Hub, key: str, kind: Literal["model", "dataset"]) -> str:
        if COMMIT.fullmatch(hub.revision):
            return hub.revision
        name = f"hf:{kind}:{hub.repository}@{hub.revision}"
        try:
            self._known[name] = _asked(hub, kind)
        except ConnectionError as error:
            commit = self._known.get(name) or _cached(hub, kind)
            if not commit:
                raise hub_error(hub, key, error) from error
            say(f"{key}.source: {hub}: the hub cannot be reached; taking the last known commit, {commit}")
            self._known[name] = commit
        except Exception as error:  # the hub and its transport have error trees of their own
            raise hub_error(hub, key, error) from error
        return str(self._known[name])


def tasks_identity(tasks: Mapping[str, str], sources: Sources) -> dict[str, Any]:
    """Entry of ``evaluate.tasks`` -> its data: the harness's version for what that reads from the hub, else the files.

    Raises:
        SourceError: a file or folder is missing.
    """
    from importlib.metadata import version

    return {
        name: {"lm-eval": version("lm-eval")}
        if data == "hub"
        else sources.local(Path(data).expanduser(), f"evaluate.tasks.{name}")
        for name, data in tasks.items()
    }


def _asked(hub: Hub, kind: Literal["model", "dataset"]) -> str:
    """The hub's own answer. Raises ConnectionError when there is none."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().repo_info(hub.repository, repo_type=kind, revision=hub.revision, timeout=TIMEOUT)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise  # it answered: no such repository or revision, or no right to read it
        raise ConnectionError(str(error)) from error
    except (OfflineModeIsEnabled, OSError) as error:
        raise ConnectionError(str(error)) from error
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "httpcore")):  # no connection, or a broken one
            raise ConnectionError(str(error)) from error
        raise
    return str(found.sha)


def _cached(hub: Hub, kind: Literal["model", "dataset"]) -> str | None:
    """The commit that the hub's own cache on this machine has of a revision."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub.repository, repo_type=kind, revision=hub.revision, local_files_only=True, allow_patterns=[]
        )  # no file is asked for: the hub's own count of a repository is never complete here
    except Exception:  # nothing there, in whatever words
        return None
    return Path(folder).name


def _memory(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file))
    except (StorageError, TypeError, ValueError):
        return {}  # none yet, or damaged: looked at anew


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
