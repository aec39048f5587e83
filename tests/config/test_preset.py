"""Presets: one set of keys, valid values, one command that changes nothing but them, or nothing at all."""

import difflib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.config import params as parameters
from pipeline.config import preset
from pipeline.config.preset import applied, edited, read
from spectrim.errors import ConfigError
from tests.tiny import REPOSITORY, process_environment

NAMES = sorted(file.stem for file in (REPOSITORY / "presets").glob("*.yaml"))
UPSTREAM = ("model", "data", "runtime", "prepare", "calibrate", "capture", "baseline", "evaluate", "report")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and the presets, the working directory of this test."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    shutil.copytree(REPOSITORY / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*arguments: str) -> str:
    """`python -m pipeline.config.preset ARGUMENTS` in this process; what it prints."""
    import typer

    app = typer.Typer()
    app.command()(preset.main)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False).stdout


def content(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))


def value(mapping: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        mapping = mapping[part]
    return mapping


def test_there_is_a_preset_for_every_method() -> None:
    assert NAMES == ["asvd", "coded", "dobi-svd", "kfac", "mixed", "spectrim", "svd", "svd-llm", "svd-llm-v2"]


def test_presets_set_the_same_keys_of_stages_that_follow_capture(folder: Path) -> None:
    """The same keys: one after another leaves nothing behind. After capture: no preset makes it run again."""
    keys = [list(read(name)) for name in NAMES]
    assert all(each == keys[0] for each in keys)
    assert not {key.split(".")[0] for key in keys[0]} & set(UPSTREAM)
    committed = content(REPOSITORY)
    for key in keys[0]:
        value(committed, key)
    assert {"compression.format", "train_ranks.method", "update_weights.method", "remap.format"} <= set(keys[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_described_and_valid(name: str, folder: Path) -> None:
    assert (folder / "presets" / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")
    text, changes = applied(name, read(name))
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    parameters.load.cache_clear()
    parameters.load(folder / "params.yaml")
    assert bool(changes) == (name != "mixed")


def test_the_committed_file_is_our_preset(folder: Path) -> None:
    ours, committed = read("mixed"), content(REPOSITORY)
    assert {key: value(committed, key) for key in ours} == ours


def test_one_preset_after_another_leaves_nothing_behind(folder: Path) -> None:
    original = (folder / "params.yaml").read_bytes()
    direct: dict[str, bytes] = {}
    names = NAMES
    for name in names:
        (folder / "params.yaml").write_bytes(original)
        write(name)
        direct[name] = (folder / "params.yaml").read_bytes()
    assert len(set(direct.values())) == len(names)
    for before in names:
        for name in names:
            (folder / "params.yaml").write_bytes(direct[before])
            write(name)
            assert (folder / "params.yaml").read_bytes() == direct[name], (before, name)


def test_only_the_lines_of_changed_keys_change(folder: Path) -> None:
    """Comments, order, spelling of numbers, null and quotes stay; the changes are printed as old -> new."""
    original = (folder / "params.yaml").read_text(encoding="utf-8")
    before = content(folder)
    said = write("dobi-svd").splitlines()
    changed = {key: new for key, new in read("dobi-svd").items() if value(before, key) != new}
    formats = ", ".join(value(before, "compression.alternatives"))
    assert said == [
        f"{key}: {f'[{formats}]' if key == 'compression.alternatives' else value(before, key)} -> {new}"
        for key, new in changed.items()
    ]
    assert "train_ranks.method: fisher -> dobi" in said
    lines = list(difflib.ndiff(original.splitlines(), (folder / "params.yaml").read_text("utf-8").splitlines()))
    added, removed = ([line[2:] for line in lines if line.startswith(sign)] for sign in "+-")
    assert len(added) == len(removed) == len(changed)
    for old, new in zip(removed, added, strict=True):
        assert old.split(" #")[1:] == new.split(" #")[1:] and old.split(":")[0] == new.split(":")[0]
    assert {key: value(content(folder), key) for key in changed} == changed


def test_applying_it_again_changes_and_writes_nothing(folder: Path) -> None:
    write("svd")
    file = folder / "params.yaml"
    before = file.stat()
    assert write("svd") == "params.yaml has the values of svd already\n"
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_print_writes_nothing_and_gives_every_key(folder: Path) -> None:
    before = (folder / "params.yaml").read_bytes()
    words = write("dobi-svd", "--print").split()
    assert words[::2] == ["-S"] * len(read("dobi-svd"))
    assert words[1::2] == [f"{key}={new}" for key, new in read("dobi-svd").items()]
    assert (folder / "params.yaml").read_bytes() == before


def test_values_of_every_kind_are_written(folder: Path) -> None:
    text = "a: # of all\n  b: 1 # one\n  c: {d: x}\n  e: [1, 2] # list\n  f: null # none\n\nz: 'kept' # last\n"
    values = {"a.b": None, "a.c.d": True, "a.e": ["u"], "a.f": 2.5}
    found, changes, unknown = edited(text, values)
    assert (
        found == "a: # of all\n  b: null # one\n  c: {d: true}\n  e: [u] # list\n  f: 2.5 # none\n\nz: 'kept' # last\n"
    )
    assert not unknown and changes == {
        "a.b": (1, None),
        "a.c.d": ("x", True),
        "a.e": ([1, 2], ["u"]),
        "a.f": (None, 2.5),
    }
    assert edited(text, {"a.b": 1, "z": "kept"}) == (text, {}, [])
    assert edited(text, {"a": 1, "b": 2, "a.b.c": 3, "a.g": 4})[2] == ["a", "b", "a.b.c", "a.g"]


def refused(name: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        preset.main(name)
    return caught.value.problems


def test_an_unknown_preset_lists_the_available(folder: Path) -> None:
    assert refused("dobi") == [f"presets/dobi.yaml: no such preset; available: {', '.join(NAMES)}"]
    assert "available" in refused("../params")[0]
    shutil.rmtree(folder / "presets")
    assert "run from the project's folder" in refused("svd")[0]


def test_every_problem_is_said_at_once_and_the_file_stays(folder: Path) -> None:
    bad = {"compression": {"ratio": 1.5, "rato": 0.5}, "remap": {"format": "float64"}, "other": {"a": 1}}
    (folder / "presets" / "bad.yaml").write_text(yaml.safe_dump(bad), encoding="utf-8")
    before = (folder / "params.yaml").read_bytes()
    problems = refused("bad")
    for start in (
        "presets/bad.yaml: compression.rato: params.yaml has no such key",
        "presets/bad.yaml: other.a: params.yaml has no such key",
        "params.yaml with presets/bad.yaml: compression.ratio: input should be less than or equal to 1",
        "params.yaml with presets/bad.yaml: remap.format: input should be",
    ):
        assert [problem for problem in problems if problem.startswith(start)], (start, problems)
    assert (folder / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("broken", ["a: [", "just text", ""])
def test_a_broken_file_is_named(broken: str, folder: Path) -> None:
    (folder / "presets" / "bad.yaml").write_text(broken, encoding="utf-8")
    assert refused("bad")[0].startswith("presets/bad.yaml: ")
    (folder / "params.yaml").write_text(broken, encoding="utf-8")
    assert refused("svd")[-1].startswith("params.yaml with presets/svd.yaml: ")
    assert (folder / "params.yaml").read_text(encoding="utf-8") == broken
    (folder / "params.yaml").write_bytes(b"\xff\xfe")
    assert refused("svd")[0].startswith("params.yaml: not valid YAML")
    (folder / "params.yaml").unlink()
    assert refused("svd")[0].startswith("params.yaml: not found")


def test_make_asks_for_a_name_and_lists_the_presets() -> None:
    command = ["make", "--old-file", ".venv/.installed", "preset"]
    done = subprocess.run(
        command, cwd=REPOSITORY, check=False, capture_output=True, text=True, env=process_environment()
    )
    assert done.returncode == 2
    assert "make preset NAME=" in done.stderr and all(name in done.stderr for name in NAMES)
