"""Every storage format, declared once in FORMATS: what it keeps of a matrix, in which tensors, in how many bytes.

A weight W is (out, in), its rank r <= n = min(out, in). A format puts together

    a rounded weight    W ≈ Q           integers of ``n_bits`` bits, a scale per row and group of g inputs: a Grid
    two factors         W ≈ L Rᵀ        L (out, r) and R (in, r), the first ``int8_rows`` rows of each in int8, with a
                                        scale per row of L and per direction of R; the others in 16 bit
    pivoted factors     W = [I; C] Rᵀ   r of W's own rows Rᵀ and the coefficients C (out - r, r) of the others, its rows
                                        put in ``order``: r (out + in - r) numbers
    both                W ≈ Q + L Rᵀ    factors of what rounding lost
    a coded weight      W ≈ r ⊙ Z ⊙ c   integers of any size, a step r per row and c per column; Z is entropy coded

Nothing of that is the dense weight in 16 bit. A format that combines them in another way is one more entry of FORMATS:
the values that params.yaml takes, the budget, the knapsack, packing, modules, checkpoints, the tables of the docs
(`python -m spectrim.formats.table`) and the tests all read it here.

The tensors, as they lie in memory and, with the linear's name before them, in a file:

    tensor        dtype         shape              of                  what it is
    weight        16-bit        (out, in)          dense               W
    weight        int8, uint8   (out, in/g, -)     a rounded weight    Q = weight · weight_scale; in uint8 packed, two's
    weight_scale  float16       (out, in/g)                            complement, the first input lowest
    weight_zero   int8          (out, in/g)        if asymmetric       zero point, in 2^(n_bits - 8) steps
    weight        float16, int8 (in, r)            factors             R: transposed, where elsewhere `weight` is not
    left          float16, int8 (out, r)                               L
                                (out - r, r)       pivoted factors     C
    X_scale       float32       (r,), (rows,)      factors in int8     R · weight_scale, L · left_scale by rows
    X_tail        float16       (-, r)                                 the rows of X after those in int8
    order         int32         (out,)             pivoted factors     W = [Rᵀ; C Rᵀ][order]
    left, right   float16, int8 (out, r), (in, r)  a rounded weight    L and R, which has a name of its own beside Q
    X_scale       float32       (out,), (r,)       and factors
    weight        uint8         (n,)               a coded weight      Z, see formats/coding.py
    weight_scale  float16       (out,)                                 r
    input_scale   float16       (in,)                                  c

All but a coded weight lie in memory as in the file. That one is decoded when it is loaded, to a byte a number.

``weight`` has the shape of the dense weight in no other format, so that a load that knows nothing of formats ends with
a size mismatch instead of random weights.

16-bit is the ``stored_dtype`` of a checkpoint: float16 or bfloat16. Factors are float16 in both, which rounds them
eight times as fine: their numbers are near each other's size, and the range of bfloat16 would be for nothing.

Numbers and words alone, no torch: whoever names or prices a format imports no kernel, and no kernel is in the keys of
what it computes. formats/packing.py makes the tensors, formats/kinds.py names the modules that multiply with them.

Sources: remap is Algorithm 3 of Dobi-SVD, Wang et al. 2025, arXiv:2502.02723; pifa is PIFA, Zhao et al. 2025,
arXiv:2501.19090; factors of what rounding lost: LQER, Zhang et al. 2024, arXiv:2402.02446.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

Shape = tuple[int, int]

WIDTHS = {None: 2, "int8": 1, "uint8": 1, "int32": 4, "float16": 2, "float32": 4}
"""Bytes of a number; None is the 16-bit dtype of the checkpoint."""

FACTOR = "float16"
"""Of factors in 16 bit."""

UNKNOWN = -1
"""In the place of a size that the content decides."""

GROUP = 64
"""Inputs that share a scale in int4 and int3 where the format's name has no other, and it divides their number."""


