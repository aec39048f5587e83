"""The sections of params.yaml: one frozen dataclass each, its keys with their units, and what it refuses.

DVC tracks the values; this file only names and checks them, so it is in no stage's dependencies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

from pydantic import ConfigDict, StringConstraints, with_config

STRICT = ConfigDict(extra="forbid", strict=True)
Source = Annotated[str, StringConstraints(min_length=1)]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Size = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(KB|MB|GB)$")]
SPLITS = ("calibration", "validation", "test")


@with_config(STRICT)
@dataclass(frozen=True)
class Model:
    """The model to compress. ``source``: see pipeline/sources.py; ``sha256`` of the wheel or file, or null."""

    source: Source
    sha256: str | None

    def problems(self) -> Iterator[str]:
        yield from _sha_problem(self.sha256)


@with_config(STRICT)
@dataclass(frozen=True)
class Text:
    """A text. ``splits`` maps calibration, validation, test to the share of documents each gets (sum at most 1)."""

    source: Source
    sha256: str | None
    column: str
    splits: dict[Literal["calibration", "validation", "test"], float]

    def problems(self) -> Iterator[str]:
        yield from _sha_problem(self.sha256)
        if not self.splits:
            yield "splits: empty; give at least one of calibration, validation, test a share"
        if any(not 0 < share <= 1 for share in self.splits.values()) or sum(self.splits.values()) > 1 + 1e-9:
            yield f"splits: shares must lie in (0, 1] and add up to at most 1, found {dict(self.splits)}"


@with_config(STRICT)
@dataclass(frozen=True)
class Compression:
    """What every compressing stage shares; ``ratio`` = bytes kept / 16-bit bytes of the same linears.

    ``tie`` gives the linears that read the same input (q/k/v, gate/up) one common rank.
    """

    ratio: float
    format: Literal["float16", "pifa", "remap", "int8"]
    align: int
    tie: bool
    exclude: list[str]
    seed: int

    def problems(self) -> Iterator[str]:
        if not 0 < self.ratio <= 1:
            yield f"ratio: must lie in (0, 1], found {self.ratio}; it is the fraction of bytes KEPT"
        yield from _at_least(1, align=self.align)
        if not 0 <= self.seed < 2**63:
            yield f"seed: must lie in [0, 2**63), found {self.seed}"


@with_config(STRICT)
@dataclass(frozen=True)
class Runtime:
    """The machine: never part of a result. ``workers`` layers at once, ``retries`` per layer."""

    engine: Literal["auto", "inline", "prefect", "dask"]
    workers: int
    retries: int
    device: Literal["auto", "cpu", "cuda"]

    def problems(self) -> Iterator[str]:
        yield from _at_least(1, workers=self.workers)
        yield from _at_least(0, retries=self.retries)


@with_config(STRICT)
@dataclass(frozen=True)
class Prepare:
    """dtype of the weights in the prepared file, and the dtype plain ``from_pretrained`` computes in."""

    stored_dtype: Literal["float16", "bfloat16", "float32"]
    load_dtype: Literal["float32", "bfloat16", "float16"]


@with_config(STRICT)
@dataclass(frozen=True)
class Calibrate:
    """``seq_len`` tokens per window, and the number of windows of each split."""

    seq_len: int
    calibration_windows: int
    validation_windows: int
    test_windows: int

    def problems(self) -> Iterator[str]:
        yield from _at_least(2, seq_len=self.seq_len)
        yield from _at_least(
            1,
            calibration_windows=self.calibration_windows,
            validation_windows=self.validation_windows,
            test_windows=self.test_windows,
        )


@with_config(STRICT)
@dataclass(frozen=True)
class Capture:
    """Gradient Grams: the first ``gradient_windows`` windows of ``gradient_seq_len`` tokens. Damping is relative."""

    gradient_windows: int
    gradient_seq_len: int
    batch_size: int
    damping: float
    max_damping: float

    def problems(self) -> Iterator[str]:
        yield from _at_least(1, gradient_windows=self.gradient_windows, batch_size=self.batch_size)
        yield from _at_least(2, gradient_seq_len=self.gradient_seq_len)
        if not 0 < self.damping <= self.max_damping <= 1:
            yield f"damping: needs 0 < damping <= max_damping <= 1, found {self.damping} and {self.max_damping}"


@with_config(STRICT)
@dataclass(frozen=True)
class TrainRanks:
    """How ranks are chosen. Lengths in tokens; ``learning_rate`` and ``width`` in units of the full rank.

    ``file``: read by the method of that name, see pipeline/rank_files.py; ``file_sha256`` of it, or null.
    ``objective``: what gates and dobi minimise, the text's cross-entropy or the divergence from the dense model.
    """

    method: Literal["gates", "dobi", "uniform", "svd_llm_v2", "fisher", "file"]
    file: Source | None
    file_sha256: str | None
    objective: Literal["cross_entropy", "kl"]
    whitening: Literal["input", "two_sided"]
    steps: int
    seq_len: int
    batch_size: int
    learning_rate: float
    width: float
    beta: float
    taylor_terms: int
    taylor_threshold: float

    def problems(self) -> Iterator[str]:
        yield from _at_least(1, steps=self.steps, batch_size=self.batch_size, taylor_terms=self.taylor_terms)
        yield from _at_least(2, seq_len=self.seq_len)
        yield from _positive(
            learning_rate=self.learning_rate, width=self.width, beta=self.beta, taylor_threshold=self.taylor_threshold
        )
        yield from _sha_problem(self.file_sha256, "file_sha256")
        if self.method == "file" and self.file is None:
            yield "file: null; method file needs the path of a ranks.json or of a rank file of Dobi-SVD"
        if self.taylor_threshold >= 1:
            yield f"taylor_threshold: a relative gap, must lie in (0, 1), found {self.taylor_threshold}"


@with_config(STRICT)
@dataclass(frozen=True)
class Refinement:
    """Training of all factors together, ``batch_size`` calibration windows cut to ``seq_len`` tokens per step.

    ``steps`` 0: none. ``kl_weight``: 1 learns from the dense model's predictions alone, 0 from the text alone.
    ``patience``: validations in a row without a better one that end it. ``checkpointing``: less memory, more time.
    """

    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    kl_weight: float
    validate_every: int
    patience: int
    checkpointing: bool

    def problems(self) -> Iterator[str]:
        yield from _at_least(0, steps=self.steps)
        yield from _at_least(1, batch_size=self.batch_size, validate_every=self.validate_every, patience=self.patience)
        yield from _at_least(2, seq_len=self.seq_len)
        yield from _positive(learning_rate=self.learning_rate)
        if not 0 <= self.kl_weight <= 1:
            yield f"kl_weight: must lie in [0, 1], found {self.kl_weight}"


@with_config(STRICT)
@dataclass(frozen=True)
class UpdateWeights:
    """The metric whose optimum the factors are, or Dobi-SVD's IPCA over ``ipca_windows`` calibration windows."""

    method: Literal["two_sided", "closed_form", "svd", "asvd", "svd_llm", "svd_llm_v2", "ipca"]
    ipca: Literal["incremental", "exact"]
    ipca_windows: int
    refinement: Refinement

    def problems(self) -> Iterator[str]:
        yield from _at_least(1, ipca_windows=self.ipca_windows)
        yield from (f"refinement.{problem}" for problem in self.refinement.problems())


