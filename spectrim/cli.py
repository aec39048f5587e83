"""`spectrim`: checkpoints from and into other formats, without the pipeline."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectrim.errors import SpectrimError
from spectrim.maths.budget import FACTORED


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run one command, print what was written; one line on stderr and 1 where that failed."""
    options = _parser().parse_args(arguments)
    try:
        measured = options.command(options)
    except SpectrimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.destination}: {measured['file']:,} bytes, linears {measured['linears']:,} = "
        f"{measured['ratio']:.4f} of their 16-bit bytes"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spectrim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    convert = commands.add_parser(
        "convert", help="a Spectrim checkpoint in another storage format", description=_convert.__doc__
    )
    convert.add_argument("--format", choices=[*FACTORED, "dense"], required=True, help="of every factored matrix")
    convert.set_defaults(command=_convert)
    dobi = commands.add_parser(
        "import-dobi", help="a checkpoint released by Dobi-SVD as one of ours", description=_import_dobi.__doc__
    )
    dobi.add_argument("--format", choices=FACTORED, default="remap", help="of the factors (default: remap, their size)")
    dobi.set_defaults(command=_import_dobi)
    for command in (convert, dobi):
        command.add_argument("folder", type=Path, help="the checkpoint's folder")
        command.add_argument("destination", type=Path, help="a new folder")
        command.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of its files (default: 2GB)")
    return parser


def _convert(options: argparse.Namespace) -> dict[str, Any]:
    """Write FOLDER into DESTINATION with every factored matrix in another format, at its rank."""
    from spectrim.checkpoint.conversion import convert

    return convert(options.folder, options.destination, options.format, options.max_shard_size)


def _import_dobi(options: argparse.Namespace) -> dict[str, Any]:
    """Write a folder with pytorch_model.bin and remapping_weight.pt into DESTINATION; they are read as tensors only."""
    from spectrim.checkpoint.dobi_import import import_dobi

    return import_dobi(options.folder, options.destination, options.format, options.max_shard_size)


if __name__ == "__main__":
    sys.exit(main())
