"""The code of a weight's integers: the same integers come back, or one clear error."""

import math

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import CheckpointError
from spectrim.formats.coding import HEAD, LARGEST, content_size, decode, encode, split, whole
from spectrim.maths.entropy import entropy

FINE = settings(deadline=None, max_examples=60)
bits = st.floats(0.5, 9)


def drawn(seed: int, out: int, in_: int, n_bits: float) -> torch.Tensor:
    """Normal integers of about so many bits."""
    size = 2**n_bits / math.sqrt(2 * math.pi * math.e)
    return (torch.randn(out, in_, generator=torch.Generator().manual_seed(seed)) * size).round().int()


@FINE
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 40), bits)
def test_the_same_integers_come_back(seed: int, out: int, in_: int, n_bits: float) -> None:
    numbers = drawn(seed, out, in_, n_bits)
    code = encode(split(numbers))
    found = decode(code, out, in_)
    assert torch.equal(whole(found), numbers) and (found.beyond.abs() > LARGEST).all()
    assert content_size(code[:HEAD].numpy().tobytes()) == out * in_ + 8 * len(found.beyond)
    assert torch.equal(encode(found), code)


@pytest.mark.parametrize("n_bits", [2.5, 3.2, 4.3])
def test_the_code_is_little_longer_than_the_entropy(n_bits: float) -> None:
    numbers = drawn(0, 576, 1024, n_bits)
    shortest = entropy(numbers) / 8 * numbers.numel()
    assert shortest < len(encode(split(numbers))) < 1.02 * shortest
    packed = numbers.numel() * math.ceil(math.log2(int(numbers.max()) - int(numbers.min()) + 1)) / 8
    assert len(encode(split(numbers))) < 0.9 * packed


@FINE
@given(st.data())
def test_a_damaged_code_is_one_clear_error(data: st.DataObject) -> None:
    numbers = drawn(data.draw(st.integers(0, 9)), 12, 30, data.draw(bits))
    code = encode(split(numbers))
    kind, at = data.draw(st.sampled_from(["bit", "cut", "longer"])), data.draw(st.integers(0, len(code) - 1))
    broken = code.clone()
    if kind == "bit":
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        broken = broken[:at]
    else:
        broken = torch.cat([broken, broken[: at + 1]])
    try:
        found = decode(broken, 12, 30)
    except CheckpointError as error:
        assert "code" in str(error)
    else:  # bits of the header that mean nothing
        assert kind == "bit" and torch.equal(encode(found), code)


def frame(content: bytes, **how: bool) -> torch.Tensor:
    made = zstandard.ZstdCompressor(**how).compress(content)
    return torch.frombuffer(bytearray(made), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (torch.zeros(40, dtype=torch.uint8), "damaged code"),
        (frame(bytes(5)), r"code of 5 bytes; a \(2, 3\) weight has 6"),
        (frame(bytes(7)), "code of 7 bytes"),
        (frame(bytes(6 + 8 * 7)), "code of 62 bytes"),
        (frame(bytes(2**20)), "code of 1048576 bytes"),
        (frame(bytes(6), write_content_size=False), "does not say how long"),
        (frame(bytes(6) + (9).to_bytes(4, "little") + bytes(4)), "places of large numbers"),
        (frame(bytes(6) + bytes(8) + (500).to_bytes(4, "little") * 2), "places of large numbers"),
        (frame(b"\1" + bytes(5) + bytes(4) + (500).to_bytes(4, "little")), "places of large numbers"),
    ],
)
def test_a_hostile_code_is_refused(code: torch.Tensor, said: str) -> None:
    """Of another size, which is judged before anything is decoded, or with large numbers where none can be."""
    with pytest.raises(CheckpointError, match=said):
        decode(code, 2, 3)
