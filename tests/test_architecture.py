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

from pipeline.params import Params
from tests.tiny import REPOSITORY, STAGES, process_environment

PACKAGES = ("spectrim", "pipeline", "stages", "benchmarks")
MAX_FILE_LINES = 340
MAX_FUNCTION_LINES = 60
# They check, report, run tasks or convey values that DVC tracks by itself, and cannot change a result.
NO_RESULT = {
    "pipeline/params.py",
    "pipeline/sections.py",
    "pipeline/console.py",
    "pipeline/layers.py",
    "pipeline/prefect_engine.py",
    "spectrim/errors.py",
}
NOT_OF_A_RESULT = {"evaluate": ("calibrate",)}  # read for --text only, which writes no output of the stage
BANNED_NAMES = {"gamma", "ppl", "hessian", "nsamples", "compression_ratio"}
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LEVELS = (
    (0, ("spectrim.errors",)),
    (1, ("spectrim.maths",)),
    (
        2,
        (
            "spectrim.modules",
            "spectrim.stored_linear",
            "spectrim.products",
            "spectrim.int4_kernel",
            "spectrim.int8_kernel",
            "spectrim.shared_input",
            "spectrim.lowrank_linear",
            "spectrim.quantized_linear",
            "spectrim.blocks",
        ),
    ),
    (3, ("spectrim.checkpoint", "spectrim.saving", "spectrim.loading")),
    (5, ("pipeline", "spectrim.lm_eval", "spectrim.cli")),  # entry points, which import the whole library
    (4, ("spectrim",)),  # everything else of the library
    (6, ("stages", "benchmarks")),
)
SIBLINGS_ALLOWED = {1, 2, 3, 5}


def sources(*packages: str) -> list[Path]:
    """The python files of packages, relative to the repository."""
    return sorted(file.relative_to(REPOSITORY) for package in packages for file in (REPOSITORY / package).rglob("*.py"))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse((REPOSITORY / file).read_text(encoding="utf-8"), filename=str(file))


def module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_file(name: str) -> Path | None:
    """The file of a module of this repository; None for anything else."""
    path = Path(*name.split("."))
    if path.parts[0] not in PACKAGES:
        return None
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (REPOSITORY / candidate).is_file():
            return candidate
    return None


@cache
def imports(file: Path) -> frozenset[Path]:
    """The repository's files that a file names in its import statements, wherever in the file they stand.

    `from package import module` names the module. A package's `__init__` counts only where the package itself is
    named: importing spectrim/__init__ on the way merely registers the checkpoint format, which changes no result.
    """
    found: set[Path | None] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {module_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports from the repository's root"
            for alias in node.names:
                module = module_file(f"{node.module}.{alias.name}")
                found.add(module if module is not None else module_file(str(node.module)))
    return frozenset(item for item in found if item is not None)


def closure(file: Path) -> set[Path]:
    """A file and everything of the repository that it imports, directly or not, but not through what only checks."""
    seen: set[Path] = set()
    todo = [file]
    while todo:
        if (current := todo.pop()) not in seen:
            seen.add(current)
            todo += [] if current.as_posix() in NO_RESULT else imports(current)
    return seen


def level(file: Path) -> int:
    name = module_name(file)
    return next(
        number for number, prefixes in LEVELS for prefix in prefixes if name == prefix or name.startswith(f"{prefix}.")
    )


def is_empty(file: Path) -> bool:
    """Nothing in it but, at most, a docstring."""
    body = tree(file).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


@cache
def graph() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def entries(listed: list[Any]) -> list[str]:
    """The names in a dvc.yaml list whose items are names or one-key mappings."""
    return [next(iter(item)) if isinstance(item, dict) else item for item in listed]


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=str)
def test_imports_point_strictly_down(file: Path) -> None:
    for imported in imports(file):
        if imported == Path("spectrim/__init__.py"):
            assert level(file) > 4, f"{file} imports the whole library"
            continue
        above, below = level(file), level(imported)
        same = above == below and above in SIBLINGS_ALLOWED
        registration = file == Path("spectrim/__init__.py")
        assert above > below or same or registration, f"{file} (level {above}) imports {imported} (level {below})"


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
    bad = ast.parse("def f():\n    from pipeline import store\n    import stages.remap\n")
    monkeypatch.setattr(sys.modules[__name__], "tree", lambda _: bad)
    imports.cache_clear()
    try:
        found = imports(file)
    finally:
        imports.cache_clear()
    assert found == {Path("pipeline/store.py"), Path("stages/remap.py")}
    assert all(level(imported) > level(file) for imported in found)


def test_init_files_hold_at_most_a_docstring() -> None:
    inits = [file for file in sources(*PACKAGES) if file.name == "__init__.py"]
    assert {str(file) for file in inits if not is_empty(file)} == {"spectrim/__init__.py"}


def test_the_graph_has_the_nine_stages_and_one_module_each() -> None:
    assert tuple(graph()) == STAGES
    modules = {file.stem for file in sources("stages")} - {"__init__"}
    assert modules == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lists_exactly_the_code_it_imports(stage: str) -> None:
    """DVC does not follow imports: a file missing here would leave a stale result in place."""
    expected = {
        file.as_posix()
        for file in closure(Path("stages", f"{stage}.py"))
        if not (file.name == "__init__.py" and is_empty(file))
    }
    if stage == "report":
        templates = (REPOSITORY / "pipeline" / "templates").rglob("*")
        expected |= {file.relative_to(REPOSITORY).as_posix() for file in templates if file.is_file()}
    listed: set[str] = set()
    for name in entries(graph()[stage]["deps"]):
        path = REPOSITORY / name
        if Path(name).parts[0] not in PACKAGES:
            continue
        files = path.rglob("*") if path.is_dir() else [path]
        listed |= {file.relative_to(REPOSITORY).as_posix() for file in files if file.is_file()}
    missing, surplus = expected - NO_RESULT - listed, listed - (expected - NO_RESULT)
    assert not missing and not surplus, f"dvc.yaml, {stage}: add {sorted(missing)}, remove {sorted(surplus)}"


@pytest.mark.parametrize("stage", STAGES)
def test_one_word_names_a_stage_everywhere(stage: str) -> None:
    definition = graph()[stage]
    assert definition["cmd"] == f"python -m stages.{stage}"
    homes = {"evaluate": ("reports/",), "report": ("reports/",)}.get(stage, (f"artifacts/{stage}",))
    outs = [name for key in ("outs", "metrics", "plots") for name in entries(definition.get(key, []))]
    assert outs and all(name.startswith(homes) for name in outs), outs
    sections = {name.split(".")[0] for name in entries(definition.get("params", []))}
    assert stage in sections and "runtime" not in sections
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
    assert set(STAGES) | {"model", "data", "compression", "runtime"} == set(kinds)
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
        if name.split(".")[0] not in {"runtime", *NOT_OF_A_RESULT.get(stage, ())}
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
