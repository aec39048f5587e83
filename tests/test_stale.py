"""Nothing stale: what changes a result reruns the stages that it changes, and what does not costs seconds."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.runtime import closure
from tests import tiny
from tests.tiny import Project, process_environment, tree

# stage -> the modules whose functions compute what the store keeps of it
COMPUTED_IN = {
    "prepare": ["pipeline.data.prepared"],
    "calibrate": ["pipeline.data.calibration"],
    "capture": ["pipeline.steps.walk"],
    "train_ranks": ["pipeline.steps.rank_choice"],
    "update_weights": ["pipeline.steps.updates", "pipeline.steps.refinement_run"],
    "remap": ["pipeline.steps.packed_blocks"],
    "baseline": ["pipeline.steps.measure", "pipeline.steps.subjects"],
    "evaluate": ["pipeline.steps.measure", "pipeline.steps.compressed"],
    "report": ["pipeline.report.rendering"],
}
STORED = set(COMPUTED_IN)

# file -> the stages that DVC must name and the store must compute anew, and those that neither may touch
MUTATIONS: dict[str, tuple[set[str], set[str]]] = {
    "spectrim/maths/subspace.py": ({"update_weights"}, {"prepare", "calibrate", "capture", "baseline", "report"}),
    "spectrim/models/blocks.py": ({"prepare", "capture", "update_weights"}, {"calibrate", "report"}),
    "spectrim/formats/shared_input.py": ({"evaluate"}, {"prepare", "calibrate", "capture", "baseline", "report"}),
    "spectrim/formats/quantized_linear.py": ({"evaluate"}, {"prepare", "calibrate", "capture", "baseline", "report"}),
    "spectrim/formats/products.py": ({"update_weights", "evaluate"}, {"prepare", "capture", "baseline", "report"}),
    "spectrim/checkpoint/loading.py": ({"evaluate"}, {"prepare", "calibrate", "capture", "baseline", "report"}),
    "spectrim/compression/refinement.py": ({"update_weights"}, {"prepare", "capture", "baseline", "evaluate"}),
    "spectrim/evaluation/perplexity.py": ({"baseline", "evaluate"}, {"prepare", "calibrate", "capture", "remap"}),
    "pipeline/data/documents.py": ({"calibrate"}, {"prepare", "capture", "train_ranks", "remap", "report"}),
    "pipeline/steps/packed_blocks.py": (
        {"remap"},
        {"prepare", "calibrate", "capture", "baseline", "evaluate", "report"},
    ),
    "pipeline/report/templates/report.md.j2": ({"report"}, STORED - {"report"}),
    "spectrim/integrations/lora.py": (set(), STORED),
    "spectrim/cli.py": (set(), STORED),
}


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Project], dict[str, str]]]:
    """Project -> stage -> the code part of its keys in the store, with the files as they are there."""
    cached = (closure.tree, closure.imports, closure._foreign, closure._content, closure._digest_of)

    def found(project: Project) -> dict[str, str]:
        monkeypatch.setattr(closure, "ROOT", project.folder)
        for function in cached:
            function.cache_clear()
        return {
            stage: " ".join(closure._digest_of(module) for module in modules) for stage, modules in COMPUTED_IN.items()
        }

    yield found
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def named(project: Project) -> set[str]:
    """The stages that `dvc status` finds changed, `sources` left out, which always is."""
    return set(json.loads(project.dvc("status", "--json").stdout)) - {"sources"}


def test_a_changed_behaviour_reaches_its_stages_and_no_others(
    finished_llama: Project, tmp_path: Path, digests: Callable[[Project], dict[str, str]]
) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    before = digests(project)
    assert set(before) == STORED and named(project) == set()
    rooms = {Path(name).parent for name in MUTATIONS}
    assert len([name for name, (changed, _) in MUTATIONS.items() if changed]) >= 8 and len(rooms) >= 8
    for name, (changed, untouched) in MUTATIONS.items():
        file = project.folder / name
        text = file.read_text(encoding="utf-8")
        file.write_text(text + "\nMUTATED = 1\n", encoding="utf-8")
        now, found = digests(project), named(project)
        file.write_text(text, encoding="utf-8")
        missed = {stage for stage in STORED if now[stage] != before[stage]}
        assert changed <= found and changed <= missed, name
        assert not untouched & found and not untouched & missed, name


@pytest.mark.parametrize(
    ("package", "changed", "untouched"),
    [
        ("pcodec", {"train_ranks", "update_weights", "remap", "evaluate"}, {"prepare", "calibrate", "capture"}),
        ("mwparserfromhell", {"calibrate"}, {"prepare", "capture", "train_ranks", "update_weights", "remap"}),
        ("torch", STORED - {"calibrate", "report"}, set()),
        ("prefect", set(), STORED),
        ("rich", set(), STORED),
    ],
)
def test_another_version_of_a_package_that_computes_is_in_the_keys_of_what_it_computes(
    package: str, changed: set[str], untouched: set[str], finished_llama: Project,
    digests: Callable[[Project], dict[str, str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before, real = digests(finished_llama), closure.version
    monkeypatch.setattr(closure, "version", lambda name: "0.0" if name == package else real(name))
    after = digests(finished_llama)
    found = {stage for stage in STORED if after[stage] != before[stage]}
    assert changed <= found and not untouched & found


def test_a_kernel_that_computes_something_else_is_measured_again(finished_llama: Project, tmp_path: Path) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    metrics = project.folder / "reports" / "metrics.json"
    before = json.loads(metrics.read_text(encoding="utf-8"))["perplexity"]["corpus"]
    file = project.folder / "spectrim" / "formats" / "products.py"
    text = file.read_text(encoding="utf-8")
    changed = text.replace(
        "return functional.linear(x, weight.to(x.dtype), bias)",
        "return 0 * functional.linear(x, weight.to(x.dtype), bias)",
    )
    assert changed != text
    file.write_text(changed, encoding="utf-8")
    assert {"evaluate", "speed", "report"} <= project.repro("evaluate", "speed", "report")
    after = json.loads(metrics.read_text(encoding="utf-8"))["perplexity"]["corpus"]
    assert after["dense"] == before["dense"] and after["compressed"] != before["compressed"]


def test_a_comment_reruns_a_stage_and_computes_nothing(finished_llama: Project, tmp_path: Path) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    file = project.folder / "spectrim" / "compression" / "statistics.py"
    file.write_text(file.read_text(encoding="utf-8") + "\n# a remark\n", encoding="utf-8")
    entries, outputs = kept(project), tree(project.folder / "artifacts")
    assert "capture" in project.repro()
    assert kept(project) == entries and tree(project.folder / "artifacts") == outputs


def test_the_lock_of_another_machine_costs_no_computation(finished_llama: Project, tmp_path: Path) -> None:
    """DVC believes the lock: with other hashes in it every stage runs, and finds its results in the store."""
    project = finished_llama.copy(tmp_path / "llama")
    lock = project.folder / "dvc.lock"
    flipped = re.sub(r"(md5: )(.)", lambda m: m[1] + ("0" if m[2] != "0" else "1"), lock.read_text(encoding="utf-8"))
    lock.write_text(flipped, encoding="utf-8")
    shutil.rmtree(project.folder / ".dvc" / "cache" / "runs")
    entries, outputs = kept(project), tree(project.folder / "artifacts")
    assert project.repro("evaluate") == set(tiny.STAGES) - {"speed", "report"}  # a speed is measured anew
    assert kept(project) == entries and tree(project.folder / "artifacts") == outputs


def kept(project: Project) -> dict[str, int]:
    """Entry of the store -> when it was written."""
    root = project.folder / ".spectrim" / "layers"
    return {file.parent.name: file.stat().st_mtime_ns for file in root.glob("[!.]*/manifest.json")}


def with_task(project: Project, label: int) -> None:
    row = {"goal": "the river", "sol1": "crosses two valleys", "sol2": "recalls", "label": label}
    (project.folder / "piqa.jsonl").write_text((json.dumps(row) + "\n") * 2, encoding="utf-8")


def test_what_stands_outside_is_followed(finished_llama: Project, tmp_path: Path) -> None:
    """A task file, a text and the model's own folder: their content reruns what reads them, their date nothing."""
    project = finished_llama.copy(tmp_path / "llama")
    params = yaml.safe_load((project.folder / "params.yaml").read_text(encoding="utf-8"))
    model, text = tmp_path / "model", tmp_path / "corpus.jsonl"
    shutil.copytree(params["model"]["source"], model)
    shutil.copy(params["data"]["corpus"]["source"], text)
    project.change(model__source=str(model), data__corpus={**params["data"]["corpus"], "source": str(text)})
    with_task(project, 0)
    project.change(evaluate__tasks={"piqa": "piqa.jsonl"})
    project.repro("evaluate")
    first = scores(project)

    for file in (text, model / "config.json", project.folder / "piqa.jsonl"):
        file.touch()
    assert project.repro("evaluate") == {"sources"}

    with_task(project, 1)
    assert project.repro("evaluate") == {"sources", "baseline", "evaluate"}
    second = scores(project)
    assert second["dense"] == 1 - first["dense"] and second["n_examples"] == 2

    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[::-1]), encoding="utf-8")
    assert project.repro("calibrate") == {"sources", "calibrate"}

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}), encoding="utf-8")
    assert {"sources", "prepare", "capture"} <= project.repro("capture")


