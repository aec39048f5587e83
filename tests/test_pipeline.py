"""The whole graph on tiny models: every family, what reruns, what is restored, what a kill costs, what loads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import tiny
from tests.conftest import ProjectFactory
from tests.tiny import Project, process_environment, tree

ALWAYS = {"sources"}
AFTER_RATIO = {"sources", "train_ranks", "update_weights", "remap", "evaluate", "speed", "report"}
AFTER_FORMAT = {"sources", "remap", "evaluate", "speed", "report"}

# Loads a checkpoint as a user would; prints the perplexity of the test windows and a digest of the first logits.
FRESH_PROCESS = """
import hashlib, json, sys
from pathlib import Path
import pyarrow.parquet as parquet
import torch, spectrim
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("artifacts/remap").eval()
tokenizer = AutoTokenizer.from_pretrained("artifacts/remap")
(file,) = Path("artifacts/calibrate/test").glob("*.parquet")
windows = torch.tensor(parquet.read_table(file)["input_ids"].to_pylist())
total, count, digest = 0.0, 0, None
with torch.no_grad():
    for window in windows:
        logits = model(window[None]).logits[0].float()
        digest = digest or hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        loss = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
        total, count = total + loss.double().sum().item(), count + len(loss)
    text = model.generate(windows[:1, :4], max_new_tokens=4, do_sample=False)
