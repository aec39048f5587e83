"""The integers of a coded weight in the file, all of it little endian:

    bytes     type     what it is
    8         bytes    BLAKE2b of all that follows, 8 bytes of it
    8         uint64   n, numbers of the weight: out · in
    4         uint32   k, those of them beyond [−127, 127]
    3 · 4     uint32   bytes of each of the next three parts
    -         pco      the classes of the rows, (out,) uint8; no bytes where the weight has no classes
    -         pco      the classes of the columns, (in,) uint8; likewise
    -         pco      the numbers, (n,) int8, 0 in the place of one that is beyond
    k · 4     int32    the places of those, row · in + column, each greater than the one before
    k · 4     int32    those numbers themselves

A part of pco is a file of the pco format (github.com/pcodec/pcodec): an asymmetric numeral system with a table for
every ``CHUNK`` numbers. Numbers come in blocks, each of the rows of one class and the columns of one class: in rising
order of the sum of the two classes, then of the rows' class, and row by row in a block. So numbers of one size are
neighbours, and each size has a table of its own. Without classes they come row by row. The classes are log₂ of the root
mean square of a row or column, ``PER_BIT`` of them a bit; a decoder takes them as they are.
"""

import hashlib
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, standalone
from torch import Tensor

from spectrim.errors import CheckpointError

Number = TypeVar("Number", np.int8, np.uint8)

LARGEST = 127
"""What a byte holds, on either side of zero."""

BEYOND = 8
"""Bytes of a number that it does not hold."""

PER_BIT = 4
SMALLEST = 4  # bits below 1: a row with one number in 256

CHUNK = 2**16
LEVEL = 10  # of 12: a table has up to 2^LEVEL entries, more than there are different numbers

DIGEST = 8
FIELDS = struct.Struct("<QIIII")
HEAD = DIGEST + FIELDS.size
"""Bytes before the first part."""

CONFIG = ChunkConfig(
    compression_level=LEVEL,
    mode_spec=ModeSpec.classic(),
    delta_spec=DeltaSpec.no_op(),
    paging_spec=PagingSpec.equal_pages_up_to(CHUNK),
    enable_8_bit=True,
)


class Integers(NamedTuple):
    """Z (out, in): ``values`` int8, 0 at the ``places`` (k,) int32 of the numbers ``beyond`` (k,) int32."""

    values: Tensor
    places: Tensor
    beyond: Tensor


def split(numbers: Tensor) -> Integers:
    """Z (out, in) int32 -> what a byte holds of it, and the rest."""
    outside = numbers.abs() > LARGEST
    places = outside.flatten().nonzero().flatten().int()
    return Integers(numbers.masked_fill(outside, 0).to(torch.int8), places, numbers[outside].int())


def whole(integers: Integers) -> Tensor:
    """The inverse of ``split``."""
    values, places, beyond = integers
    return values.int().flatten().index_put((places.long(),), beyond).view(values.shape)


def encode(integers: Integers) -> Tensor:
    """Integers -> the code, uint8 (n,), on the CPU. Equal integers give equal bytes with one version of pcodec."""
    values, places, beyond = (part.detach().cpu().contiguous().numpy() for part in integers)
    rows, columns = _classes(values, 1), _classes(values, 0)
    ways = (
        [b"", b"", _packed(values.ravel())],
        [_packed(rows), _packed(columns), _packed(_in_blocks(values, rows, columns))],
    )
    parts = min(ways, key=lambda way: sum(map(len, way)))
    fields = FIELDS.pack(values.size, len(places), *map(len, parts))
    rest = fields + b"".join([*parts, *(part.astype("<i4").tobytes() for part in (places, beyond))])
    return torch.frombuffer(bytearray(_digest(rest) + rest), dtype=torch.uint8)


