"""What every stage does for a model of some shape: bytes that it writes and holds, operations that it takes.

Notation: a block's linears are W (out m, in n), k = min(m, n); T tokens, V the vocabulary, H the width. Ranks are those
of `uniform`, which the sums of others come close to. Every term says what it is.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from pipeline.steps.plan_shape import Plan

TOKENIZER = 72  # bytes of the tokenizer's files per entry of the vocabulary
HEADER = 130  # bytes of a safetensors header per tensor
WINDOWS = 2.5  # bytes of a stored token: 32-bit integers, compressed
SAID = 220  # bytes that json files say about a matrix
EIGEN, VALUES = 25, 8  # multiplications of a symmetric eigenproblem of size n, with and without vectors, over n³
PIVOTED = 40  # of a pivoted QR of rank r and m rows over m r²: ten times what it counts, for it waits for memory
SVDS = 6.3  # a step of `dobi` against one of `gates`, measured


class Work(NamedTuple):
    """What a stage does: bytes under artifacts/ and reports/, bytes in memory at once, multiplications, bytes moved."""

    disk: float = 0
    device: float = 0
    """Of memory, where the products are computed."""
    host: float = 0
    """Of memory, on the host in any case."""
    loaded: float = 0
    """Of ``device``, what is read through the host's memory at once."""
    single: float = 0
    """Operations in float32: a multiplication and an addition are two."""
    double: float = 0
    moved: float = 0
    """Bytes read from memory one after the other, by decoding and by the optimizer."""


def prepare(plan: Plan) -> Work:
    """The dense checkpoint."""
    shape = plan.shape
    weights = shape.parameters * plan.stored
    files = TOKENIZER * shape.vocabulary + HEADER * 9 * shape.layers
    # the model as read, and as safetensors copies it to write it
    return Work(disk=weights + files, host=2 * weights)


def calibrate(plan: Plan) -> Work:
    """Token windows."""
    settings = plan.params.calibrate
    windows = settings.calibration_windows + settings.refinement_windows
    tokens = windows * settings.seq_len + plan.validation_tokens + plan.test_tokens
    return Work(disk=WINDOWS * tokens + 4_000, host=1e8)  # a file's own header; the texts and their tokens


def capture(plan: Plan) -> Work:
    """Grams of what enters every linear, of the gradients that leave it, and the full-rank factors made from both."""
    shape, settings, calibration = plan.shape, plan.params.capture, plan.params.calibrate
    seq_len, graded_len = calibration.seq_len, min(settings.gradient_seq_len, calibration.seq_len)
    tokens = calibration.calibration_windows * seq_len
    graded = min(settings.gradient_windows, calibration.calibration_windows) * graded_len
    hidden, number, layers, linears = shape.hidden, plan.loaded, shape.layers, shape.linears
    entering, leaving = sum(n * n for n in shape.inputs), sum(m * m for m, _ in linears)
    spectra = 2 * 8 * sum(min(m, n) for m, n in linears)  # both, float64
    block = (
        4 * (entering + leaving) / 2  # triangles of the Grams, float32
        + 16 * sum(shape.inputs)  # means, and means of sizes, float64
        + 4 * shape.full  # factors, float32
        + 2 * spectra  # beside the factors, and in a file for all blocks
        + HEADER * 60
    )
    disk = layers * block + number * tokens * hidden  # and what leaves the last block
    batch = settings.batch_size
    walking = number * batch * seq_len * (4 * hidden + 3 * shape.intermediate) + 8 * entering
    grading = 2 * number * batch * graded_len * (8 * hidden + 4 * shape.intermediate) + 8 * leaving
    scoring = 4 * 4 * graded_len * shape.vocabulary  # logits of one window, their exponentials and gradients
    m, n = max(linears, key=lambda shape: shape[0] * shape[1])
    # of each worker: both Grams and their copies, the eigenproblem, W and what it is multiplied to, float64
    solving = plan.params.runtime.workers * 8 * (2 * (m * m + n * n) + 6 * min(m, n) ** 2 + 3 * m * n)
    single = (
        plan.forward(tokens, seq_len, layers * shape.weights, head=False)
        + 2 * tokens * layers * syrk(shape.inputs)
        + 3 * plan.forward(graded, graded_len, layers * shape.weights)  # again, and the gradient of the inputs alone
        - plan.forward(graded, graded_len, layers * shape.weights, head=False)
        + 2 * graded * layers * syrk(m for m, _ in linears)
    )
    return Work(
        disk=disk,
        # head and one block, read and in place
        loaded=number * (shape.head + 2 * shape.weights),
        device=number * (shape.head + 2 * shape.weights) + max(walking, grading, scoring, solving),
        # hidden states that enter and leave; those of the graded windows, their gradient, the one below; a block's file
        host=number * hidden * (2 * tokens + 3 * graded) + 2 * block,
        single=single,
        double=layers * sum(decomposition(m, n) for m, n in linears),
    )