@with_config(STRICT)
@dataclass(frozen=True)
class Remap:
    """Storage format of the factors (``same`` = compression.format) and the size of a checkpoint's shards."""

    format: Literal["same", "float16", "pifa", "remap", "int8"]
    max_shard_size: Size


@with_config(STRICT)
@dataclass(frozen=True)
class Baseline:
    """Round-to-nearest baselines; ``group_size`` inputs share a scale in int4."""

    quantization: list[Literal["int8", "int4"]]
    group_size: int

    def problems(self) -> Iterator[str]:
        yield from _at_least(1, group_size=self.group_size)


@with_config(STRICT)
@dataclass(frozen=True)
class Evaluate:
    """The protocol shared by ``baseline`` and ``evaluate``; lengths in tokens."""

    batch_size: int
    tasks: dict[str, str]
    task_limit: int | None
    prompt: str
    new_tokens: int
    speed_prefill_tokens: int
    speed_decode_tokens: int
    speed_repeats: int

    def problems(self) -> Iterator[str]:
        yield from _at_least(
            1,
            batch_size=self.batch_size,
            new_tokens=self.new_tokens,
            speed_prefill_tokens=self.speed_prefill_tokens,
            speed_decode_tokens=self.speed_decode_tokens,
            speed_repeats=self.speed_repeats,
            **({} if self.task_limit is None else {"task_limit": self.task_limit}),
        )
        if not self.prompt:
            yield "prompt: empty; give the generation sample a beginning"


@with_config(STRICT)
@dataclass(frozen=True)
class Report:
    """``title`` of the report."""

    title: str


def _at_least(minimum: int, **values: float) -> Iterator[str]:
    for key, value in values.items():
        if value < minimum:
            yield f"{key}: must be at least {minimum}, found {value}"


def _positive(**values: float) -> Iterator[str]:
    for key, value in values.items():
        if not 0 < value < inf:
            yield f"{key}: must be positive and finite, found {value}"


def _sha_problem(sha256: str | None, key: str = "sha256") -> Iterator[str]:
    if sha256 is not None and (len(sha256) != 64 or set(sha256) - set("0123456789abcdef")):
        yield f"{key}: must be 64 lower-case hexadecimal digits or null, found {sha256!r}"
