"""The tables of the storage formats in docs/formats.md, from their declarations.

python -m spectrim.formats.table
"""

from collections.abc import Callable, Sequence

from spectrim.maths.budget import CODED, dense_bytes, matrix_bytes
from spectrim.maths.storage_formats import FORMATS, Shape

SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096), (1536, 576), (192, 576))
"""(out, in) of the matrices whose bytes are listed, at half their full rank."""


def tables() -> list[str]:
    """Markdown: what each format keeps and loses; the bytes of SHAPES; their share of the 16-bit weight's."""
    order = sorted(FORMATS, key=lambda name: name != "dense")  # the weight itself first, the others as declared
    sized = [name for name in order if name not in CODED]  # the content decides on the bytes of those
    words = [[f"`{name}`", FORMATS[name].keeps, FORMATS[name].error] for name in order]
    return [
        _markdown(["format", "what is stored", "error"], words),
        _of_shapes(sized, lambda name, shape: f"{_bytes(name, shape):,}"),
        _of_shapes(sized, lambda name, shape: "1" if name == "dense" else f"{_share(name, shape):.4f}"),
    ]


def _of_shapes(names: Sequence[str], cell: Callable[[str, Shape], str]) -> str:
    rows = [[f"`{name}`", *(cell(name, shape) for shape in SHAPES)] for name in names]
    return _markdown(["format", *(f"{out} × {in_}" for out, in_ in SHAPES)], rows)


def _bytes(name: str, shape: Shape) -> int:
    return matrix_bytes(name, *shape, min(shape) // 2)


def _share(name: str, shape: Shape) -> float:
    return _bytes(name, shape) / dense_bytes(*shape)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


if __name__ == "__main__":
    print("\n\n".join(tables()))
