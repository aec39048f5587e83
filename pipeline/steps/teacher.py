"""What leaves the dense model's last block, which refinement learns from."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.texts import load_windows
from pipeline.steps.model_folders import load_model
from spectrim.compression.statistics import last_hidden
from spectrim.models.blocks import leaving


class Teacher:
    """Of calibration windows as `capture` wrote it; of windows beyond these computed when it is asked for.

    So more text can teach than Grams are computed from. The dense model is loaded where there are such windows.

    Args:
        prepared: folder of the dense model.
        calibrate: folder of the windows.
        captured: folder of what left the last block for the calibration windows.
        seq_len: tokens of each window that are taken.
        device: where the dense model runs.
    """

    def __init__(self, prepared: Path, calibrate: Path, captured: Path, seq_len: int, device: torch.device) -> None:
        self._prepared, self._device = prepared, device
        self._captured = last_hidden(captured, seq_len)
        files = [calibrate / "calibration.parquet", calibrate / "refinement.parquet"]
        self.windows = torch.cat([load_windows(file)[:, :seq_len] for file in files if file.exists()])
        """(windows, seq) int64, the captured ones first."""

    def __call__(self, chosen: Tensor) -> Tensor:
        """(windows, seq, hidden) on the CPU of the windows (windows,) that are ``chosen``."""
        return torch.cat([self._of(index) for index in chosen.tolist()])

    def _of(self, index: int) -> Tensor:
        if index < len(self._captured):
            return self._captured[index : index + 1]
        with torch.no_grad():
            return leaving(self._dense, self.windows[index : index + 1].to(self._device))[0].cpu()

    @cached_property
    def _dense(self) -> Any:
        return load_model(self._prepared, self._device)
