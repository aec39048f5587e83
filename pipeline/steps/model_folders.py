"""A model's folder -> the model, its tokenizer, and what identifies it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime.artifacts import files_sha256, read_json, require_model
from spectrim.models.linearise import linearise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(folder: Path, device: "torch.device") -> "PreTrainedModel":
    """The model of a folder by plain ``from_pretrained``, in the dtype its config.json names, ready to evaluate.

    Every matrix is a linear of its own, see models/linearise.py.

    Raises:
        StorageError: there is no such model folder.
    """
    from transformers import AutoModelForCausalLM

    require_model(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    linearise(model)
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises StorageError when there is no such folder."""
    from transformers import AutoTokenizer

    require_model(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def model_identity(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the files in a model's folder that can change what it computes or reads."""
    listed = folder / "prepare.json"  # of `prepare`, which has hashed its files already
    files = read_json(listed)["files"] if listed.is_file() else files_sha256(folder)
    return {name: sha256 for name, sha256 in files.items() if name not in ("spectrim.json", "prepare.json")}
