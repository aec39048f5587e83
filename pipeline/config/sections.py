"""The sections of params.yaml: one frozen dataclass each, its keys with their units, and what each key takes.

What two keys must not contradict stands in pipeline/config/params.py.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, with_config

from pipeline.config.values import (
    Alternative,
    AtLeast0,
    AtLeast1,
    AtLeast2,
    FactoredOrSame,
    Kept,
    MainFormat,
    NonEmpty,
    Positive,
    RankMethodName,
    Sha256,
    Share,
    Size,
    Source,
    Splits,
    UpdateMethodName,
    installed,
)

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
SPLITS = ("calibration", "validation", "test")


@with_config(STRICT)
@dataclass(frozen=True)
class Model:
    """The model to compress. ``source``: see pipeline/data/fetching.py; ``sha256`` of the wheel or file, or null."""

    source: Source
    sha256: Sha256 | None


@with_config(STRICT)
@dataclass(frozen=True)
class Text:
    """A text. ``splits`` maps calibration, validation, test to the share of documents each gets (sum at most 1).

    ``column`` of its rows, where it has rows. ``template``: ``none``, and that holds a string; ``chat``, and it holds a
    conversation, a list of {role, content} messages, which the tokenizer's chat template makes tokens of.
    """

    source: Source
    sha256: Sha256 | None
    column: str
    template: Literal["none", "chat"]
    splits: Splits


@with_config(STRICT)
@dataclass(frozen=True)
class Compression:
    """What every compressing stage shares; ``ratio`` = bytes kept in the file / 16-bit bytes of the same linears.

    ``memory_ratio`` bounds the bytes in memory likewise, null: they are free. Those of coded weights are more than in
    the file, all others' the same. ``format`` is that of the factors, or of all weights, coded; ``alternatives`` are
    the formats that a matrix may be stored in instead.
    ``tie`` gives the linears that read the same input (q/k/v, gate/up) one common rank.
    """

    ratio: Kept
    memory_ratio: Kept | None
    format: MainFormat
    alternatives: list[Alternative]
    align: AtLeast1
    tie: bool
    exclude: list[str]
    seed: Annotated[int, Field(ge=0, lt=2**63)]

    @property
    def kept(self) -> float:
        """The ratio that the bytes in the file are bounded by where they are those in memory."""
        return min(self.ratio, self.memory_ratio or self.ratio)


@with_config(STRICT)
@dataclass(frozen=True)
class Runtime:
    """The machine: never part of a result. ``workers`` layers at once, ``retries`` per layer."""

    engine: Literal["auto", "inline", "prefect", "dask"]
    workers: AtLeast1
    retries: AtLeast0
    device: Literal["auto", "cpu", "cuda"]


@with_config(STRICT)
@dataclass(frozen=True)
class Prepare:
    """dtype of the weights in the prepared file, and the dtype plain ``from_pretrained`` computes in.

    ``perturb``: standard deviation of the noise that is added to the linears' weights, in 4-bit steps of their groups.
    """

    stored_dtype: Literal["float16", "bfloat16", "float32"]
    load_dtype: Literal["float32", "bfloat16", "float16"]
    perturb: Annotated[float, Field(ge=0, le=10)]


@with_config(STRICT)
@dataclass(frozen=True)
class Calibrate:
    """``seq_len`` tokens per window, and the number of windows of each split.

    ``bos``: whether a window, a prompt and a task's question begin with the tokenizer's BOS token. ``auto``: where it
    begins a text, or its chat template a conversation, with one. It takes the first of a window's places.
    ``refinement_windows``: beside the calibration windows, for refinement to learn from; `capture` does not read them.
    """

    seq_len: AtLeast2
    bos: Literal["auto", "always", "never"]
    calibration_windows: AtLeast1
    refinement_windows: AtLeast0
    validation_windows: AtLeast1
    test_windows: AtLeast1


@with_config(STRICT)
@dataclass(frozen=True)
class Capture:
    """Gradient Grams: the first ``gradient_windows`` windows of ``gradient_seq_len`` tokens. Damping is relative.

    ``walk``: block by block, with one block in memory, or through the whole model; auto: as `prepare` found possible.
    """

    walk: Literal["auto", "blocks", "whole"]
    gradient_windows: AtLeast1
    gradient_seq_len: AtLeast2
    batch_size: AtLeast1
    damping: Positive
    max_damping: Annotated[float, Field(gt=0, le=1)]


@with_config(STRICT)
@dataclass(frozen=True)
class TrainRanks:
    """How ranks are chosen. Lengths in tokens; ``learning_rate`` and ``width`` in units of the full rank.

    ``file``: read by the method of that name, see pipeline/steps/rank_files.py; ``file_sha256`` of it, or null.
    ``objective``: what gates and dobi minimise, the text's cross-entropy or the divergence from the dense model.
    ``keep``: of gates and dobi, the ranks that are ``best`` on the validation windows, or the ``trained`` ones anyway.
    ``row_dampings``: of coded weights, added to the diagonals of the gradients' Grams, relative to their means.
    """

    method: RankMethodName
    file: NonEmpty | None
    file_sha256: Sha256 | None
    objective: Literal["cross_entropy", "kl"]
    keep: Literal["best", "trained"]
    whitening: Literal["input", "two_sided"]
    steps: AtLeast1
    seq_len: AtLeast2
    batch_size: AtLeast1
    learning_rate: Positive
    width: Positive
    beta: Positive
    taylor_terms: AtLeast1
    taylor_threshold: Annotated[float, Field(gt=0, lt=1)]
    row_dampings: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]


@with_config(STRICT)
@dataclass(frozen=True)
class Refinement:
    """Training of all that is stored together, ``batch_size`` calibration windows cut to ``seq_len`` tokens per step.

    Rates: ``learning_rate`` of factors, ``scale_learning_rate`` of scales relative to their size,
    ``vector_learning_rate`` of norms and biases (0: they stay).
    ``steps`` 0: none. ``kl_weight``: 1 learns from the dense model's predictions alone, 0 from the text alone.
    ``patience``: validations in a row without a better one that end it. ``checkpointing``: less memory, more time.
    """

    steps: AtLeast0
    batch_size: AtLeast1
    seq_len: AtLeast2
    learning_rate: Positive
    scale_learning_rate: Positive
    vector_learning_rate: Annotated[float, Field(ge=0)]
    kl_weight: Annotated[float, Field(ge=0, le=1)]
    validate_every: AtLeast1
    patience: AtLeast1
    checkpointing: bool


@with_config(STRICT)
@dataclass(frozen=True)
class Anchor:
    """Inputs from behind the compressed blocks.

    ``alpha``: share of the original outputs in the targets; 0: not anchored. ``damping``: pull
    towards the original weight, relative to the mean diagonal of the inputs' Gram.
    """

    alpha: Share
    damping: Positive


@with_config(STRICT)
@dataclass(frozen=True)
class Other:
    """One entry of ``variants``: what stands in the place of ``shrinkage`` and ``anchor.alpha``, where it is given."""

    shrinkage: Share | None = None
    alpha: Share | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class BlockRefinement:
    """Training of each block's factors by itself, one window per step. ``steps`` 0: none."""

    steps: AtLeast0
    learning_rate: Positive


