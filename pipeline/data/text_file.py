"""Any local text file -> test windows, by the protocol of `calibrate`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.bos import added_bos
from pipeline.data.documents import documents
from pipeline.data.texts import first_windows, tokenise
from spectrim.errors import DataError, SourceError

if TYPE_CHECKING:
    from torch import Tensor


def file_windows(file: Path, tokenizer: Any, seq_len: int, n_windows: int, column: str = "text") -> "Tensor":
    """The first ``n_windows`` contiguous windows (n_windows, seq_len) of a local file, taken as one text.

    They begin with a BOS token where ``tokenizer`` puts one before a text.
    ``column`` is that of the texts in jsonl and parquet, whose rows are joined by a blank line.

    Raises:
        SourceError: the file is missing, or not a text.
        DataError: it is too short.
    """
    import torch

    if not file.is_file():
        raise SourceError(f"{file}: not found; give a text file")
    ids = tokenise(tokenizer, "\n\n".join(documents(file, column, whole=True)))
    bos = added_bos(tokenizer)
    available = len(ids) // (seq_len - (bos is not None))
    if available < n_windows:
        raise DataError(
            f"{file}: {len(ids):,} tokens make {available} windows of {seq_len:,}, {n_windows} are asked for; "
            "give a longer text or a smaller --windows"
        )
    return torch.from_numpy(first_windows(file.stem, ids, seq_len, n_windows, bos)).long()


def named_file(argument: str) -> tuple[str, Path]:
    """NAME=FILE of the command line."""
    name, separator, file = argument.partition("=")
    if not (name and separator and file):
        raise argparse.ArgumentTypeError(f"{argument}: write NAME=FILE")
    return name, Path(file)