class Grid(NamedTuple):
    """Integers of ``n_bits`` bits, times a scale per row and ``group`` inputs; ``asymmetric``: less a zero point first.

    A group that does not divide the number of inputs, and None, is the whole row.
    """

    n_bits: int
    group: int | None = None
    asymmetric: bool = False

    def group_size(self, in_: int) -> int:
        """Inputs per scale of a row of ``in_``."""
        return self.group if self.group and in_ % self.group == 0 else in_

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest integer, one step further down than up."""
        return -(2 ** (self.n_bits - 1)), 2 ** (self.n_bits - 1) - 1

    @property
    def zero_steps(self) -> int:
        """Of what a zero point is a multiple: this part of a step, so that one byte reaches both ends."""
        return 2 ** (8 - self.n_bits)


class TensorLayout(NamedTuple):
    """Shape of one tensor, and the name of its dtype in torch; None for the 16-bit dtype of the checkpoint."""

    shape: tuple[int, ...]
    dtype: str | None


Layouts = dict[str, TensorLayout]


def no_rows(rows: int, shorter: int) -> int:
    """A factor in 16 bit."""
    return 0


def all_rows(rows: int, shorter: int) -> int:
    """A factor in int8."""
    return rows


def square_part(rows: int, shorter: int) -> int:
    """As many rows as the shorter side of the weight has: of a longer factor the others stay in 16 bit."""
    return shorter


@dataclass(frozen=True)
class StorageFormat:
    """One way to keep a matrix.

    ``keeps`` and ``error`` say in words what is kept and what that loses. ``grid``: of a rounded weight.
    ``int8_rows``: (rows of a factor, shorter side of the weight) -> how many of those rows are int8, where there are
    factors. ``pivoted``: the factors are rows of the weight and coefficients. ``coded``: its bytes are known when it is
    made.
    """

    keeps: str
    error: str
    grid: Grid | None = None
    int8_rows: Callable[[int, int], int] | None = None
    pivoted: bool = False
    coded: bool = False

    @property
    def has_factors(self) -> bool:
        """Whether the rank counts."""
        return self.int8_rows is not None

    @property
    def factored(self) -> bool:
        """Factors are all that is kept."""
        return self.has_factors and self.grid is None

    @property
    def in_int8(self) -> bool:
        """There are factors, in int8 in whole or in part."""
        return self.int8_rows not in (None, no_rows)

    @property
    def needs_gram(self) -> bool:
        """Packing takes the Gram of the inputs, against which integers of factors are rounded."""
        return self.factored and self.in_int8

    def tensors(self, out: int, in_: int, rank: int) -> Layouts:
        """Suffix -> layout of every tensor that holds W (out, in); those without factors ignore the rank."""
        if self.coded:
            scales = {"weight_scale": out, "input_scale": in_}
            stream = {"weight": TensorLayout((UNKNOWN,), "uint8")}
            return stream | {name: TensorLayout((size,), "float16") for name, size in scales.items()}
        if self.grid is not None:
            found = _rounded(self.grid, out, in_)
            return found | self._sides({"left": out, "right": in_}, out, in_, rank) if self.has_factors else found
        if not self.has_factors:
            return {"weight": TensorLayout((out, in_), None)}
        rows = {"weight": in_, "left": out - rank if self.pivoted else out}
        order: Layouts = {"order": TensorLayout((out,), "int32")} if self.pivoted else {}
        return self._sides(rows, out, in_, rank) | order

    def dtypes(self) -> dict[str, str | None]:
        """Suffix -> dtype of every tensor that a matrix of some shape has."""
        return {
            suffix: layout.dtype for shape in ((1, 2), (2, 1)) for suffix, layout in self.tensors(*shape, 1).items()
        }

    def n_bytes(self, out: int, in_: int, rank: float) -> int:
        """Bytes of all tensors. Those of a fractional rank, as training has it, lie between its neighbours'."""
        return _n_bytes(self, out, in_, rank)

    def multiply_adds(self, out: int, in_: int, rank: int) -> int:
        """Of the products of one token with W: those of the rounded or dense weight, and of the factors."""
        factors = rank * (out + in_ - rank * self.pivoted) if self.has_factors else 0
        return factors + (0 if self.factored else out * in_)

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], rank: int) -> Shape:
        """(out, in) of the weight whose tensors have ``shapes``, the inverse of ``tensors``; 0 where one is missing.

        Shapes that are not those of the format give a pair that is not that of the weight: compare with ``tensors``.
        """
        weight = shapes.get("weight", ())
        if self.coded:
            sizes = [prod(shapes.get(name, (0,))[:1]) for name in ("weight_scale", "input_scale")]
            return sizes[0], sizes[1]
        if not self.has_factors and self.grid is None and len(weight) == 2:
            return weight[0], weight[1]
        if self.grid is not None and len(weight) == 3:
            return weight[0], weight[1] * weight[2] * 8 // self.grid.n_bits
        out, in_ = (
            sum(shape[0] for key, shape in shapes.items() if shape and key in (side, f"{side}_tail"))
            for side in ("left", "weight")
        )
        return out + rank * self.pivoted, in_

    def _sides(self, rows: Mapping[str, int], out: int, in_: int, rank: int) -> Layouts:
        """The tensors of factors with ``rows`` each; scales of ``left`` are per row, of the other one per direction."""
        assert self.int8_rows is not None
        found: Layouts = {}
        for side, count in rows.items():
            if not self.in_int8:
                found[side] = TensorLayout((count, rank), FACTOR)
                continue
            head = self.int8_rows(count, min(out, in_))
            found[side] = TensorLayout((head, rank), "int8")
            found[f"{side}_scale"] = TensorLayout((head if side == "left" else rank,), "float32")
            if count > head:
                found[f"{side}_tail"] = TensorLayout((count - head, rank), FACTOR)
        return found


