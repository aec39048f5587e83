"""The course of the learning rate, and AdamW's memory, wherever factors are trained."""

import math

WARMUP = 0.06  # of the steps
FLOOR = 0.05  # of the learning rate, at the last step
BETAS = (0.9, 0.95)


def course(step: int, steps: int) -> float:
    """The learning rate at ``step`` of ``steps`` relative to its peak: linear warm-up, then half a cosine to FLOOR."""
    warmup = max(1, round(WARMUP * steps))
    descent = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * descent
