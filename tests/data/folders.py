"""A model's folder made into what is found elsewhere."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def pickle_weights(folder: Path, n_shards: int = 0) -> dict[str, torch.Tensor]:
    """model.safetensors -> pytorch_model.bin, or shards and their index; returns the weights."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not n_shards:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    names = [f"pytorch_model-{shard + 1:05}-of-{n_shards:05}.bin" for shard in range(n_shards)]
    weight_map = {tensor: names[i % n_shards] for i, tensor in enumerate(tensors)}
    for name in names:
        torch.save({tensor: tensors[tensor] for tensor, file in weight_map.items() if file == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors
