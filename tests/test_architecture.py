"""The house keeps its shape: import directions, dvc.yaml against the imports, one name per stage, sizes, no pickle."""

import ast
import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.params import Params
from pipeline.runtime import closure as closure_module
from pipeline.runtime.closure import closure, dependencies, imports, is_empty, tree
from tests.tiny import REPOSITORY, STAGES, process_environment

PACKAGES = ("spectrim", "pipeline", "stages", "benchmarks")
MAX_FILE_LINES = 340
MAX_FUNCTION_LINES = 60
NOT_OF_A_RESULT = {"evaluate": ("calibrate.seq_len",)}  # read for --text only, which writes no output of the stage
REGISTRATION = Path("spectrim/__init__.py")
BANNED_NAMES = {"gamma", "ppl", "hessian", "nsamples", "compression_ratio"}
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LEVELS = (
    ("spectrim.errors",),
    ("spectrim.maths",),
    ("spectrim.models", "spectrim.formats"),
    ("spectrim.checkpoint",),
    ("spectrim.compression", "spectrim.evaluation"),
    ("spectrim.integrations", "spectrim.cli"),
    ("pipeline.runtime",),
    ("pipeline.config",),
    ("pipeline.data",),
    ("pipeline.steps",),
    ("pipeline.report",),
    ("pipeline.flow", "pipeline.deps", "pipeline.prune"),
    ("stages", "benchmarks"),
)
"""The rooms from the lowest to the highest: one imports only lower ones and itself."""


def sources(*packages: str) -> list[Path]:
    """The python files of packages, relative to the repository."""
    return sorted(file.relative_to(REPOSITORY) for package in packages for file in (REPOSITORY / package).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(file: Path) -> tuple[int, str]:
    """The level and the name of the room that a file stands in."""
    name = module_name(file)
    return next(
        (level, prefix)
        for level, prefixes in enumerate(LEVELS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    )


@cache
def graph() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def entries(listed: list[Any]) -> list[str]:
    """The names in a dvc.yaml list whose items are names or one-key mappings."""
    return [next(iter(item)) if isinstance(item, dict) else item for item in listed]


def test_every_file_stands_in_a_room() -> None:
    for file in sources(*PACKAGES):
        assert is_empty(file) or file == REGISTRATION or room(file), file


@pytest.mark.parametrize("file", [file for file in sources(*PACKAGES) if not is_empty(file)], ids=str)
def test_imports_point_strictly_down(file: Path) -> None:
    """From room to room; rooms of one level meet on disk, and only what is above the library imports it whole."""
    for imported in imports(file, typing=True):
        if imported == REGISTRATION:
            assert room(file)[0] >= room(Path("spectrim/cli.py"))[0], f"{file} imports the whole library"
        elif file != REGISTRATION:
            (above, own), (below, other) = room(file), room(imported)
            assert own == other or above > below, f"{file} ({own}) imports {imported} ({other})"


def test_no_import_cycle() -> None:
    done: set[Path] = set()

    def visit(file: Path, path: tuple[Path, ...]) -> None:
        assert file not in path, " -> ".join(map(str, (*path, file)))
        if file not in done:
            for imported in sorted(imports(file)):
                visit(imported, (*path, file))
            done.add(file)

    for file in sources(*PACKAGES):
        visit(file, ())


def test_nothing_imports_stages() -> None:
    importers = {(file, imported) for file in sources(*PACKAGES) for imported in imports(file)}
    assert not {(str(f), str(i)) for f, i in importers if i.parts[0] in ("stages", "benchmarks")}


def test_the_check_sees_an_upward_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a library file that imports the pipeline, inside a function, would be caught."""
    file = Path("spectrim/maths/budget.py")
    bad = ast.parse("def f():\n    from pipeline.runtime import store\n    import stages.remap\n")
    monkeypatch.setattr(closure_module, "tree", lambda path: bad if path == file else tree(path))
    imports.cache_clear()
    try:
        found = imports(file)
    finally:
        imports.cache_clear()
    assert found == {Path("pipeline/runtime/store.py"), Path("stages/remap.py")}
    assert all(room(imported)[0] > room(file)[0] for imported in found)


def test_init_files_hold_at_most_a_docstring() -> None:
    inits = [file for file in sources(*PACKAGES) if file.name == "__init__.py"]
    assert {str(file) for file in inits if not is_empty(file)} == {"spectrim/__init__.py"}


def test_the_graph_has_one_module_for_each_stage() -> None:
    assert tuple(graph()) == STAGES
    modules = {file.stem for file in sources("stages")} - {"__init__"}
    assert modules == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_knows_the_code_of_every_stage(stage: str) -> None:
    """What `make deps` writes: a file missing here would leave a stale result in place."""
    listed = [name for name in entries(graph()[stage]["deps"]) if Path(name).parts[0] in PACKAGES]
    assert listed == dependencies(stage), "run `make deps`"


@pytest.mark.parametrize("stage", STAGES)
def test_one_word_names_a_stage_everywhere(stage: str) -> None:
    definition = graph()[stage]
    assert definition["cmd"] == f"python -m stages.{stage}"
    homes = ("reports/",) if stage in ("evaluate", "speed", "report") else (f"artifacts/{stage}",)
    outs = [name for key in ("outs", "metrics", "plots") for name in entries(definition.get(key, []))]
    assert outs and all(name.startswith(homes) for name in outs), outs
    sections = {name.split(".")[0] for name in entries(definition.get("params", []))}
    assert (stage in sections or stage == "sources") and "runtime" not in sections
    assert not any(
        options.get("persist") for item in definition.get("outs", []) if isinstance(item, dict)
        for options in item.values()
    )  # fmt: skip


def parameters_of(kind: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(kind):
        yield from (field.name for field in dataclasses.fields(kind))


def test_params_sections_and_keys_are_the_fields_of_params() -> None:
    content = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    kinds = typing.get_type_hints(Params)
    assert list(content) == list(kinds)
    assert {*STAGES, "model", "data", "compression", "runtime"} == {*kinds, "sources"}
    for section, kind in kinds.items():
        if section != "data":
            assert list(content[section]) == list(parameters_of(kind)), section


def parameters_read(file: Path) -> set[str]:
    """`section` or `section.key` for every `params.section…` in a file."""
    sections = set(typing.get_type_hints(Params))
    read: dict[ast.AST, str] = {}
    for node in ast.walk(tree(file)):  # outer attributes come before the inner ones that they extend
        if not isinstance(node, ast.Attribute):
            continue
        inner = node.value
        if isinstance(inner, ast.Name) and inner.id == "params" and node.attr in sections:
            read.setdefault(node, node.attr)
        elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "params":
            read[inner] = f"{inner.attr}.{node.attr}"
    return set(read.values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_parameters_it_reads(stage: str) -> None:
    """Every `params.section.key` in the stage's code stands in dvc.yaml, alone or with its whole section."""
    declared = set(entries(graph()[stage].get("params", [])))
    content = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for name in declared:
        section, _, key = name.partition(".")
        assert section in content and (not key or key in content[section]), name
    read = {name for file in closure(Path("stages", f"{stage}.py")) for name in parameters_read(file)}
    missing = {
        name
        for name in read
        if name.split(".")[0] != "runtime"
        and name not in NOT_OF_A_RESULT.get(stage, ())
        and name.split(".")[0] not in declared
        and name not in declared
        and not ("." not in name and any(item.startswith(f"{name}.") for item in declared))
    }
    assert not missing, f"dvc.yaml, {stage}: add {sorted(missing)} to params"


@pytest.mark.parametrize("file", sources(*PACKAGES, "tests"), ids=str)
def test_files_and_functions_stay_short(file: Path) -> None:
    lines = len((REPOSITORY / file).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{file}: {lines} lines; cut it where the subject changes"
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{file}: {node.name} has {length} lines"


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=str)
def test_no_pickle_no_remote_code_no_banned_name(file: Path) -> None:
    tensors_only = {
        id(node.func)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call)
        for option in node.keywords
        if option.arg == "weights_only" and isinstance(option.value, ast.Constant) and option.value.value is True
    }
    for node in ast.walk(tree(file)):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & PICKLERS, where
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] not in PICKLERS, where
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            unsafe = {("torch", "save")} if id(node) in tensors_only else {("torch", "load"), ("torch", "save")}
            assert (node.value.id, node.attr) not in unsafe, where
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, where
        elif isinstance(node, ast.arg | ast.Name):
            assert (node.arg if isinstance(node, ast.arg) else node.id) not in BANNED_NAMES, where


def test_importing_the_pipeline_is_cheap() -> None:
    """Prefect, lm-eval and dask cost seconds: only what uses them imports them, when it does."""
    names = [module_name(file) for file in sources("pipeline") if file.name != "__init__.py"]
    code = f"import sys, {', '.join(names)}; print(*(n for n in ('prefect', 'lm_eval', 'dask') if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY, env=process_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == []


def test_one_word_names_one_thing() -> None:
    """No two classes and no two files of the library and the pipeline have one name."""
    places: dict[str, list[str]] = {}
    for file in sources("spectrim", "pipeline"):
        names = [f"class {node.name}" for node in tree(file).body if isinstance(node, ast.ClassDef)]
        for name in [*names, *([] if file.stem == "__init__" else [f"file {file.stem}"])]:
            places.setdefault(name, []).append(str(file))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert not twice