types = sorted({type(m).__name__ for m in model.modules() if isinstance(m, spectrim.LowRankLinear)})
print(json.dumps({
    "perplexity": float(torch.tensor(total / count, dtype=torch.float64).exp()), "n_tokens": count,
    "digest": digest, "generated": text.shape[1], "types": types, "vocabulary": len(tokenizer),
}))
"""


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def layers(project: Project) -> dict[str, int]:
    """Finished entry -> when its manifest was written."""
    root = project.folder / ".spectrim" / "layers"
    return {file.parent.name: file.stat().st_mtime_ns for file in root.glob("[!.]*/manifest.json")}


def forget(project: Project, stage: str) -> None:
    """Remove a stage's output, every finished layer and DVC's memory of earlier runs."""
    project.run("rm", "-rf", f"artifacts/{stage}", ".spectrim", ".dvc/cache/runs")


def forget_cached(project: Project, stage: str) -> None:
    """Remove what DVC's cache lists of a stage's output folder, so that it must be computed again."""
    lock = yaml.safe_load((project.folder / "dvc.lock").read_text(encoding="utf-8"))
    name = lock["stages"][stage]["outs"][0]["md5"]
    (project.folder / ".dvc" / "cache" / "files" / "md5" / name[:2] / name[2:]).unlink()


def load_fresh(project: Project) -> dict[str, Any]:
    return json.loads(project.run(sys.executable, "-c", FRESH_PROCESS).stdout.splitlines()[-1])


def check_result(project: Project) -> str:
    """The checkpoint keeps the budget by its own tensors, loads in a fresh process, and is the evaluated model.

    Returns the digest of its logits.
    """
    metrics = read(project.folder / "reports" / "metrics.json")
    config = read(project.folder / "artifacts" / "remap" / "config.json")["quantization_config"]
    stored = 0
    packed = load_file(project.folder / "artifacts" / "remap" / "model.safetensors")
    prepared = load_file(project.folder / "artifacts" / "prepare" / "model.safetensors")
    refined = project.folder / "artifacts" / "update_weights" / "vectors.safetensors"
    vectors = load_file(refined) if refined.exists() else {}
    assert all(name.endswith(("norm.weight", ".bias")) for name in vectors), list(vectors)
    matrices = config["matrices"]
    for name, tensor in packed.items():
        linear, suffix = name.rsplit(".", 1)
        if linear in matrices and suffix != "bias":
            stored += tensor.nbytes
        else:
            expected = vectors[name].to(tensor.dtype) if name in vectors else prepared[name]
            assert torch.equal(tensor, expected), name
    dense = sum(2 * prepared[f"{linear}.weight"].numel() for linear in matrices)
    untouched = {name for name in prepared if name.rsplit(".", 1)[0] not in matrices or name.endswith(".bias")}
    assert untouched <= set(packed)
    pivoted = [name for name, matrix in matrices.items() if matrix["format"] in ("pifa", "pifa_int8")]
    assert (metrics["pivoting"] or {"matrices": 0})["matrices"] == len(pivoted)
    assert stored / dense == pytest.approx(metrics["ratio"]["file"], rel=1e-5)
    assert metrics["ratio"]["file"] <= metrics["ratio"]["target"]
    fresh = load_fresh(project)
    text = metrics["perplexity"]["corpus"]
    assert fresh["perplexity"] == pytest.approx(text["compressed"], rel=1e-4)
    assert fresh["n_tokens"] == text["n_tokens"]
    assert fresh["types"] == ["LowRankLinear"] and fresh["generated"] == 8
    assert fresh["vocabulary"] == tiny.VOCABULARY
    return fresh["digest"]


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("opt", {"compression__format": "remap", "update_weights__method": "ipca", "train_ranks__method": "dobi"}),
        (
            "qwen2",
            {
                "remap__format": "int8",
                "update_weights__method": "closed_form",
                "update_weights__variants": {
                    "anchored": {"alpha": 0.5},
                    "shrunk": {"shrinkage": 0.1},
                    "both": {"alpha": 0.5, "shrinkage": 0.1},
                },
                "update_weights__block_refinement": {"steps": 4, "learning_rate": 1e-3},
                "train_ranks__method": "svd_llm_v2",
            },
        ),
    ],
)
def test_every_family_goes_through_all_stages(
    family: str, choices: dict[str, Any], tiny_project: ProjectFactory
) -> None:
    project = tiny_project(family)
    project.change(**choices)
    project.stages(*tiny.STAGES)
    check_result(project)
    assert (project.folder / "reports" / "report.md").read_text(encoding="utf-8").count("corpus")
    summary = read(project.folder / "artifacts" / "update_weights" / "summary.json")
    losses = summary["validation_loss"]
    assert len(set(losses.values())) == len(losses) == (4 if family == "qwen2" else 0)
    assert not losses or summary["chosen"] == min(losses, key=lambda name: losses[name])


@pytest.mark.parametrize("stage", [stage for stage in tiny.STAGES if stage not in ("sources", "prepare")])
def test_a_stage_out_of_order_says_what_is_missing(stage: str, tiny_project: ProjectFactory) -> None:
    done = tiny_project("llama").stage(stage, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: artifacts/") and "run" in line and "dvc repro" in line


def test_the_graph_runs_under_dvc(finished_llama: Project) -> None:
    digest = check_result(finished_llama)
    assert load_fresh(finished_llama)["digest"] == digest, "every process gets the same logits, bit for bit"
    for command in ("metrics", "params", "plots"):
        finished_llama.run("dvc", command, "diff" if command == "params" else "show")


def test_without_the_import_loading_fails_loudly(finished_llama: Project) -> None:
    code = 'from transformers import AutoModelForCausalLM as A; A.from_pretrained("artifacts/remap"); print("loaded")'
    done = finished_llama.run(sys.executable, "-c", code, check=False)
    assert done.returncode != 0 and "loaded" not in done.stdout
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr


def test_only_what_changed_reruns(finished_llama: Project, tmp_path: Path) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    first = tree(project.folder / "artifacts" / "remap")
    project.change(runtime__workers=1)  # of the machine, not of a result
    assert project.repro() == ALWAYS

    project.change(compression__ratio=0.6)
    assert project.repro() == AFTER_RATIO
    assert read(project.folder / "reports" / "metrics.json")["ratio"]["file"] <= 0.6
    assert "0.6" in project.run("dvc", "params", "diff").stdout
    assert "ratio.target" in project.run("dvc", "metrics", "diff").stdout

    project.change(remap__format="int8")
    assert project.repro() == AFTER_FORMAT

    project.change(compression__ratio=0.8, remap__format="same")
    # what is measured or rendered into the files that git holds is not in the run cache
    assert project.repro() <= {"sources", "speed", "report"}, "going back restores from the run cache"
    assert tree(project.folder / "artifacts" / "remap") == first

    project.commit("a finished run")
    project.dvc("exp", "run", "-S", "compression.ratio=0.6")
    assert read(project.folder / "reports" / "metrics.json")["ratio"]["target"] == 0.6

    queue_and_run(project)


def queue_and_run(project: Project) -> None:
    """A queued experiment runs in a copied tree and shares the project's caches; only the new title is computed."""
    options = ("-S", "compression.ratio=0.8", "-S", "report.title=Queued")
    project.dvc("exp", "run", "--queue", "--name", "queued", *options)
    # a DVC that was not forked: the queue's worker starts processes, which a forked one may not
    project.dvc("exp", "run", "--run-all", program=(sys.executable, "-m", "dvc"))
    project.dvc("exp", "apply", "queued")
    assert "Queued" in (project.folder / "reports" / "report.md").read_text(encoding="utf-8")


