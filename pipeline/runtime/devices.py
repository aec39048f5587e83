"""runtime.device -> torch.device."""

import torch

from spectrim.errors import ConfigError


def resolve(name: str) -> torch.device:
    """``auto`` is CUDA when there is a GPU; ``cuda`` without one is an error, never a silent fallback."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["params.yaml: runtime.device: cuda was asked for and torch sees no GPU; use auto or cpu"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    if device.type == "cuda":
        # torch loads its GPU solvers at the first call of one, and fails where two threads make it at once
        torch.linalg.inv(torch.eye(1, device=device))
    return device