@with_config(STRICT)
@dataclass(frozen=True)
class UpdateWeights:
    """The metric whose optimum the factors are, or Dobi-SVD's IPCA; how they are fitted and trained from there.

    ``windows``: calibration windows that `ipca`, ``anchor`` and ``block_refinement`` walk through the blocks.
    ``shrinkage``: share of the identity in the Grams. ``variants``: other values by name, among which and the values
    as set the validation windows choose.
    """

    method: UpdateMethodName
    windows: AtLeast1
    shrinkage: Share
    anchor: Anchor
    ipca: Literal["incremental", "exact"]
    block_refinement: BlockRefinement
    refinement: Refinement
    variants: dict[NonEmpty, Other]


@with_config(STRICT)
@dataclass(frozen=True)
class Remap:
    """Storage format of the factors (``same`` = compression.format) and the size of a checkpoint's shards."""

    format: FactoredOrSame
    max_shard_size: Size


@with_config(STRICT)
@dataclass(frozen=True)
class Baseline:
    """Baselines: int8 and int4 to nearest, int4 by GPTQ, a library's; ``group_size`` inputs share a scale in int4."""

    quantization: Annotated[
        list[Literal["int8", "int4", "gptq_int4", "gptq_int4_asym", "bitsandbytes_nf4", "bitsandbytes_int8"]],
        AfterValidator(installed),
    ]
    group_size: AtLeast1


@with_config(STRICT)
@dataclass(frozen=True)
class Evaluate:
    """The protocol shared by ``baseline`` and ``evaluate``; lengths in tokens."""

    batch_size: AtLeast1
    tasks: dict[str, str]
    task_limit: AtLeast1 | None
    prompt: NonEmpty
    new_tokens: AtLeast1


@with_config(STRICT)
@dataclass(frozen=True)
class Speed:
    """The speed test: lengths in tokens, and the dtype that the models run in.

    ``auto``: the checkpoint's 16-bit dtype on a GPU, bfloat16 on a processor that multiplies it, else for each model
    the faster one of float32 and bfloat16.
    """

    dtype: Literal["auto", "float16", "bfloat16", "float32"]
    prefill_tokens: AtLeast1
    decode_tokens: AtLeast1
    repeats: AtLeast1


@with_config(STRICT)
@dataclass(frozen=True)
class Report:
    """``title`` of the report."""

    title: str
