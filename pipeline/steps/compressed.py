"""The compressed model, loaded as a user loads it: `import spectrim` registers the checkpoint format."""

from pathlib import Path
from typing import TYPE_CHECKING

import spectrim  # noqa: F401
from pipeline.steps.measure import Subject
from pipeline.steps.model_folders import load_model

if TYPE_CHECKING:
    import torch


def compressed_subject(folder: Path, device: "torch.device") -> Subject:
    """The model of a Spectrim checkpoint.

    Raises:
        CheckpointError: a checkpoint that must not be loaded.
    """
    return Subject(load_model(folder, device))