def syrk(widths: Iterable[int]) -> float:
    """Σ n² of Grams, of which wide ones are computed by half."""
    return sum(n * n / (2 if n >= 1024 else 1) for n in widths)


def decomposition(m: int, n: int) -> float:
    """Operations of one linear's two-sided factors and its input spectrum."""
    k = min(m, n)
    roots = (EIGEN + 4) * k**3  # the smaller Gram's root and its inverse
    problems = (EIGEN + VALUES) * k**3  # of the product, and of the input spectrum
    return roots + problems + 8 * m * n * (m + n)  # products with both Grams


def train_ranks(plan: Plan) -> Work:
    """Gates trained on the full-rank factors, and every candidate measured on the validation windows."""
    shape, settings, number = plan.shape, plan.params.train_ranks, plan.loaded
    disk = SAID * 0.7 * 7 * shape.layers
    model, full = number * shape.parameters, number * shape.layers * shape.full
    if settings.method not in ("gates", "dobi"):
        return Work(disk=disk, device=model, loaded=model)
    tokens = settings.batch_size * settings.seq_len
    # of each token: the inner values of every pair before and after its gate, attention, the MLP and the norms
    kept = 2 * sum(min(m, n) for m, n in shape.linears) + 3 * shape.intermediate + 2 * shape.queries + 6 * shape.hidden
    active = number * tokens * shape.layers * kept + 4 * 4 * tokens * shape.vocabulary
    measured = 4 * 3 * plan.params.calibrate.seq_len * shape.vocabulary  # logits of a validation window
    step = 2 * plan.forward(tokens, settings.seq_len, plan.kept)  # forward, and back to the inputs
    if settings.objective == "kl":
        step += plan.forward(tokens, settings.seq_len, shape.layers * shape.weights)
    step *= SVDS if settings.method == "dobi" else 1
    candidates = 3 * plan.forward(plan.validation_tokens, plan.params.calibrate.seq_len, plan.kept)
    return Work(
        disk=disk,
        loaded=model,
        device=model + full + max(active, measured),
        host=4 * shape.full,  # a block's file
        single=settings.steps * step + candidates,
    )


def update_weights(plan: Plan) -> Work:
    """The factors at their ranks, then all of them trained together."""
    shape, settings, number = plan.shape, plan.params.update_weights.refinement, plan.loaded
    disk = 4 * plan.factors + SAID * 7 * shape.layers
    rank = max((rank or 0 for rank in plan.ranks), default=0)
    double = shape.layers * sum(2 * m * n * (n + rank) for m, n in shape.linears)  # the output error of each
    if not settings.steps:
        return Work(
            disk=disk, device=number * shape.head, host=4 * (shape.full + plan.factors / shape.layers), double=double
        )
    tokens, calibration = settings.batch_size * settings.seq_len, plan.params.calibrate
    # of each token: what both factors read, attention, the MLP and the norms
    kept = (
        sum(shape.inputs)
        + sum(filter(None, plan.ranks))
        + 3 * shape.intermediate
        + 2 * shape.queries
        + 4 * shape.hidden
    )
    active = number * tokens * (shape.hidden if settings.checkpointing else shape.layers * kept)
    passes = 4 if settings.checkpointing else 3  # forward, and back to inputs and factors; with the activations again
    head = 3 * 2 * tokens * shape.vocabulary * shape.hidden  # the dense model's predictions, ours, and back
    step = passes * plan.forward(tokens, settings.seq_len, plan.kept, head=False) + head
    measurements = 1 + settings.steps // settings.validate_every
    teacher = number * shape.parameters if calibration.refinement_windows else 0
    return Work(
        disk=disk,
        # the dense model where more text teaches; the model without what factors replace; each factor, its gradient
        # and AdamW's two moments, float32
        loaded=number * shape.parameters,
        device=teacher
        + number * (shape.parameters - shape.layers * shape.weights + plan.kept - plan.factors)
        + 4 * 4 * plan.factors
        + max(active, 4 * 3 * calibration.seq_len * shape.vocabulary),
        # what left the dense model's last block; a snapshot's copy of one part
        host=number * calibration.calibration_windows * settings.seq_len * shape.hidden + 4 * plan.factors,
        single=settings.steps * step
        + measurements * plan.forward(plan.validation_tokens, calibration.seq_len, plan.kept),
        double=double,
        moved=settings.steps * 7 * 4 * plan.factors,  # the optimizer reads four and writes three numbers
    )


