"""The module that multiplies with what a storage format keeps."""

from spectrim.formats.coded_linear import CodedLinear
from spectrim.formats.lowrank_linear import LowRankLinear
from spectrim.formats.quantized_linear import QuantizedLinear
from spectrim.formats.stored_linear import StoredLinear
from spectrim.maths.budget import Format

KINDS: tuple[type[StoredLinear], ...] = (LowRankLinear, QuantizedLinear, CodedLinear)


def kind_of(format: Format) -> type[StoredLinear]:
    """The class of KINDS for ``format``, which is not dense."""
    return next(kind for kind in KINDS if format in kind.formats)
