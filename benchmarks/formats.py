"""What each storage format costs at equal ranks: a checkpoint converted, its bytes, its perplexity, its error bound.

    python -m benchmarks.formats [FOLDER] --texts wikitext2=wiki.test.raw

FOLDER (default: artifacts/remap) is converted into every format of factors, as `spectrim convert` does it, and measured
on the test windows of `calibrate` and on every --texts FILE as in benchmarks/presets.py. One JSON object per row;
`cost` is the perplexity relative to that of the row float16, minus one.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.presets import Measure, Row, named_file
from pipeline.artifacts import artifact
from pipeline.measure import load_model
from spectrim.conversion import convert
from spectrim.errors import SpectrimError
from spectrim.maths.budget import FACTORED, Format


def row(measure: Measure, folder: Path, format: Format, reference: dict[str, float] | None) -> Row:
    """One format of the checkpoint in ``folder``; ``reference``: the perplexities to compare with."""
    with tempfile.TemporaryDirectory(prefix="spectrim-format-") as scratch:
        made = Path(scratch) / "made"
        stored = convert(folder, made, format)
        perplexity = measure.perplexity(load_model(made, measure.device), format)
    reference = reference or perplexity
    return {
        "format": format,
        "linear_bytes": stored["linears"],
        "ratio": stored["ratio"],
        "perplexity": perplexity,
        "cost": {text: value / reference[text] - 1 for text, value in perplexity.items()},
    }


def main() -> int:
    """Parse arguments and print the rows as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=artifact("remap"), help="a checkpoint of factors")
    parser.add_argument(
        "--texts", type=named_file, nargs="+", default=[], metavar="NAME=FILE", help="further test texts"
    )
    arguments = parser.parse_args()
    reference: dict[str, float] | None = None
    try:
        measure = Measure(dict(arguments.texts))
        for format in FACTORED:
            measured = row(measure, arguments.folder, format, reference)
            reference = reference or measured["perplexity"]
            print(json.dumps(measured), flush=True)
    except SpectrimError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
