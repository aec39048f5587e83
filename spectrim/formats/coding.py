"""The integers of a coded weight in the file: one zstd frame (RFC 8878) whose content, all of it little endian, is

    out · in times int8     Z row by row, 0 in the place of a number that is beyond [−127, 127]
    k times int32           the places of those numbers, row · in + column, each greater than the one before
    k times int32           the numbers themselves

The frame holds the size and a checksum of its content. Nothing repeats in such numbers, so that zstd comes down to its
Huffman code, with a table per 128 kB: 1.1 to 1.7 % longer than the entropy at 4 to 2.5 bits a number. An asymmetric
numeral system (constriction 0.5) has none of that, and decodes 20 to 30 million numbers a second on a core where zstd
decodes a thousand million: for a model of 7 billion weights minutes instead of seconds.
"""

from typing import NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor

from spectrim.errors import CheckpointError

LARGEST = 127
"""What a byte holds, on either side of zero."""

BEYOND = 8
"""Bytes of a number that it does not hold."""

HEAD = 18
"""Bytes that the header of a frame takes at most."""

PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,  # the shortest search, and matches too long to come up by chance
    min_match=7,
    hash_log=6,
    window_log=20,
    write_checksum=True,
    write_content_size=True,
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
    """Integers -> the frame, uint8 (n,), on the CPU. Equal integers give equal bytes with one version of zstd."""
    parts = [part.detach().cpu().contiguous().numpy() for part in integers]
    content = b"".join(part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes() for part in parts)
    frame = zstandard.ZstdCompressor(compression_params=PARAMETERS).compress(content)
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def decode(frame: Tensor, out: int, in_: int) -> Integers:
    """The inverse of ``encode``, on the CPU.

    Raises:
        CheckpointError: it is no such frame, or damaged, or not of a weight (out, in).
    """
    read, count = frame.cpu().contiguous().numpy().tobytes(), out * in_
    size = content_size(read)
    rest = size - count
    if rest % BEYOND or not 0 <= rest // BEYOND <= count:
        raise CheckpointError(f"code of {size} bytes; a ({out}, {in_}) weight has {count} and {BEYOND} a large number")
    try:
        content = zstandard.ZstdDecompressor().decompress(read, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"damaged code ({error})") from None
    values = np.frombuffer(content, np.int8, count).reshape(out, in_)
    places, beyond = np.frombuffer(content, "<i4", rest // 4, count).astype(np.int32).reshape(2, -1)
    if len(places) and not (
        places[0] >= 0 and places[-1] < count and (np.diff(places) > 0).all() and not values.flat[places].any()
    ):
        raise CheckpointError("damaged code: the places of large numbers are not in order")
    return Integers(*(torch.from_numpy(part.copy()) for part in (values, places, beyond)))


def content_size(head: bytes) -> int:
    """Bytes of the content, from the first bytes of a frame: what the integers take in memory.

    Raises:
        CheckpointError: it is no frame, or does not say.
    """
    try:
        size = zstandard.frame_content_size(head)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"damaged code ({error})") from None
    if size < 0:
        raise CheckpointError("damaged code: the frame does not say how long its content is")
    return size
