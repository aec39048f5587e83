"""The teacher of refinement says the same of windows that were captured and of the same ones beyond them."""

import shutil
from pathlib import Path

import torch

from pipeline.data.texts import load_windows
from pipeline.steps.teacher import Teacher
from tests.tiny import Project

SEQ = 24


def test_what_is_computed_is_what_was_captured(captured_llama: Project, tmp_path: Path) -> None:
    artifacts, calibrate = captured_llama.folder / "artifacts", tmp_path / "calibrate"
    shutil.copytree(artifacts / "calibrate", calibrate)
    shutil.copyfile(calibrate / "calibration.parquet", calibrate / "refinement.parquet")
    teacher = Teacher(artifacts / "prepare", calibrate, artifacts / "capture", SEQ, torch.device("cpu"))
    windows = load_windows(calibrate / "calibration.parquet")[:, :SEQ]
    count = len(windows)
    assert torch.equal(teacher.windows, torch.cat([windows, windows]))
    captured, computed = teacher(torch.tensor([3, 1])), teacher(torch.tensor([count + 3, count + 1]))
    torch.testing.assert_close(computed, captured, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(captured[0], captured[1], atol=1e-2)
    mixed = teacher(torch.tensor([count + 1, 3]))
    torch.testing.assert_close(mixed, captured.flip(0), rtol=1e-4, atol=1e-5)


def test_without_more_windows_no_dense_model_is_loaded(captured_llama: Project) -> None:
    artifacts = captured_llama.folder / "artifacts"
    nowhere = Path("not", "there")
    teacher = Teacher(nowhere, artifacts / "calibrate", artifacts / "capture", SEQ, torch.device("cpu"))
    assert teacher(torch.arange(2)).shape[:2] == (2, SEQ)