def decode(code: Tensor, out: int, in_: int) -> Integers:
    """The inverse of ``encode``, on the CPU.

    Raises:
        CheckpointError: it is no such code, or damaged, or not of a weight (out, in).
    """
    read = memoryview(code.cpu().contiguous().numpy().tobytes())
    count, n_beyond, *lengths = _fields(bytes(read[:HEAD]))
    if count != out * in_ or n_beyond > count:
        raise CheckpointError(f"code of {count} numbers, {n_beyond} of them large; the weight is ({out}, {in_})")
    ends = np.cumsum([HEAD, *lengths, 4 * n_beyond, 4 * n_beyond], dtype=np.int64).tolist()
    if ends[-1] != len(read) or _digest(read[DIGEST:]) != bytes(read[:DIGEST]):
        raise CheckpointError(f"damaged code: {len(read)} bytes that do not match its length or its hash")
    parts = [bytes(read[start:end]) for start, end in pairwise(ends)]
    numbers = _unpacked(parts[2], np.empty(count, np.int8))
    if parts[0]:
        rows, columns = (_unpacked(part, np.empty(n, np.uint8)) for part, n in zip(parts, (out, in_), strict=False))
        numbers = _from_blocks(numbers, rows, columns).ravel()
    places, beyond = (np.frombuffer(part, "<i4").astype(np.int32) for part in parts[3:])
    if n_beyond and not (
        places[0] >= 0 and places[-1] < count and (np.diff(places) > 0).all() and not numbers[places].any()
    ):
        raise CheckpointError("damaged code: the places of large numbers are not in order")
    return Integers(*(torch.from_numpy(part) for part in (numbers.reshape(out, in_), places, beyond)))


def content_size(head: bytes) -> int:
    """What the integers take in memory, from the first ``HEAD`` bytes of a code.

    Raises:
        CheckpointError: they are fewer.
    """
    count, n_beyond, *_ = _fields(head)
    return count + BEYOND * n_beyond


def _fields(head: bytes) -> tuple[int, ...]:
    if len(head) < HEAD:
        raise CheckpointError(f"damaged code: {len(head)} bytes; its head alone has {HEAD}")
    return FIELDS.unpack_from(head, DIGEST)


def _digest(rest: bytes | memoryview) -> bytes:
    return hashlib.blake2b(rest, digest_size=DIGEST).digest()


def _classes(values: NDArray[np.int8], axis: int) -> NDArray[np.uint8]:
    squares = np.square(values, dtype=np.float32).mean(axis=axis)
    return (PER_BIT * (np.log2(np.maximum(squares, 4.0**-SMALLEST)) / 2 + SMALLEST)).round().astype(np.uint8)


def _in_blocks(values: NDArray[np.int8], rows: NDArray[np.uint8], columns: NDArray[np.uint8]) -> NDArray[np.int8]:
    by_class = values[np.argsort(rows, kind="stable")][:, np.argsort(columns, kind="stable")]
    return np.concatenate([by_class[block].ravel() for block in _blocks(rows, columns)])


def _from_blocks(numbers: NDArray[np.int8], rows: NDArray[np.uint8], columns: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The inverse of ``_in_blocks``."""
    by_class, start = np.empty((len(rows), len(columns)), np.int8), 0
    for block in _blocks(rows, columns):
        part = by_class[block]
        part[:] = numbers[start : start + part.size].reshape(part.shape)
        start += part.size
    back = (np.argsort(np.argsort(classes, kind="stable")) for classes in (rows, columns))
    return by_class[next(back)][:, next(back)]


def _blocks(rows: NDArray[np.uint8], columns: NDArray[np.uint8]) -> Iterator[tuple[slice, slice]]:
    """The blocks in their order, where rows and columns are in the order of their classes."""
    row_slices, column_slices = _slices(rows), _slices(columns)
    pairs = ((row + column, row, column) for row in row_slices for column in column_slices)
    for _, row, column in sorted(pairs):
        yield row_slices[row], column_slices[column]


def _slices(classes: NDArray[np.uint8]) -> dict[int, slice]:
    """Class -> where its members lie once all are in order."""
    counts = np.bincount(classes)
    ends = counts.cumsum()
    return {int(at): slice(int(ends[at] - counts[at]), int(ends[at])) for at in counts.nonzero()[0]}


def _packed(numbers: NDArray[Number]) -> bytes:
    return standalone.simple_compress(numbers, CONFIG)


def _unpacked(part: bytes, into: NDArray[Number]) -> NDArray[Number]:
    try:
        progress = standalone.simple_decompress_into(part, into)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"damaged code ({error})") from None
    if not progress.finished or progress.n_processed != len(into):
        raise CheckpointError(f"damaged code: not the {len(into)} numbers that it is to have")
    return into