def test_presets_are_measured_beside_the_project(finished_llama: Project, tmp_path: Path) -> None:
    """benchmarks/presets.py runs what follows capture in a folder of its own; the project stays as it was."""
    project = finished_llama.copy(tmp_path / "llama")
    for name in ("benchmarks", "presets"):
        shutil.copytree(tiny.REPOSITORY / name, project.folder / name)
    before, known = tree(project.folder / "artifacts"), layers(project)
    command = (sys.executable, "-m", "benchmarks.presets", "--presets", "svd", "--ratios", "0.6", "--markdown")
    lines = project.run(*command).stdout.splitlines()
    dense, int8, int4, row = [json.loads(line) for line in lines if line.startswith("{")]
    file = (project.folder / "artifacts" / "prepare" / "model.safetensors").stat().st_size
    assert dense["bytes"] == file > int8["bytes"] > int4["bytes"]
    measured = read(project.folder / "artifacts" / "baseline" / "baseline.json")
    assert dense["perplexity"]["corpus"] == pytest.approx(measured["perplexity"]["corpus"]["perplexity"])
    assert (row["preset"], row["ratio"]) == ("svd", 0.6)
    assert row["linear_bytes"] <= 0.6 * dense["linear_bytes"] and row["bytes"] < dense["bytes"]
    assert row["seconds"] > 0 and row["peak_memory"] > 10**7
    assert row["perplexity"]["corpus"] != dense["perplexity"]["corpus"]
    assert len([line for line in lines if line.startswith("| svd |")]) == 1
    assert tree(project.folder / "artifacts") == before and layers(project) == known

    project.change(capture__damping=1e-4)
    done = project.run(*command, check=False)
    assert done.returncode == 1 and "run `dvc repro capture` first" in done.stderr and not done.stdout


def test_formats_are_measured_at_equal_ranks(finished_llama: Project, tmp_path: Path) -> None:
    """benchmarks/formats.py stores the last run's factors in every format; the project stays as it was."""
    project = finished_llama.copy(tmp_path / "llama")
    shutil.copytree(tiny.REPOSITORY / "benchmarks", project.folder / "benchmarks")
    before = tree(project.folder / "artifacts")
    command = (sys.executable, "-m", "benchmarks.formats", "--formats", "pifa", "int8")
    exact, pifa, int8 = [json.loads(line) for line in project.run(*command).stdout.splitlines()]
    assert [row["format"] for row in (exact, pifa, int8)] == ["float16", "pifa", "int8"]
    assert exact["cost"] == {"corpus": 0.0} and abs(pifa["cost"]["corpus"]) < 1e-2 > abs(int8["cost"]["corpus"])
    assert int8["ratio"] < exact["ratio"] > pifa["ratio"]
    assert all(row["resident_ratio"] == pytest.approx(row["ratio"], rel=0.05) for row in (exact, pifa, int8))
    assert tree(project.folder / "artifacts") == before