def remap(plan: Plan) -> Work:
    """The compressed checkpoint."""
    shape = plan.shape
    others = plan.stored * (shape.parameters - shape.layers * shape.weights)
    disk = plan.packed + others + TOKENIZER * shape.vocabulary + (HEADER * 3 + SAID + 100) * 7 * shape.layers
    pivoted = plan.params.compression.format.startswith("pifa")
    pairs = zip(shape.linears, plan.ranks, strict=True)
    double = shape.layers * sum(PIVOTED * max(m, n) * rank**2 for (m, n), rank in pairs if rank) * pivoted
    # all tensors, and the copy that safetensors writes; of each worker the factors of a block, in float64
    workers = 12 * plan.factors / shape.layers * plan.params.runtime.workers
    return Work(disk=disk, host=2 * (plan.packed + others) + workers, double=double)


def logits(plan: Plan) -> float:
    """Bytes of the logits of a batch of test windows, their exponentials and losses."""
    return 3 * 4 * plan.params.evaluate.batch_size * plan.params.calibrate.seq_len * plan.shape.vocabulary


def baseline(plan: Plan) -> Work:
    """The dense model and its quantizations on the test windows, one after the other."""
    shape, params = plan.shape, plan.params
    weights = plan.loaded * shape.parameters
    passes = 1 + len(params.baseline.quantization)
    forward = plan.forward(plan.test_tokens, params.calibrate.seq_len, shape.layers * shape.weights)
    moved = params.evaluate.new_tokens * weights  # the sample
    return Work(disk=2_000, device=weights + logits(plan), loaded=weights, single=passes * forward, moved=moved)


def compressed_bytes(plan: Plan, number: int) -> float:
    """Bytes of the compressed model in memory, in numbers of that many bytes."""
    others = plan.shape.parameters - plan.shape.layers * plan.shape.weights
    return number * others + plan.packed * number / 2


def evaluate(plan: Plan) -> Work:
    """The compressed model on the test windows."""
    weights = compressed_bytes(plan, plan.loaded)
    forward = plan.forward(plan.test_tokens, plan.params.calibrate.seq_len, plan.kept)
    return Work(
        disk=4_000,
        device=weights + logits(plan),
        loaded=weights,
        single=forward,
        moved=plan.params.evaluate.new_tokens * weights,
    )


def speed(plan: Plan) -> Work:
    """Both models side by side."""
    shape, settings = plan.shape, plan.params.speed
    dense, compressed = 4 * shape.parameters, compressed_bytes(plan, 4)  # where 16 bits are not multiplied
    turns = settings.repeats + 2  # one to warm up, one for the peak
    prefill = plan.forward(settings.prefill_tokens, settings.prefill_tokens, shape.layers * shape.weights + plan.kept)
    moved = turns * settings.decode_tokens * (dense + compressed)
    active = 4 * settings.prefill_tokens * (4 * shape.hidden + 3 * shape.intermediate)
    return Work(disk=2_000, device=dense + compressed + active, loaded=dense, single=turns * prefill, moved=moved)


STAGES: dict[str, Callable[[Plan], Work]] = {
    stage.__name__: stage
    for stage in (prepare, calibrate, capture, train_ranks, update_weights, remap, baseline, evaluate, speed)
}