def scores(project: Project) -> dict[str, Any]:
    metrics = json.loads((project.folder / "reports" / "metrics.json").read_text(encoding="utf-8"))
    return metrics["tasks"]["piqa"]


@pytest.mark.parametrize(
    ("stage", "file", "said"),
    [
        ("train_ranks", "training.json", "goes on after step 1 of 3"),
        ("baseline", "partial.json", None),
        ("baseline", "value.json", None),
        ("evaluate", "partial.json", None),
    ],
)
def test_a_killed_measurement_or_training_goes_on(
    stage: str, file: str, said: str | None, finished_llama: Project, tmp_path: Path
) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    project.run("rm", "-rf", f"artifacts/{stage}", ".spectrim/layers")
    killed = project.stage(stage, check=False, kill_after=1, kill_at=file)
    assert killed.returncode < 0, killed.stderr
    before = kept(project)
    assert before, "nothing was kept"
    done = project.stage(stage)
    assert said is None or said in done.stderr
    now = kept(project)
    for name in set(before) & set(now):
        assert now[name] == before[name], "a finished part was computed again"
    assert file == "value.json" or set(before) - set(now), "the snapshot stayed"
    where = "reports/evaluate" if stage == "evaluate" else f"artifacts/{stage}"
    assert tree(project.folder / where) == tree(finished_llama.folder / where)


def test_programs_without_the_environment_say_what_to_do() -> None:
    """`.venv/bin/dvc` finds the interpreter beside it, whatever stands on the PATH."""
    program = tiny.REPOSITORY / ".venv" / "bin" / "dvc"
    if not program.is_file():
        pytest.skip("no .venv here")
    bare = {name: value for name, value in process_environment().items() if name != "PATH"} | {"PATH": "/usr/bin:/bin"}
    command: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    done = command([program, "--version"], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
