"""The project's files that a piece of code executes, found through its imports.

DVC does not follow imports (treeverse/dvc#9195). Here one function does, for all who ask: DVC's deps, the code part of
every key of the store, and the architecture test. A file brings in

- what its import statements name, wherever in the file they stand, but for those that only type checkers read;
- `import spectrim` itself: what registers the checkpoint format, and with it all that loading a checkpoint executes;
- modules and neighbouring files or folders that it names in a string, as ``import_module`` and templates need.

DVC's deps name a folder where a stage uses more than half of it, so that dvc.yaml stays short; a rerun for a file that
the stage does not use costs seconds, because the store's keys name files.
"""

import ast
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from pipeline.runtime import artifacts
from spectrim.errors import StorageError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("spectrim", "pipeline", "stages")
ORCHESTRATION = {Path("pipeline", "runtime"), Path("pipeline", "config")}
"""What calls the code that computes, and imports what runs, draws and checks but changes no result."""
DOTTED = re.compile(r"\w+(\.\w+)+")


def closure(*files: Path) -> frozenset[Path]:
    """``files`` and every file of the project that they execute, directly or not, relative to its root."""
    seen: set[Path] = set()
    todo = [file for file in files if not is_empty(file)]
    while todo:
        if (current := todo.pop()) not in seen:
            seen.add(current)
            todo += imports(current)
    return frozenset(seen)


@cache
def imports(file: Path, typing: bool = False) -> frozenset[Path]:
    """What one file brings in by itself; with ``typing`` also what only a type checker imports.

    A package's `__init__` counts where it holds code and the package itself is named.
    """
    found: set[Path] = set()
    for node in _executed(tree(file), typing):
        if isinstance(node, ast.Import):
            found |= {module for alias in node.names if (module := module_file(alias.name))}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise StorageError(f"{file}:{node.lineno}: a relative import; write it from the project's root")
            for alias in node.names:
                if module := module_file(f"{node.module}.{alias.name}") or module_file(str(node.module)):
                    found.add(module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= _named(node.value, file)
    return frozenset(path for path in found if not is_empty(path))


def module_file(name: str) -> Path | None:
    """The file of a module of this project; None for anything else."""
    path = Path(*name.split("."))
    if not path.parts or path.parts[0] not in PACKAGES:
        return None
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


@cache
def tree(file: Path) -> ast.Module:
    """The syntax tree of a file, of which strings and what they name are data where it is no Python."""
    if file.suffix != ".py":
        return ast.Module([], [])
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=str(file))


def is_empty(file: Path) -> bool:
    """A Python file with nothing in it but, at most, a docstring."""
    return file.suffix == ".py" and all(map(_is_text, tree(file).body))


def code_digest(computes: Callable[..., Any]) -> str:
    """Hash of all code that ``computes`` can execute: the closure of the modules that define it and what it is given.

    Of Python its syntax tree without docstrings: what a comment or a line break changes is computed by nobody again.
    Of other people's packages that it imports, the versions.
    """
    return artifacts.digest({module: _digest_of(module) for module in sorted(modules_of(computes))})


def libraries(*files: Path) -> dict[str, str]:
    """Version of every package of others that the closure of ``files`` computes with, by its name in the package index.

    That is what it imports outside ORCHESTRATION. A package that is not installed has no version: it is optional, and
    what needs it does not run.
    """
    computing = [file for file in closure(*files) if not ORCHESTRATION & set(file.parents)]
    imported = {name for file in computing for name in _foreign(file)}
    return {package: version(package) for name in imported for package in _packages().get(name, ())}


def dependencies(stage: str) -> list[str]:
    """The code in DVC's deps of a stage: folders it uses more than half of, and single files."""
    used = closure(Path("stages", f"{stage}.py"))
    folders = {file.parent for file in used if len(file.parent.parts) > 1}
    coarse = {
        folder for folder in folders if 2 * len([file for file in used if folder in file.parents]) > _size(folder)
    }
    named = {next((folder for folder in reversed(file.parents) if folder in coarse), file) for file in used}
    return sorted(path.as_posix() for path in named)


@cache
def _digest_of(module: str) -> str:
    file = module_file(module)
    if file is None:
        raise ValueError(f"{module}: none of {PACKAGES}; define what a layer computes in a module there")
    return artifacts.digest([{path.as_posix(): _content(path) for path in closure(file)}, libraries(file)])


@cache
def _foreign(file: Path) -> frozenset[str]:
    """The top-level modules, neither of this project nor of Python, that a file imports."""
    names: set[str] = set()
    for node in _executed(tree(file), typing=False):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return frozenset({name.partition(".")[0] for name in names} - sys.stdlib_module_names - set(PACKAGES))


@cache  # it reads what every installed package says of itself
def _packages() -> Mapping[str, list[str]]:
    return packages_distributions()


@cache
def _content(file: Path) -> str:
    if file.suffix != ".py":
        return artifacts.sha256_file(ROOT / file)
    module = ast.parse((ROOT / file).read_text(encoding="utf-8"))  # a tree of its own: it is changed here
    for node in ast.walk(module):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            body[:1] = [ast.Pass()]
    return hashlib.sha256(ast.dump(module).encode()).hexdigest()


def modules_of(computes: Callable[..., Any]) -> Iterator[str]:
    """The modules of a function, a method, a callable object; of a partial also of the callables it holds."""
    computes = inspect.unwrap(computes)  # of a cache around it
    if isinstance(computes, partial):
        for part in (computes.func, *computes.args, *computes.keywords.values()):
            if callable(part) and not isinstance(part, type):
                yield from modules_of(part)
        return
    owner = getattr(computes, "__self__", None if inspect.isroutine(computes) else computes)
    module = (computes if owner is None else owner if isinstance(owner, type) else type(owner)).__module__
    yield module


def _executed(node: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """``node`` and what lies below it, without docstrings and, unless ``typing``, the body of `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if _is_text(child):
            continue
        if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _executed(other, typing)
            continue
        yield from _executed(child, typing)


def _named(text: str, file: Path) -> set[Path]:
    """The module, or the files that are no Python, that a string in ``file`` names."""
    if DOTTED.fullmatch(text) and (module := module_file(text)):
        return {module}
    if not text.isprintable() or not text.strip("./ ") or text.startswith("/") or ".." in text or len(text) > 80:
        return set()
    beside = ROOT / file.parent / text
    found = [beside] if beside.is_file() else beside.rglob("*") if beside.is_dir() else []
    return {path.relative_to(ROOT) for path in found if path.is_file() and path.suffix not in (".py", ".pyc")}


@cache
def _size(folder: Path) -> int:
    files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
    return len([file for file in files if file.suffix != ".pyc" and not is_empty(file)])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
