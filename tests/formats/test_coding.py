"""The code of a weight's integers: the same integers come back, or one clear error."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pcodec import standalone

from spectrim.errors import CheckpointError
from spectrim.formats.coding import (
    CONFIG,
    DIGEST,
    FIELDS,
    HEAD,
    LARGEST,
    Integers,
    content_size,
    decode,
    encode,
    split,
    whole,
)
from spectrim.maths.entropy import entropy

FINE = settings(deadline=None, max_examples=60)
bits = st.floats(0.5, 9)


def drawn(seed: int, out: int, in_: int, n_bits: float, spread: float = 0.0) -> torch.Tensor:
    """Normal integers of about so many bits, of rows and columns whose sizes differ by a factor of about 2^spread."""
    generator = torch.Generator().manual_seed(seed)
    size = 2**n_bits / math.sqrt(2 * math.pi * math.e)
    rows, columns = (2 ** (spread * torch.randn(n, generator=generator)) for n in (out, in_))
    return (torch.randn(out, in_, generator=generator) * size * torch.outer(rows, columns)).round().int()


@FINE
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 40), bits, st.sampled_from([0.0, 2.0]))
def test_the_same_integers_come_back(seed: int, out: int, in_: int, n_bits: float, spread: float) -> None:
    numbers = drawn(seed, out, in_, n_bits, spread)
    code = encode(split(numbers))
    found = decode(code, out, in_)
    assert torch.equal(whole(found), numbers) and (found.beyond.abs() > LARGEST).all()
    assert content_size(code[:HEAD].numpy().tobytes()) == out * in_ + 8 * len(found.beyond)
    assert torch.equal(encode(found), code)


@pytest.mark.parametrize("n_bits", [2.5, 3.2, 4.3])
def test_the_code_is_hardly_longer_than_the_entropy(n_bits: float) -> None:
    numbers = drawn(0, 576, 1024, n_bits)
    shortest = entropy(numbers) / 8 * numbers.numel()
    assert shortest < len(encode(split(numbers))) < 1.006 * shortest
    packed = numbers.numel() * math.ceil(math.log2(int(numbers.max()) - int(numbers.min()) + 1)) / 8
    assert len(encode(split(numbers))) < 0.9 * packed


def test_rows_and_columns_of_different_sizes_have_tables_of_their_own() -> None:
    numbers = drawn(0, 576, 1024, 3.0, spread=0.5)
    assert len(encode(split(numbers))) < 0.97 * entropy(numbers) / 8 * numbers.numel()


def test_rows_and_columns_of_one_size_have_no_classes() -> None:
    code = encode(split(drawn(0, 64, 64, 3.0)))
    assert FIELDS.unpack(code[DIGEST:HEAD].numpy().tobytes())[2:4] == (0, 0)


@FINE
@given(st.data())
def test_a_damaged_code_is_one_clear_error(data: st.DataObject) -> None:
    numbers = drawn(data.draw(st.integers(0, 9)), 12, 30, data.draw(bits), data.draw(st.sampled_from([0.0, 2.0])))
    code = encode(split(numbers))
    kind, at = data.draw(st.sampled_from(["bit", "cut", "longer"])), data.draw(st.integers(0, len(code) - 1))
    broken = code.clone()
    if kind == "bit":
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        broken = broken[:at]
    else:
        broken = torch.cat([broken, broken[: at + 1]])
    with pytest.raises(CheckpointError, match="code"):
        decode(broken, 12, 30)


@FINE
@given(st.data())
def test_what_is_damaged_below_a_hash_that_matches_is_no_other_error(data: st.DataObject) -> None:
    code = encode(split(drawn(data.draw(st.integers(0, 9)), 12, 30, data.draw(bits), 2.0)))
    rest = bytearray(code[DIGEST:].numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        rest[data.draw(st.integers(0, len(rest) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(signed(bytes(rest)), 12, 30)
    except CheckpointError as error:
        assert "code" in str(error)
    else:
        assert found.values.shape == (12, 30)


def signed(rest: bytes) -> torch.Tensor:
    digest = hashlib.blake2b(rest, digest_size=DIGEST).digest()
    return torch.frombuffer(bytearray(digest + rest), dtype=torch.uint8)


def packed(*numbers: int, dtype: type = np.int8) -> bytes:
    return standalone.simple_compress(np.array(numbers, dtype), CONFIG)


def code_of(count: int, numbers: bytes, rest: bytes = b"", rows: bytes = b"", columns: bytes = b"") -> torch.Tensor:
    """A code as its writer would sign it, of whatever parts."""
    fields = FIELDS.pack(count, len(rest) // 8, len(rows), len(columns), len(numbers))
    return signed(fields + rows + columns + numbers + rest)


def four_bytes(*numbers: int) -> bytes:
    return np.array(numbers, "<i4").tobytes()


SIX = packed(0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (torch.zeros(7, dtype=torch.uint8), "7 bytes; its head alone has"),
        (torch.zeros(40, dtype=torch.uint8), r"code of 0 numbers, 0 of them large; the weight is \(2, 3\)"),
        (code_of(2**40, SIX), "code of 1099511627776 numbers"),
        (code_of(6, SIX, four_bytes(*range(14))), "7 of them large"),
        (code_of(6, packed(0, 1, 2, 3, 4)), "not the 6 numbers"),
        (code_of(6, packed(*range(100))), "not the 6 numbers"),
        (code_of(6, packed(*range(6), dtype=np.int16)), "damaged code"),
        (code_of(6, b"x" + SIX), "damaged code"),
        (code_of(6, SIX, rows=packed(0, 0, dtype=np.uint8)), "damaged code"),
        (code_of(6, SIX, rows=packed(0, 0, 0, dtype=np.uint8), columns=packed(0, 0, 0, dtype=np.uint8)), "not the 2"),
        (code_of(6, SIX, four_bytes(9, 500)), "places of large numbers"),
        (code_of(6, SIX, four_bytes(0, 0, 500, 500)), "places of large numbers"),
        (code_of(6, SIX, four_bytes(1, 500)), "places of large numbers"),
    ],
)
def test_a_hostile_code_is_refused(code: torch.Tensor, said: str) -> None:
    """Of another size, which is judged before anything is decoded, or with large numbers where none can be."""
    with pytest.raises(CheckpointError, match=said):
        decode(code, 2, 3)


def test_what_is_refused_would_be_a_code_without_its_fault() -> None:
    classes = {"rows": packed(0, 0, dtype=np.uint8), "columns": packed(9, 0, 0, dtype=np.uint8)}
    found = decode(code_of(6, SIX, four_bytes(1, 500), **classes), 2, 3)
    expected = Integers(torch.tensor([[4, 0, 1], [5, 2, 3]]), torch.tensor([1]), torch.tensor([500]))
    assert all(torch.equal(part.long(), other) for part, other in zip(found, expected, strict=True))
