"""What each storage format costs at equal ranks: perplexity, bytes in the file and in memory; one JSON object per row.

    python -m benchmarks.formats --texts wikitext2=wiki.test.raw

Stands on the last `dvc repro`: its factors, at its ranks, stored in every format, even where two factors take more
bytes than the dense weight. A real checkpoint of each is written into a scratch folder. `ratio` is that of the file,
`resident_ratio` the bytes of the same linears' tensors in memory, loaded in bfloat16, against dense bfloat16; `cost` is
the perplexity against that of two 16-bit factors. Perplexity: the test windows of `calibrate`, and of every --texts
FILE 16 contiguous windows of 1,024 tokens, computed in prepare.load_dtype.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config.params import load
from pipeline.data.bos import follow
from pipeline.data.text_file import file_windows, named_file
from pipeline.runtime.artifacts import artifact, read_json
from pipeline.runtime.devices import resolve
from pipeline.runtime.progress import progress
from pipeline.steps import packed_blocks as packing
from pipeline.steps.factor_files import VECTORS
from pipeline.steps.measure import evaluation_windows, text_perplexities
from pipeline.steps.model_folders import load_model, load_tokenizer
from spectrim.checkpoint.layout import Matrix
from spectrim.checkpoint.saving import assemble
from spectrim.compression.statistics import gram_of
from spectrim.errors import ConfigError, SpectrimError
from spectrim.maths.budget import FACTORED, Format

SEQ_LEN, FILE_WINDOWS = 1024, 16
EXACT: Format = "float16"


def checkpoint(format: Format, folder: Path) -> dict[str, Any]:
    """Write the last run's factors in ``format``; returns what the file measures.

    Raises:
        ConfigError: the last run has rounded weights, which have no format of their factors alone.
    """
    prepared, captured = artifact("prepare"), artifact("capture")
    ranks = read_json(artifact("train_ranks", "ranks.json"))
    others = {entry["format"] for entry in ranks["matrices"].values()} - {*FACTORED, "dense"}
    if others:
        raise ConfigError([f"compression.alternatives: the last run stored {', '.join(sorted(others))}; required: []"])
    matrices = {
        name: Matrix(entry["format"] if entry["format"] == "dense" else format, entry["rank"])
        for name, entry in ranks["matrices"].items()
    }
    blocks, updated = [], artifact("update_weights")
    for file in progress(sorted(updated.glob("[0-9]*.safetensors")), f"packing as {format}"):
        blocks.append(folder / file.stem)
        blocks[-1].mkdir()
        packing.pack_block([file], partial(gram_of, captured, int(file.stem)), matrices, blocks[-1])
    packed = packing.load_packed(blocks)
    return assemble(
        prepared, folder / "made", packed, matrices, ratio_target=ranks["ratio"], provenance={},
        skip=("prepare.json",), refined=load_file(updated / VECTORS) if (updated / VECTORS).exists() else None,
    )  # fmt: skip


def resident_bytes(model: nn.Module, linears: Mapping[str, Any]) -> int:
    """Bytes of the tensors of these linears, biases not among them; parts of one storage count once."""
    storages = {}
    for name in linears:
        for suffix, tensor in model.get_submodule(name).named_parameters():
            if suffix != "bias":
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def row(format: Format, windows: Mapping[str, Tensor]) -> dict[str, Any]:
    """One format on the device of params.yaml."""
    settings = load()
    device = resolve(settings.runtime.device)
    with tempfile.TemporaryDirectory(prefix="spectrim-format-") as scratch:
        stored = checkpoint(format, Path(scratch))
        model = load_model(Path(scratch, "made"), device)
        with torch.no_grad():
            found = text_perplexities(model, windows, batch_size=settings.evaluate.batch_size, desc=format)
        listed = read_json(Path(scratch, "made", "config.json"))["quantization_config"]["matrices"]
        narrow = type(model).from_pretrained(Path(scratch, "made"), dtype=torch.bfloat16)
    return {
        "format": format,
        "ratio": stored["ratio"],
        "resident_ratio": resident_bytes(narrow, listed) / stored["dense_linears_16bit"],
        "perplexity": {name: entry["perplexity"] for name, entry in found.items()},
    }


def main() -> int:
    """Parse arguments and print the rows as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FACTORED, default=FACTORED, help="(default: all)")
    parser.add_argument(
        "--texts", type=named_file, nargs="+", default=[], metavar="NAME=FILE", help="further test texts"
    )
    arguments = parser.parse_args()
    exact: dict[str, float] = {}
    try:
        tokenizer = follow(load_tokenizer(artifact("prepare")), load().calibrate.bos)
        windows = evaluation_windows() | {
            name: file_windows(file, tokenizer, SEQ_LEN, FILE_WINDOWS) for name, file in arguments.texts
        }
        for format in dict.fromkeys((EXACT, *arguments.formats)):
            measured = row(format, windows)
            exact = exact or measured["perplexity"]
            cost = {name: value / exact[name] - 1 for name, value in measured["perplexity"].items()}
            print(json.dumps({**measured, "cost": cost}), flush=True)
    except SpectrimError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
