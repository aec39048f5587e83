"""What a run tells on stderr: one line, or a bar with a rate and the time left."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def say(line: str) -> None:
    """One line on stderr, above any progress bar."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        print(line, file=sys.stderr, flush=True)


def progress(iterable: Iterable[Item], desc: str, total: int | None = None) -> Iterator[Item]:
    """Pass ``iterable`` through with a bar, a rate and the time left on stderr; sparse where stderr is a file."""
    yield from bar(desc, total, iterable=iterable)


def bar(
    desc: str, total: int | None, *, iterable: Iterable[Any] | None = None, initial: int = 0, unit: str = "it"
) -> Any:
    """A tqdm bar on stderr; ``initial`` items were there before and do not count for the time left."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        initial=initial,
        unit=unit,
        mininterval=interval,
        maxinterval=max(10.0, interval),
        dynamic_ncols=True,
        file=sys.stderr,
    )
