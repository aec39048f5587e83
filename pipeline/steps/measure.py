"""Measuring models: perplexity text by text, on the windows of `calibrate`; one model in memory at a time."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from pipeline.data.texts import load_windows
from pipeline.runtime.artifacts import artifact, read_json, write_json
from pipeline.runtime.progress import progress
from pipeline.runtime.snapshots import Snapshots
from spectrim.errors import DataError, NumericalError, StorageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

VALUE, PARTIAL = "value.json", "partial.json"


class Subject(NamedTuple):
    """A model to measure, and what its quantized linears take (``QuantizedBytes``), where it is a baseline."""

    model: "PreTrainedModel"
    size: Mapping[str, Any] | None = None


Load = Callable[[], Subject]


class TextPerplexity(TypedDict):
    """A perplexity and what it was measured on: ``n_tokens`` losses in windows of ``seq_len``, each window's mean."""

    perplexity: float
    n_tokens: int
    losses: list[float]
    seq_len: int
    tokens_sha256: str


class _Held:
    """The subject that was loaded last: many measurements in a row are of one model."""

    def __init__(self) -> None:
        self._load: Load | None = None
        self._subject: Subject | None = None

    def __call__(self, load: Load) -> Subject:
        if self._subject is None or self._load is not load:
            self.release()  # before the next one takes memory
            self._subject, self._load = load(), load
        return self._subject

    def release(self) -> None:
        self._load = self._subject = None


HELD = _Held()


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
        NumericalError, DataError: see ``spectrim.evaluation.perplexity``; the message names the text.
    """
    return {name: measured(model, name, windows, batch_size=batch_size, desc=desc) for name, windows in texts.items()}


def measured(
    model: "PreTrainedModel",
    name: str,
    windows: "Tensor",
    *,
    batch_size: int,
    desc: str,
    begun: Sequence[float] = (),
    keep: Callable[[list[float]], None] = lambda losses: None,
) -> TextPerplexity:
    """The perplexity of ``model`` on the windows of the text ``name``; ``begun`` and ``keep`` as in ``perplexity``."""
    from spectrim.evaluation.perplexity import perplexity

    bar = partial(progress, desc=f"perplexity of {name}{', ' * bool(desc)}{desc}")
    try:
        found = perplexity(model, windows, batch_size=batch_size, progress=bar, begun=begun, keep=keep)
    except (DataError, NumericalError) as error:
        raise type(error)(f"{name}: {error}") from error
    return {**found, "seq_len": windows.shape[1], "tokens_sha256": tokens_sha256(windows)}


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


def write_perplexity(
    load: Load, text: str, windows: "Tensor", batch_size: int, snapshots: Snapshots, folder: Path
) -> None:
    """Write the ``TextPerplexity`` of a model, and what its linears take, going on from the newest of ``snapshots``."""
    subject, begun = HELD(load), list[float]()
    if newest := snapshots.newest():
        begun = read_json(newest[1] / PARTIAL)["losses"]

    def keep(losses: list[float]) -> None:
        snapshots.keep(len(losses), lambda part: write_json(part / PARTIAL, {"losses": losses}))

    found = measured(subject.model, text, windows, batch_size=batch_size, desc="", begun=begun, keep=keep)
    write_json(folder / VALUE, {**found, "size": subject.size})
