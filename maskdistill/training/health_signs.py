"""Signs of health of one step: of its batch alone, so that a resumed run finds the same ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskdistill import health
from maskdistill.models.probing import evaluating
from maskdistill.training.step import StepSettings, StepView, TrainState, rows_of, targets_of

PREFIX = "health/"
"""Before the names of the signs in a line: an evaluation has an effective rank of its own."""


def health_due(step: int, last: int, *, log_every: int, health_every: int) -> bool:
    """Say whether the line of metrics after a step has signs of health in it.

    >>> [step for step in range(1, 81) if health_due(step, 80, log_every=10, health_every=25)]
    [30, 50, 80]

    They are in the first line at or after each multiple of ``health_every``, and in the last line;
    the steps before do not matter, so that a resumed run agrees.

    Args:
        step: steps done by then.
        last: steps of the whole run.
        log_every: steps between two lines.
        health_every: steps between two looks; 0 is never.
    """
    if not health_every:
        return False
    return step == last or (step % log_every == 0 and step % health_every < log_every)


@torch.no_grad()
def measure_health(state: TrainState, seen: StepView, settings: StepSettings) -> dict[str, Tensor]:
    """Return the signs of health of a step, scalar tensors by name; nothing is changed or drawn.

    >>> signs = {}
    >>> look = lambda seen: signs.update(measure_health(state, seen, settings))
    >>> train_step(state, crops, policy, settings, observe=look)  # doctest: +SKIP

    Of the teacher's targets: ``kl_to_uniform`` per image and ``kl_of_mean`` of their mean, the
    ``prototype_share`` and ``prototype_perplexity`` of `health.prototype_usage`. Of its features:
    ``effective_rank`` of the first global view, ``alignment`` of two views and ``uniformity``.
    Of the student, where masks hide something from it: ``masked_loss`` and ``unmasked_loss``, which
    are DINO's loss with these masks and without any, both without drop path.

    It takes two forwards of the student and a singular value decomposition, for which an
    accelerator makes the host wait. With several processes all must call it, and each gets the
    signs of its own part of the batch.

    Args:
        state: as it is before the step.
        seen: what the step gives to ``observe``.
        settings: of the step.

    Returns:
        Signs by name; NaN in the place of those of features or targets that are not finite.
    """
    signs = _teacher_signs(seen)
    if any(mask is not None for mask in seen.masks):
        nothing = [None] * len(seen.crops)
        with evaluating(state.student_net), _as_written(state.student_net):
            signs["masked_loss"] = _loss(state, seen, settings, seen.masks, seen.counts)
            signs["unmasked_loss"] = _loss(state, seen, settings, nothing, nothing)
    return {name: value.float() for name, value in signs.items()}


def _teacher_signs(seen: StepView) -> dict[str, Tensor]:
    batch = seen.crops[0].shape[0]
    targets, features = seen.targets, seen.teacher.features
    finite = bool(torch.isfinite(features).all() & torch.isfinite(targets).all())
    if not finite:  # what does not depend on the numbers: the names
        features, targets = torch.zeros_like(features), torch.ones_like(targets)
        targets = targets / targets.shape[1]
    usage = health.prototype_usage(targets)
    signs = {
        "kl_to_uniform": health.kl_to_uniform(targets),
        "kl_of_mean": health.kl_to_uniform(targets.mean(dim=0, keepdim=True)),
        "prototype_share": usage.share,
        "prototype_perplexity": usage.perplexity,
        "effective_rank": health.effective_rank(features[:batch]),
    }
    if len(features) > batch:
        signs["alignment"] = health.alignment(features[:batch], features[batch : 2 * batch])
    if batch > 1:
        signs["uniformity"] = health.uniformity(features[:batch])
    return signs if finite else {name: value * math.nan for name, value in signs.items()}


def _loss(
    state: TrainState,
    seen: StepView,
    settings: StepSettings,
    masks: Sequence[Tensor | None],
    counts: Sequence[int | None],
) -> Tensor:
    """Return the student's loss on its views, as it is now, under some masks."""
    crops, net = seen.crops, state.student_net
    losses = []
    for part in seen.parts:
        # A context of its own: autocast keeps the weights that it has cast, here without gradient.
        with torch.autocast(
            crops[0].device.type, settings.amp_dtype, enabled=settings.amp_dtype is not None
        ):
            logits = net(rows_of(crops, part), rows_of(masks, part), counts).logits
        own = targets_of(seen.targets, part, crops[0].shape[0])
        losses.append(state.objective(logits, own, views=len(crops)))
    return torch.stack(losses).mean()


def _as_written(net: nn.Module) -> Any:
    """Run compiled blocks as they are written: this is rare, and compiling again takes long."""
    if any(getattr(module, "_compiled_call_impl", None) for module in net.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
