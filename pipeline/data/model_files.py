"""The weight files of a model folder: which ones count, and whether each is there and whole.

transformers takes the first of model.safetensors, pytorch_model.bin and their indices of shards. What it says of a file
that is missing or cut names neither the file nor a remedy, so the files are looked at before it opens them.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

from pipeline.runtime.artifacts import read_json
from spectrim.errors import SourceError, StorageError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"  # behind the name of the whole file: which shard holds which tensor
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
POINTER = b"version https://git-lfs.github.com/spec/"
FOREIGN = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".nemo", ".npz", ".onnx", ".ot", ".pt", ".pth", ".safetensors"}


def has_weights(folder: Path, name: str) -> bool:
    """Whether ``folder`` has the file ``name``, SAFETENSORS or PICKLED, or an index of its shards."""
    return (folder / name).is_file() or (folder / (name + INDEX)).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of the model in ``folder``, safetensors where there are any; each is whole.

    A .bin is a pickle: it is read as tensors alone (torch's ``weights_only``), which runs nothing that stands in it.

    Raises:
        SourceError: no weights, a shard that the index names is missing, a damaged file, or more than tensors in it.
    """
    name = next((name for name in (SAFETENSORS, PICKLED) if has_weights(folder, name)), None)
    if name is None:
        raise SourceError(
            f"{folder}: neither {SAFETENSORS} nor {PICKLED}, nor the index of its shards; {_instead(folder)}"
        )
    files = [folder / name] if (folder / name).is_file() else _shards(folder / (name + INDEX))
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise SourceError(
                    f"{file}: a pointer of Git LFS in place of the weights; run `git lfs pull` in {folder}"
                )
        (_check_safetensors if file.suffix == ".safetensors" else _check_pickled)(file)
    return files


def _instead(folder: Path) -> str:
    """What the folder has in place of weights, and what to do about it."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix in FOREIGN and file.is_file())
    if shard := next((name for name in found if SHARD.fullmatch(name)), None):
        return f"{shard} is a shard without its index; get the folder whole"
    if gguf := next((name for name in found if name.endswith(".gguf")), None):
        return f"it has {gguf}; give that file itself, model.source: {folder / gguf}"
    if found:
        return f"it has {', '.join(found[:3])}; save the model by save_pretrained of transformers, and give that folder"
    return "get the folder whole"


def _shards(index: Path) -> list[Path]:
    try:
        names = set(read_json(index)["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (StorageError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index}: not an index of shards, which has a weight_map; get it whole") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise SourceError(
            f"{index}: {len(missing)} of the {len(files)} shards that it names are missing, first {missing[0]}; "
            "get the folder whole"
        )
    if not files:
        raise SourceError(f"{index}: its weight_map is empty; get it whole")
    return files


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:  # the header is unreadable, or names more bytes than there are
        raise SourceError(f"{file}: {_size(file)}, not a whole safetensors file ({error}); get it whole") from error


def _check_pickled(file: Path) -> None:
    import torch

    damaged = f"{file}: {_size(file)}, not a whole file of tensors; get it whole"
    with file.open("rb") as opened:
        if not opened.read(2).startswith((b"PK", b"\x80")):  # an archive of torch.save, or a pickle as it wrote before
            raise SourceError(damaged)
    try:
        # mapped, so that the weights themselves stay on the disk
        held: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a file made to harm fails in any way
        if "weights_only" not in str(error):
            raise SourceError(damaged) from error
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise SourceError(
            f"{file}: not tensors alone: it names {foreign[1] if foreign else 'something else'}, and unpickling that "
            "can run any code; give the weights as safetensors"
        ) from error
    entries = held.items() if isinstance(held, dict) else [("the whole", held)]
    for name, value in entries:
        if not isinstance(value, torch.Tensor) or not isinstance(held, dict):
            raise SourceError(
                f"{file}: not one tensor per name, {name} is of type {type(value).__name__}; save the model by "
                "save_pretrained of transformers"
            )


def _size(file: Path) -> str:
    return f"{file.stat().st_size:,} bytes"
