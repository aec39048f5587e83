"""What a fresh machine gets: the wheel ships the library alone, every import is declared, the lock pins every package,
make explains itself, and dvc needs no activated environment.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.tiny import REPOSITORY, process_environment

NOT_LOCKED = {"bitsandbytes"}  # extras that no default asks for and whose packages are large: 125 MB on disk
OURS = {"spectrim", "pipeline", "stages", "benchmarks", "tests"}
BROUGHT = {"triton", "vllm", "lm_eval"}  # the library meets them only inside torch for CUDA, vLLM and the harness
NOT_IMPORTED = {"dvc", "fastapi"}  # a command; held back for Prefect


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    """package -> version of requirements.lock."""
    lines = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), "exact public versions only"
    return {str(canonicalize_name(name)): version for name, version in (pin.split("==") for pin in pins)}


def project() -> dict[str, object]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(*extras: str) -> set[str]:
    """Packages of the library's dependencies and of these extras, by canonical name."""
    metadata = project()
    lines = [
        *metadata["dependencies"],
        *(line for extra in extras for line in metadata["optional-dependencies"][extra]),
    ]
    return {str(canonicalize_name(Requirement(line).name)) for line in lines}


def declared_by_itself(text: str) -> set[str]:
    """Packages of a script that has an environment of its own and declares it in its first lines (PEP 723)."""
    block = re.match(r"# /// script\n((?:#.*\n)*?)# ///\n", text)
    lines = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))["dependencies"] if block else []
    return {str(canonicalize_name(Requirement(line).name)) for line in lines}


