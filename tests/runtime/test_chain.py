"""A chain computes a value once, keeps the newest on disk, and finds its way back from whatever is left."""

from pathlib import Path

import pytest
import torch

from pipeline.runtime.chain import Chain
from pipeline.runtime.store import LayerStore


class Counted:
    """value[0] = 1, value[i + 1] = 2 value[i] + i, counting the steps."""

    def __init__(self, root: Path, *, keep_all: bool = False) -> None:
        self.steps: list[int] = []
        self.starts = 0
        self.store = LayerStore(root)
        self.chain = Chain(self.store, "test", self._start, self._step, keep_all=keep_all)

    def _start(self) -> torch.Tensor:
        self.starts += 1
        return torch.ones(3)

    def _step(self, index: int, value: torch.Tensor) -> torch.Tensor:
        self.steps.append(index)
        return 2 * value + index


def value(index: int) -> torch.Tensor:
    result = torch.ones(3)
    for i in range(index):
        result = 2 * result + i
    return result


def test_values_follow_from_the_start(tmp_path: Path) -> None:
    counted = Counted(tmp_path)
    assert torch.equal(counted.chain[4], value(4))
    assert counted.steps == [0, 1, 2, 3] and counted.starts == 1


def test_a_new_process_goes_on_from_the_newest(tmp_path: Path) -> None:
    first = Counted(tmp_path)
    for index in range(1, 4):
        first.chain[index] = value(index)
    second = Counted(tmp_path)
    assert torch.equal(second.chain[3], value(3))
    assert torch.equal(second.chain[5], value(5))
    assert second.steps == [3, 4] and second.starts == 0


def test_older_values_are_dropped_unless_kept(tmp_path: Path) -> None:
    for keep_all, starts in ((False, 1), (True, 0)):
        first = Counted(tmp_path / str(keep_all), keep_all=keep_all)
        for index in range(4):
            first.chain[index] = value(index)
        second = Counted(tmp_path / str(keep_all), keep_all=keep_all)
        assert torch.equal(second.chain[1], value(1))
        assert second.starts == starts


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_value_is_computed_again(tmp_path: Path, damage: str) -> None:
    first = Counted(tmp_path)
    first.chain[3] = value(3)
    file = next(path for path in tmp_path.rglob("value.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 0xFF
    file.unlink()
    file.write_bytes(content[:-4] if damage == "truncate" else content)
    second = Counted(tmp_path)
    assert torch.equal(second.chain[3], value(3))
    assert second.steps == [0, 1, 2]


def test_clear_leaves_nothing(tmp_path: Path) -> None:
    counted = Counted(tmp_path, keep_all=True)
    for index in range(4):
        counted.chain[index] = value(index)
    counted.chain.clear(3)
    assert not list(tmp_path.rglob("value.safetensors"))


def test_only_every_so_many_values_go_to_the_disk(tmp_path: Path) -> None:
    store, steps = LayerStore(tmp_path), []

    def step(index: int, value: torch.Tensor) -> torch.Tensor:
        steps.append(index)
        return 2 * value + index

    def chain() -> Chain:
        return Chain(store, "sparse", lambda: torch.ones(3), step, every=3)

    first = chain()
    for index in range(6):
        first[index] = value(index)
    assert len(list(tmp_path.rglob("value.safetensors"))) == 1
    assert torch.equal(chain()[5], value(5)) and steps == [3, 4]