FORMATS: dict[str, StorageFormat] = {
    "float16": StorageFormat("two factors", "16-bit rounding", int8_rows=no_rows),
    "pifa": StorageFormat(
        "r of its rows, the others' coefficients", "16-bit rounding", int8_rows=no_rows, pivoted=True
    ),
    "remap": StorageFormat("factors in 8 and 16 bit", "s/2 per number", int8_rows=square_part),
    "int8": StorageFormat("factors in 8 bit", "s/2 per number", int8_rows=all_rows),
    "pifa_int8": StorageFormat("as pifa, in 8 bit", "s/2 per number", int8_rows=all_rows, pivoted=True),
    "dense": StorageFormat("the weight", "none"),
    "coded": StorageFormat("the weight, rounded, entropy coded", "minimised in both Grams' metric", coded=True),
    "dense_int8": StorageFormat("the weight, rounded", "minimised in the Gram's metric", grid=Grid(8)),
    **{
        f"dense_int{n_bits}{suffix}{'_asym' * asymmetric}": StorageFormat(
            f"the weight, rounded in groups of {group}{' with zero points' * asymmetric}",
            "minimised in the Gram's metric",
            grid=Grid(n_bits, group, asymmetric),
        )
        for asymmetric in (False, True)
        for n_bits in (4, 3)
        for suffix, group in {"": GROUP, "_g32": 32, "_g128": 128}.items()
    },
    **{
        f"int{grid.n_bits}_residual{'_asym' * grid.asymmetric}": StorageFormat(
            f"dense_int{grid.n_bits}{'_asym' * grid.asymmetric}, int8 factors of the rest",
            "what the rank leaves of it",
            grid=grid,
            int8_rows=all_rows,
        )
        for grid in (Grid(8), Grid(4, GROUP), Grid(3, GROUP), Grid(4, GROUP, True), Grid(3, GROUP, True))
    },
}
"""Name, as it stands in params.yaml and in a checkpoint's files -> format."""


def named(wanted: Callable[[StorageFormat], bool]) -> Iterable[str]:
    """The names of the formats that are as ``wanted``, in the order of FORMATS."""
    return (name for name, format in FORMATS.items() if wanted(format))


@lru_cache(maxsize=2**16)  # a knapsack asks for every rank of a few shapes, matrix after matrix
def _n_bytes(format: StorageFormat, out: int, in_: int, rank: float) -> int:
    layouts = format.tensors(out, in_, rank)  # type: ignore[arg-type] # a shape may be fractional here
    return int(sum(WIDTHS[dtype] * prod(shape) for shape, dtype in layouts.values()))


def _rounded(grid: Grid, out: int, in_: int) -> Layouts:
    size = grid.group_size(in_)
    weight = (out, in_ // size, size * grid.n_bits // 8)
    zero = {"weight_zero": TensorLayout((out, in_ // size), "int8")} if grid.asymmetric else {}
    return {
        "weight": TensorLayout(weight, "int8" if grid.n_bits == 8 else "uint8"),
        "weight_scale": TensorLayout((out, in_ // size), "float16"),
        **zero,
    }