def test_a_bad_parameter_costs_nothing(finished_llama: Project, tmp_path: Path) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    good = (project.folder / "params.yaml").read_text(encoding="utf-8")
    project.change(compression__ratio=1.5, train_ranks__stepz=3)
    done = project.run("dvc", "repro", check=False)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert (
        "params.yaml: train_ranks.stepz: unknown key" in said
        and "compression.ratio: input should be less than or equal to 1" in said
    )
    (project.folder / "params.yaml").write_text(good, encoding="utf-8")
    assert project.repro() == ALWAYS
    assert tree(project.folder / "artifacts") == tree(finished_llama.folder / "artifacts")


# in the inputs, the gradients and the last of them of capture; in the closed form and in both snapshots of refinement
KILLED = [*(("capture", n) for n in (4, 8, 11)), *(("update_weights", n) for n in (1, 3, 4)), ("remap", 2)]


@pytest.mark.parametrize(("stage", "commits"), KILLED)
def test_a_killed_stage_goes_on_where_it_was(stage: str, commits: int, finished_llama: Project, tmp_path: Path) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    forget(project, stage)
    project.change(runtime__workers=1)
    killed = project.stage(stage, check=False, kill_after=commits)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (project.folder / "artifacts" / stage).exists()
    survivors = layers(project)
    assert survivors

    project.stage(stage)
    now = layers(project)
    assert all(now[key] == survivors[key] for key in set(now) & set(survivors)), "a finished layer was computed again"
    assert set(now) - set(survivors), "the unfinished layers were computed"
    assert not list((project.folder / ".spectrim" / "layers").glob(".partial-*"))
    assert tree(project.folder / "artifacts" / stage) == tree(finished_llama.folder / "artifacts" / stage)


def test_a_refinement_killed_in_its_last_commit_is_not_trained_again(finished_llama: Project, tmp_path: Path) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    forget(project, "update_weights")
    killed = project.stage("update_weights", check=False, kill_after=5)  # three blocks, two snapshots, then the result
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = project.stage("update_weights")
    assert "goes on after step 4 of 4" in done.stderr
    expected = tree(finished_llama.folder / "artifacts" / "update_weights")
    assert tree(project.folder / "artifacts" / "update_weights") == expected
    assert not list((project.folder / ".spectrim" / "layers").glob("*/square.safetensors"))


def test_a_killed_dvc_repro_goes_on_where_it_was(finished_llama: Project, tmp_path: Path) -> None:
    """The whole process group dies while capture is at work; what follows capture is not even run again."""
    project = finished_llama.copy(tmp_path / "llama")
    forget(project, "capture")
    forget_cached(project, "capture")
    process = subprocess.Popen(
        ["dvc", "repro", "capture"], cwd=project.folder, env=process_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not layers(project):
        assert process.poll() is None, "the run ended before its first layer was finished"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert project.repro() == {"sources", "capture"}
    assert tree(project.folder / "artifacts") == tree(finished_llama.folder / "artifacts")


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "no manifest"])
def test_a_damaged_layer_is_computed_again(damage: str, finished_llama: Project, tmp_path: Path) -> None:
    project = finished_llama.copy(tmp_path / "llama")
    forget(project, "update_weights")
    project.stage("update_weights")
    entry = project.folder / ".spectrim" / "layers" / min(layers(project))
    file = max((path for path in entry.iterdir() if path.name != "manifest.json"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "no manifest":
        (entry / "manifest.json").unlink()
    else:
        file.unlink()  # the file is linked into artifacts/: replace it
        file.write_bytes(data if damage == "flipped bit" else data[:-7])
    before = layers(project)
    done = project.stage("update_weights")
    assert "warning" in done.stderr and entry.name in done.stderr
    after = layers(project)
    assert {key for key in after if after[key] != before.get(key)} == {entry.name}
    expected = tree(finished_llama.folder / "artifacts" / "update_weights")
    assert tree(project.folder / "artifacts" / "update_weights") == expected
