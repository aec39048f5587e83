"""What a fresh machine gets: the wheel ships the library alone, the lock pins every package, make explains itself."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.tiny import REPOSITORY, process_environment

NOT_LOCKED = {"bitsandbytes"}  # extras that no default asks for and whose packages are large: 125 MB on disk


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    """package -> version of requirements.lock."""
    lines = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), "exact public versions only"
    return {str(canonicalize_name(name)): version for name, version in (pin.split("==") for pin in pins)}


def project() -> dict[str, object]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


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
    assert modules == expected
    assert any(name.endswith("licenses/LICENSE") for name in information)


def test_the_lock_satisfies_every_requirement(locked: dict[str, str]) -> None:
    for requirement in requirements():
        version = locked[str(canonicalize_name(requirement.name))]
        assert Version(version) in requirement.specifier, f"{requirement} is locked to {version}"


def test_torch_is_pinned_without_a_build_so_that_pip_takes_the_right_one(locked: dict[str, str]) -> None:
    assert locked["torch"] == "2.13.0"


def test_this_environment_is_the_locked_one(locked: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "freeze", "--all"]
    frozen = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line in frozen.splitlines():
        name, _, version = line.partition("==")
        if (key := str(canonicalize_name(name))) in locked:
            assert version.split("+")[0] == locked[key], f"{line} is installed; run `make .venv`"


def test_make_alone_explains_every_target() -> None:
    done = subprocess.run(["make"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for target in (".venv", "repro", "flow", "preset", "test", "lint", "ci-report", "clean"):
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
