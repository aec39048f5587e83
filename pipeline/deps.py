"""The code that each stage executes, written into dvc.yaml by a program.

python -m pipeline.deps            # `make deps`
python -m pipeline.deps --check    # `make lint`: says what is missing or too much there
"""

import io
import re
import textwrap
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from pipeline.runtime.artifacts import write_text
from pipeline.runtime.closure import PACKAGES, dependencies
from pipeline.runtime.console import run
from spectrim.errors import StorageError

GRAPH = Path("dvc.yaml")
WIDTH = 120


def main(
    check: Annotated[bool, typer.Option(help="Change nothing; fail where dvc.yaml is out of date.")] = False,
) -> None:
    """Write the code that each stage executes into the deps of dvc.yaml."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = WIDTH, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    graph = yaml.load(GRAPH.read_text(encoding="utf-8"))
    wrong = []
    for name, stage in graph["stages"].items():
        found = [dep for dep in stage.get("deps", []) if dep.split("/")[0] in PACKAGES]
        wanted = dependencies(name)
        if found != wanted:
            wrong.append(f"{GRAPH}: {name}: add {sorted({*wanted} - {*found})}, remove {sorted({*found} - {*wanted})}")
            data = [dep for dep in stage.get("deps", []) if dep not in found]
            stage["deps"] = CommentedSeq([*data, *wanted])
            stage["deps"].fa.set_flow_style()
    if check and wrong:
        raise StorageError("\n".join([*wrong, "the deps are not the code that runs; run `make deps`"]))
    if wrong:
        text = io.StringIO()
        yaml.dump(graph, text)
        write_text(GRAPH, re.sub(r"^    (deps|params): \[[^]]*\]$", _wrapped, text.getvalue(), flags=re.MULTILINE))


def _wrapped(found: re.Match[str]) -> str:
    return textwrap.fill(
        " ".join(found[0].split()), WIDTH, initial_indent="    ", subsequent_indent=" " * 6, break_on_hyphens=False
    )


if __name__ == "__main__":
    run(main)