def imported(folder: Path) -> dict[str, set[str]]:
    """Top-level name of every import below ``folder`` that is neither Python's own nor this project's -> its files.

    What a script declares by itself is left out.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(folder.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        own = declared_by_itself(text)
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in {name.partition(".")[0] for name in names} - OURS - sys.stdlib_module_names - {"__main__"}:
                if packages(name) & own:
                    continue
                found.setdefault(name, set()).add(file.relative_to(folder.parent).as_posix())
    return found


@cache
def installed() -> dict[str, list[str]]:
    """Top-level import -> the installed packages that bring it; it takes seconds to find."""
    return dict(packages_distributions())


def packages(name: str) -> set[str]:
    """The packages that bring a top-level import; where none is installed, the one of that name."""
    return {str(canonicalize_name(package)) for package in installed().get(name, [name])}


def undeclared(folder: Path, allowed: set[str], brought: Iterable[str] = ()) -> dict[str, set[str]]:
    """The imports below ``folder`` whose package is not among ``allowed``, with the files that have them."""
    found = imported(folder)
    return {name: files for name, files in found.items() if name not in brought and not packages(name) & allowed}


def requirements() -> list[Requirement]:
    """Everything pyproject.toml asks for in a full set-up, extras included."""
    metadata = project()
    extras = metadata["optional-dependencies"]
    locked = (extra for name, extra in extras.items() if name not in NOT_LOCKED)
    lines = [*metadata["dependencies"], *(line for extra in locked for line in extra)]
    return [Requirement(line) for line in lines]


def test_the_wheel_ships_the_library_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in ("spectrim", "pipeline", "stages", "benchmarks", "tests"):
        shutil.copytree(REPOSITORY / package, source / package, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, env=process_environment())
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    information = [name for name in names if ".dist-info/" in name]
    modules = {name for name in names if ".dist-info/" not in name}
    expected = {file.relative_to(source).as_posix() for file in (source / "spectrim").rglob("*.py")}
    assert modules == expected | {"spectrim/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in information)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("spectrim", ("lora", "bitsandbytes")),
        ("pipeline", ("pipeline", "dask")),
        ("stages", ("pipeline",)),
        ("benchmarks", ("pipeline", "test")),
        ("tests", ("pipeline", "test")),
    ],
)
def test_every_import_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    brought = {"spectrim": BROUGHT, "tests": {"vllm"}}.get(folder, ())
    assert undeclared(REPOSITORY / folder, declared(*extras), brought) == {}


def test_an_undeclared_import_is_found(tmp_path: Path) -> None:
    names = undeclared(REPOSITORY / "spectrim", declared("lora", "bitsandbytes") - {"numpy"}, BROUGHT)
    assert set(names) == {"numpy"} and any(file.endswith("knapsack.py") for file in names["numpy"])
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "late.py").write_text("def load():\n    from yaml.nodes import Node\n    return Node\n")
    assert undeclared(tmp_path / "room", declared()) == {"yaml": {"room/late.py"}}
    assert undeclared(tmp_path / "room", declared("pipeline")) == {}
    head = '# /// script\n# dependencies = ["llmcompressor==0.14"]\n# ///\n'
    (tmp_path / "room" / "late.py").write_text(head + "import llmcompressor\nimport yaml\n")
    assert undeclared(tmp_path / "room", declared()) == {"yaml": {"room/late.py"}}


def test_nothing_is_declared_that_nothing_imports() -> None:
    def used(folder: str) -> set[str]:
        return {package for name in imported(REPOSITORY / folder) for package in packages(name)}

    assert declared() - used("spectrim") == set()
    assert declared("pipeline") - used("spectrim") - used("pipeline") == NOT_IMPORTED


def test_the_lock_satisfies_every_requirement(locked: dict[str, str]) -> None:
    for requirement in requirements():
        version = locked[str(canonicalize_name(requirement.name))]
        assert Version(version) in requirement.specifier, f"{requirement} is locked to {version}"


def test_torch_is_pinned_without_a_build_so_that_pip_takes_the_right_one(locked: dict[str, str]) -> None:
    assert locked["torch"] == "2.13.0"


def test_the_lock_installs_on_the_oldest_python_that_is_promised(locked: dict[str, str]) -> None:
    oldest = str(project()["requires-python"]).removeprefix(">=")
    taken = {name: distribution(name).metadata.get("Requires-Python") or "" for name in locked}
    assert {name: asked for name, asked in taken.items() if not SpecifierSet(asked).contains(f"{oldest}.0")} == {}


def test_this_environment_is_the_locked_one(locked: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "freeze", "--all"]
    frozen = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line in frozen.splitlines():
        name, _, version = line.partition("==")
        if (key := str(canonicalize_name(name))) in locked:
            assert version.split("+")[0] == locked[key], f"{line} is installed; run `make .venv`"


def test_dvc_runs_stages_by_its_own_python_without_activation(tmp_path: Path) -> None:
    """Negative control: the same dvc, started as a module, finds no `python` or another one."""
    (tmp_path / "stage.py").write_text("import sys, torch\nprint(sys.executable, file=open('python', 'w'))\n")
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: python stage.py, outs: [python]}}")
    bare = {"HOME": str(tmp_path), "DVC_NO_ANALYTICS": "1", "PATH": "/usr/bin:/bin"}
    binaries = Path(sys.executable).parent

    def call(*command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)

    assert call(str(binaries / "dvc"), "init", "--no-scm", "--quiet", environment=bare).returncode == 0
    assert call(sys.executable, "-m", "dvc", "repro", environment=bare).returncode != 0
    for environment in (bare, {name: bare[name] for name in ("HOME", "DVC_NO_ANALYTICS")}):
        done = call(str(binaries / "dvc"), "repro", "--force", environment=environment)
        assert done.returncode == 0, done.stderr
        assert Path((tmp_path / "python").read_text().strip()).parent == binaries


def test_make_takes_torch_from_the_index_that_is_named_or_from_none() -> None:
    def torch_line(index: str | None) -> str:
        environment = {"PATH": "/usr/bin:/bin"} | ({} if index is None else {"TORCH_INDEX": index})
        command = ["make", "--dry-run", "--what-if", "requirements.lock", ".venv"]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True)
        (line,) = (line for line in done.stdout.splitlines() if line.endswith("torch==2.13.0"))
        return line

    assert "--no-deps" in torch_line("https://example.org/rocm")
    assert "--extra-index-url https://example.org/rocm torch==" in torch_line("https://example.org/rocm")
    assert "--extra-index-url" not in torch_line("")
    cpu = "--extra-index-url https://download.pytorch.org/whl/cpu" in torch_line(None)
    assert cpu == (shutil.which("nvidia-smi", path="/usr/bin:/bin") is None)


def test_make_alone_explains_every_target() -> None:
    done = subprocess.run(["make"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for target in (".venv", "repro", "flow", "preset", "test", "deps", "lint", "docs", "ci-report", "lock", "clean"):
        assert f"make {target} " in done.stdout


def test_ci_report_asks_for_the_commit_to_compare_with() -> None:
    command = ["make", "--old-file", ".venv/.installed", "ci-report"]
    done = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make ci-report BASE=REV" in done.stderr


def test_the_license_is_the_one_that_the_metadata_names() -> None:
    assert project()["license"] == "Apache-2.0"
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
