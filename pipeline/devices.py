"""runtime.device -> torch.device."""

import torch

from spectrim.errors import ConfigError


def resolve(name: str) -> torch.device:
    """``auto`` is CUDA when there is a GPU; ``cuda`` without one is an error, never a silent fallback."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["params.yaml: runtime.device: cuda was asked for and torch sees no GPU; use auto or cpu"])
    return torch.device(name)
