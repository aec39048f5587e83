"""The machine that a speed was measured on, and the dtypes that are fair to it."""

import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch

NATIVE = ("avx512_bf16", "amx_bf16", "avx10", "asimdbf16", "bf16")
"""What /proc/cpuinfo calls the instructions that multiply bfloat16."""


def speed_dtypes(chosen: str, stored: torch.dtype, device: torch.device) -> list[torch.dtype]:
    """What a person would run a model in: as ``chosen``, or for ``auto`` what is fast on this machine.

    That is the checkpoint's own 16-bit dtype on a GPU, bfloat16 on a processor that multiplies it. On others float32 is
    fast for dense weights, bfloat16 for integers, which are then multiplied packed: the faster one of the two.
    """
    if chosen != "auto":
        return [getattr(torch, chosen)]
    if device.type == "cuda":
        return [stored]
    return [torch.bfloat16] if _multiplies_bfloat16() else [torch.float32, torch.bfloat16]


def described(device: torch.device) -> str:
    """What speeds and peaks were measured on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def process_peak(device: torch.device) -> dict[str, Any]:
    """The device, and the most memory this process ever held: ``peak_rss`` bytes, both models and Python included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {"device": device.type, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _multiplies_bfloat16() -> bool:
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return any(flag in NATIVE for flag in flags)


def _cpuinfo(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)
