"""What `baseline` and `evaluate` share: models from folders, test windows from `calibrate`, perplexity text by text."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact, require_model
from pipeline.runtime.progress import progress
from spectrim.errors import DataError, NumericalError, StorageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


class TextPerplexity(TypedDict):
    """A perplexity and what it was measured on: ``n_tokens`` losses in windows of ``seq_len`` tokens."""

    perplexity: float
    n_tokens: int
    seq_len: int
    tokens_sha256: str


def load_model(folder: Path, device: "torch.device") -> "PreTrainedModel":
    """The model of a folder by plain ``from_pretrained``, in the dtype its config.json names, ready to evaluate.

    Raises:
        StorageError: there is no such model folder.
        CheckpointError: a Spectrim checkpoint that must not be loaded.
    """
    from transformers import AutoModelForCausalLM  # importing spectrim.errors has registered the checkpoint format

    require_model(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises StorageError when there is no such folder."""
    from transformers import AutoTokenizer

    require_model(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def evaluation_windows() -> dict[str, "Tensor"]:
    """Text name -> its test windows (n_windows, seq_len). Raises StorageError when `calibrate` left none."""
    files = sorted(artifact("calibrate", "test").glob("*.parquet"))
    if not files:
        raise StorageError(f"{artifact('calibrate', 'test')}: no test windows; run `dvc repro calibrate`")
    return {file.stem: load_windows(file) for file in files}


def text_perplexities(
    model: "PreTrainedModel", texts: Mapping[str, "Tensor"], *, batch_size: int, desc: str
) -> dict[str, TextPerplexity]:
    """Text name -> perplexity of ``model`` on its windows, with a progress bar named ``desc``.

    Raises:
        NumericalError, DataError: see ``spectrim.evaluation.perplexity.perplexity``; the message names the text.
    """
    from spectrim.evaluation.perplexity import perplexity

    found: dict[str, TextPerplexity] = {}
    for name, windows in texts.items():
        bar = partial(progress, desc=f"perplexity of {name}, {desc}")
        try:
            result = perplexity(model, windows, batch_size=batch_size, progress=bar)
        except (DataError, NumericalError) as error:
            raise type(error)(f"{name}: {error}") from error
        found[name] = {**result, "seq_len": windows.shape[1], "tokens_sha256": tokens_sha256(windows)}
    return found


def tokens_sha256(windows: "Tensor") -> str:
    """sha256 of the tokens as little-endian 32-bit integers, in reading order."""
    return hashlib.sha256(windows.cpu().numpy().astype("<i4").tobytes()).hexdigest()


def require_same_tokens(baseline: Mapping[str, Any], texts: Mapping[str, "Tensor"], path: Path) -> None:
    """Raise DataError unless the baseline in ``path`` was measured on exactly these windows."""
    found = {name: entry["tokens_sha256"] for name, entry in baseline["perplexity"].items()}
    wanted = {name: tokens_sha256(windows) for name, windows in texts.items()}
    if found != wanted:
        differing = sorted({*found, *wanted} - {name for name in found if wanted.get(name) == found[name]})
        raise DataError(
            f"{path}: measured on other tokens of {', '.join(differing)} than artifacts/calibrate now holds; "
            "run `dvc repro baseline`"
        )


def machine(device: "torch.device") -> str:
    """What speeds and peaks were measured on, in words."""
    import platform

    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def process_peak(device: "torch.device") -> dict[str, Any]:
    """The device, and the most memory this process ever held: ``peak_rss`` bytes, both models and Python included."""
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return {"device": device.type, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
