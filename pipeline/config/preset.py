"""The values of a preset into params.yaml, which keeps its comments and its order.

    python -m pipeline.config.preset dobi-svd                           # writes params.yaml and prints what changed
    dvc exp run $(python -m pipeline.config.preset dobi-svd --print)    # the same for one experiment, no file changed

Every file in presets/ sets the same keys, so that one preset after another leaves nothing of the first behind.
"""

import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import YAMLError

from pipeline.config.params import leaves, load, read_yaml
from pipeline.runtime.artifacts import write_text
from pipeline.runtime.console import run
from spectrim.errors import ConfigError

PRESETS = Path("presets")
PARAMS = Path("params.yaml")


def main(
    name: Annotated[str, typer.Argument(help="A file of presets/, without .yaml.")],
    print_: Annotated[
        bool, typer.Option("--print", help="Print arguments for `dvc exp run` and write nothing.")
    ] = False,
) -> None:
    """Write the values of a preset into params.yaml."""
    values = read(name)
    text, changes = applied(name, values)
    if print_:
        print(" ".join(f"-S {key}={_shown(value)}" for key, value in values.items()))
        return
    if changes:
        write_text(PARAMS, text)
    for key, (old, new) in changes.items():
        print(f"{key}: {_shown(old)} -> {_shown(new)}")
    if not changes:
        print(f"{PARAMS} has the values of {name} already")


def read(name: str) -> dict[str, Any]:
    """Dotted key -> value of a preset.

    Raises:
        ConfigError: there is no such preset, or it is not a mapping of sections.
    """
    file, available = PRESETS / f"{name}.yaml", sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if name not in available:
        known = ", ".join(available) or f"none: {PRESETS}/ is not here; run from the project's folder"
        raise ConfigError([f"{file}: no such preset; available: {known}"])
    return dict(leaves(read_yaml(file)))


def applied(name: str, values: Mapping[str, Any]) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The text of params.yaml with ``values``, and key -> (old, new) of those that differ; nothing is written.

    Raises:
        ConfigError: every problem of the preset and of the resulting parameters; ``name`` stands in the message.
    """
    try:
        original = PARAMS.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        load(PARAMS)  # raises and says what is wrong with the file
        raise
    text, changes, unknown = edited(original, values)
    problems = [f"{PRESETS / name}.yaml: {key}: {PARAMS} has no such key" for key in unknown]
    with tempfile.TemporaryDirectory() as folder:
        candidate = Path(folder, PARAMS.name)
        candidate.write_text(text, encoding="utf-8")
        try:
            load(candidate)
        except ConfigError as error:
            where = f"{PARAMS} with {PRESETS / name}.yaml"
            problems += [problem.replace(str(candidate), where, 1) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return text, changes


def edited(text: str, values: Mapping[str, Any]) -> tuple[str, dict[str, tuple[Any, Any]], list[str]]:
    """YAML ``text`` with ``values`` (dotted key -> value): the new text, key -> (old, new), and the keys it lacks.

    Text that is no mapping comes back as it is: whoever checks parameters says what is wrong with it.
    """
    editor = YAML()
    editor.width, editor.preserve_quotes = 4096, True
    editor.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    try:
        content = editor.load(text)
    except YAMLError:
        return text, {}, []
    changes: dict[str, tuple[Any, Any]] = {}
    unknown: list[str] = []
    for key, value in values.items():
        *sections, last = key.split(".")
        node: Any = content
        for section in sections:
            node = node.get(section) if isinstance(node, Mapping) else None
        if not isinstance(node, Mapping) or last not in node or isinstance(node[last], Mapping):
            unknown.append(key)
        elif json.dumps(node[last]) != json.dumps(value):
            changes[key] = (node[last], value)
            _set(node, last, value)
    if not changes:
        return text, changes, unknown
    stream = io.StringIO()
    editor.dump(content, stream)
    return stream.getvalue(), changes, unknown


def _set(node: Any, key: str, value: Any) -> None:
    """node[key] = value in ruamel's mapping, the comment behind it one space away whatever the value's length."""
    if isinstance(value, list):
        value = CommentedSeq(value)
        value.fa.set_flow_style()
    node[key] = value
    if comment := (node.ca.items.get(key) or [None] * 3)[2]:
        comment.column = 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    run(main)
