"""What the trainer's numbers are at a step: pure functions, so that resuming changes nothing."""

from __future__ import annotations

import math


def cosine_with_warmup(
    step: int, total: int, peak: float, final: float, warmup: int = 0, start: float = 0.0
) -> float:
    """Return the value at ``step``: linear from start to peak, then half a cosine to final.

    >>> [round(cosine_with_warmup(step, 6, 1.0, 0.0, warmup=3), 2) for step in range(6)]
    [0.0, 0.5, 1.0, 1.0, 0.75, 0.25]

    The warm-up reaches its peak at its last step, and the cosine begins there anew, as in
    facebookresearch/dino; so the final value lies one step behind the end.

    Args:
        step: from 0.
        total: steps in all.
        peak: value after the warm-up.
        final: value that the cosine tends to.
        warmup: steps of the linear rise, at most ``total``.
        start: value at step 0 of a warm-up.
    """
    if step < warmup:
        return start + (peak - start) * step / max(warmup - 1, 1) if warmup > 1 else start
    done = (step - warmup) / max(total - warmup, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * done))


def linear_by_epoch(epoch: int, warmup_epochs: int, start: float, end: float) -> float:
    """Return the value in ``epoch``: evenly from start to end over the warm-up, then end.

    >>> [round(linear_by_epoch(epoch, 3, 0.04, 0.07), 3) for epoch in range(4)]
    [0.04, 0.055, 0.07, 0.07]
    """
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / (warmup_epochs - 1) if warmup_epochs > 1 else start
