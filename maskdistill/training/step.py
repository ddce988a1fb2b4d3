"""One step of DINO: everything that changes the networks, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from maskdistill.masking.mask import PatchMask
from maskdistill.models.masked_vit import MaskedViT
from maskdistill.models.multicrop import MultiCropOutput, MultiCropWrapper
from maskdistill.objectives import (
    DINOLoss,
    Objective,
    StudentOutput,
    TeacherOutput,
    feature_spread,
)
from maskdistill.policies import ViewPolicy
from maskdistill.training.distributed import gradients_later, local, norms_of_all

ClipMode: TypeAlias = Literal["per_parameter", "global"]


@dataclass
class TrainState:
    """The networks and what goes with them: all that a step changes and a checkpoint holds.

    Attributes:
        student: trained by gradient. Wrap it for data parallelism; ``student_net`` is the bare one.
        teacher: an average of the student, never trained.
        objective: a loss, or a weighted sum of several; holds the centres.
        optimizer: over the student; group 0 is the one with weight decay.
    """

    student: nn.Module
    teacher: MultiCropWrapper
    objective: Objective
    optimizer: torch.optim.Optimizer

    @property
    def student_net(self) -> MultiCropWrapper:
        """The student without a data-parallel wrapper."""
        net = getattr(self.student, "module", self.student)
        assert isinstance(net, MultiCropWrapper)
        return net

    @property
    def between_views(self) -> str:
        """Name of the loss between the class tokens of different views, which is always there."""
        return next(
            name for name, (loss, _) in self.objective.terms().items() if isinstance(loss, DINOLoss)
        )


@dataclass(frozen=True)
class StepSettings:
    """What the schedules say at one step.

    Attributes:
        lr: learning rate of all groups.
        weight_decay: of group 0.
        momentum: of the teacher's average.
        teacher_temp: the teacher's softmax temperature.
        patch_temp: the same for patches, where a loss looks at them.
        progress: share of training that is done, in [0, 1]; moves the maskers' schedules.
        freeze_last_layer: leave the prototypes as they are, as in the first epochs.
        clip_grad: greatest gradient norm; 0 clips nothing.
        clip_mode: per parameter, as the original, or global.
        amp_dtype: autocast's dtype, or None for float32.
        accumulate: parts of the batch that go through the networks one after the other, to save
            memory; the step stays the whole batch's.
    """

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    patch_temp: float = 0.07
    progress: float = 0.0
    freeze_last_layer: bool = False
    clip_grad: float = 3.0
    clip_mode: ClipMode = "per_parameter"
    amp_dtype: torch.dtype | None = None
    accumulate: int = 1


class StepMetrics(NamedTuple):
    """What a step measured, as scalar tensors on the device: reading one waits for it.

    Attributes:
        loss: of this step, the weighted sum.
        grad_norm: of all gradients together, before clipping.
        teacher_entropy: mean entropy of the targets, in nats; ln(K) is uniform.
        feature_spread: of the teacher's embeddings; 0 when all images map to one point, 1 when
            they point in all directions.
        terms: the losses that ``loss`` is the weighted sum of, by name, each without its weight.
    """

    loss: Tensor
    grad_norm: Tensor
    teacher_entropy: Tensor
    feature_spread: Tensor
    terms: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return all of them by name; the terms only where there are several."""
        values = self._asdict()
        terms = values.pop("terms")
        return values | ({f"loss_{k}": v for k, v in terms.items()} if len(terms) > 1 else {})


class StepView(NamedTuple):
    """What a step has drawn and seen before it changes anything, for those who look on.

    Attributes:
        crops: ``(B, 3, H, W)`` each, the global ones first.
        masks: the student's, one per crop, None where it is clean.
        teacher: logits and features of the global views, view by view.
        targets: ``(G * B, K)`` distributions made of those logits.
        parts: slices of the batch, which go through the networks one after the other.
    """

    crops: Sequence[Tensor]
    masks: Sequence[PatchMask | None]
    teacher: MultiCropOutput
    targets: Tensor
    parts: Sequence[slice]


def make_teacher(student: MultiCropWrapper) -> MultiCropWrapper:
    """Return a frozen copy of the student, without drop path or dropout.

    Batch norm, where a stem has it, goes on using the batch, as in the original: the average moves
    parameters only, so its buffers would grow stale.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return teacher


def train_step(
    state: TrainState,
    crops: Sequence[Tensor],
    policy: ViewPolicy,
    settings: StepSettings,
    generator: torch.Generator | None = None,
    *,
    boxes: Tensor | None = None,
    flipped: Tensor | None = None,
    observe: Callable[[StepView], None] | None = None,
) -> StepMetrics:
    """Draw the masks, run teacher and student, and update both.

    The order is facebookresearch/dino's: schedules, teacher, student, loss with the centre as it
    was, new centre, backward, clip, frozen last layer, optimiser, average. It reads no clock, file
    or configuration and makes the host wait for nothing. The masks depend on ``generator`` alone;
    drop path draws from torch's global generator, so seed both for an exact repetition.

    With ``settings.accumulate`` of k, teacher and student take the batch in k parts. Masks, targets
    and centre are the whole batch's, and so are gradient, clipping and average: the step is the
    same to rounding. Only what draws per forward (drop path, dropout) or mixes images within a
    forward (batch norm) differs.

    Args:
        state: changed in place.
        crops: ``(B, 3, H, W)`` each, normalised, global crops first.
        policy: who sees which mask.
        settings: what the schedules say.
        generator: source of the masks, on the crops' device or the CPU.
        boxes: ``(B, V, 4)``, where each crop lies in its image, for maskers that want to know.
        flipped: ``(B, V)`` bool, whether each crop was mirrored.
        observe: called with what the step has seen, before the student's forward; it must change
            nothing and draw no random number.

    Returns:
        Metrics of the step, still on the device.

    Raises:
        ValueError: a batch that does not divide into ``accumulate`` parts.
    """
    for i, group in enumerate(state.optimizer.param_groups):
        group["lr"] = settings.lr
        if i == 0:
            group["weight_decay"] = settings.weight_decay

    net = state.student_net
    draw = policy.begin(
        crops,
        net.backbone.patch_size,
        generator=generator,
        progress=settings.progress,
        boxes=boxes,
        flipped=flipped,
    )
    parts = _parts(crops, settings.accumulate)
    autocast = partial(
        torch.autocast,
        crops[0].device.type,
        settings.amp_dtype,
        enabled=settings.amp_dtype is not None,
    )
    views, batch = crops[: policy.global_crops], crops[0].shape[0]
    terms = state.objective.terms()
    patches = len(views) if any(loss.needs_patches for loss, _ in terms.values()) else 0
    with autocast():
        teacher, signals = _run_teacher(
            state.teacher, views, draw.teacher(), parts,
            attention="attention" in policy.needs, patches=patches,
        )  # fmt: skip
    masks = draw.student(**signals)
    hidden = None if teacher.patches is None else hidden_patches(masks[:patches], teacher.patches)
    with autocast():
        seen = _teacher_output(state.teacher, teacher, hidden, settings)
    targets: dict[str, Any] = {name: loss.prepare(seen) for name, (loss, _) in terms.items()}
    between_views = targets[state.between_views]
    state.optimizer.zero_grad(set_to_none=True)
    if observe is not None:
        observe(StepView(crops, masks, teacher, between_views, parts))
    losses: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in terms}
    for part in parts:
        with gradients_later(state.student, part is not parts[-1]):
            with autocast():
                run = state.student(rows_of(crops, part), rows_of(masks, part), patches=patches)
                rows = None if hidden is None else targets_of(hidden, part, batch)
                student = StudentOutput(
                    run.logits, run.features, len(crops), len(views),
                    None if rows is None else net.score_patches(run.patches[rows]), rows,
                )  # fmt: skip
            weighted = []
            for name, (loss, weight) in terms.items():
                own = targets[name]
                if own is not None:
                    own = _of_part(own, part, batch, hidden if loss.needs_patches else None)
                value = loss.compare(student, own) / len(parts)
                found[name].append(value.detach())
                weighted.append(weight * value)
            total = torch.stack(weighted).sum()
            total.backward()
        losses.append(total.detach())
    for loss, _ in terms.values():
        loss.finish(seen)

    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    norm = clip_gradients(gradients, settings.clip_grad, settings.clip_mode)
    if settings.freeze_last_layer:
        freeze_gradients(net, "last_layer")
    state.optimizer.step()
    update_average(state.teacher.parameters(), net.parameters(), settings.momentum)
    spread = feature_spread(teacher.features[: crops[0].shape[0]])
    return StepMetrics(
        torch.stack(losses).sum(), norm, _entropy(between_views), spread,
        {name: torch.stack(values).sum() for name, values in found.items()},
    )  # fmt: skip


def _parts(crops: Sequence[Tensor], count: int) -> list[slice]:
    batch = crops[0].shape[0]
    if batch % count:
        raise ValueError(
            f"a batch of {batch} images does not divide into accumulate={count} equal parts. "
            "Choose a batch size that is a multiple of it."
        )
    size = batch // count
    return [slice(start, start + size) for start in range(0, batch, size)]


def rows_of(tensors: Sequence[Any], part: slice) -> list[Any]:
    """Return the images of one part of the batch, of every crop that has a tensor."""
    return [None if tensor is None else tensor[part] for tensor in tensors]


def targets_of(targets: Tensor, part: slice, batch: int) -> Tensor:
    """Return the rows of one part of the batch; they are view by view, ``(G * B, ...)``."""
    own: Tensor = targets.unflatten(0, (-1, batch))[:, part].flatten(0, 1)
    return own


def hidden_patches(masks: Sequence[PatchMask | None], patches: Tensor) -> Tensor:
    """Return which patches of the global views are hidden, ``(G * B, N)`` bool, view by view.

    Args:
        masks: of the global views.
        patches: ``(G * B, N, D)``, all of their tokens.

    Raises:
        ValueError: masks on another grid than the tokens'.
    """
    clean = torch.zeros_like(patches[: len(patches) // len(masks), :, 0], dtype=torch.bool)
    hidden = [clean if mask is None else mask.mask for mask in masks]
    if any(mask.shape != clean.shape for mask in hidden):
        raise ValueError(
            f"a loss between patches needs a mask of the {clean.shape[1]} patch tokens of a view; "
            f"this one is of {max(mask.shape[1] for mask in hidden)} patches. Give the backbone's "
            "own patch size, and masks by token."
        )
    return torch.cat(hidden)


@torch.no_grad()
def _teacher_output(
    net: MultiCropWrapper, run: MultiCropOutput, hidden: Tensor | None, settings: StepSettings
) -> TeacherOutput:
    """Return what losses see of the teacher: of patches, the scores of the hidden ones."""
    seen = TeacherOutput(run.logits, run.features, settings.teacher_temp, settings.patch_temp)
    if hidden is None or run.patches is None:
        return seen
    return seen._replace(
        patch_logits=net.score_patches(run.patches[hidden]),
        patch_mean=net.mean_patch_scores(run.patches),
    )


def _of_part(targets: Tensor, part: slice, batch: int, hidden: Tensor | None) -> Tensor:
    """Return the targets of one part of the batch: of class tokens, or of hidden patches."""
    if hidden is None:
        return targets_of(targets, part, batch)
    inside = torch.zeros_like(hidden).unflatten(0, (-1, batch))
    inside[:, part] = True
    return targets[inside.flatten(0, 1)[hidden]]


@torch.no_grad()
def _run_teacher(
    teacher: MultiCropWrapper,
    views: Sequence[Tensor],
    masks: Sequence[PatchMask | None],
    parts: Sequence[slice],
    *,
    attention: bool,
    patches: int,
) -> tuple[MultiCropOutput, dict[str, list[Tensor]]]:
    """Return the teacher's output on the global crops, and its attention as a signal if asked."""
    vit: MaskedViT = teacher.backbone
    outputs, attentions = [], []
    for part in parts:
        with vit.record_attention() if attention else nullcontext() as record:
            rows = rows_of(views, part), rows_of(masks, part)
            outputs.append(teacher(*rows, patches=patches))
        if record is not None:
            attentions.append(record.attention)
            if len(attentions[-1]) != len(outputs[-1].features):
                raise ValueError(
                    "attention-guided masks need all global crops in one teacher forward: give "
                    "them one size and one number of hidden patches; got sizes "
                    f"{[tuple(view.shape) for view in views]}."
                )
    kinds: list[Any] = [
        None if kind[0] is None else _joined(kind, len(views))
        for kind in zip(*outputs, strict=True)
    ]
    output = MultiCropOutput(*kinds)
    if not attention:
        return output, {}
    return output, {"attention": list(_joined(attentions, len(views)).chunk(len(views)))}


def _joined(parts: Sequence[Tensor], views: int) -> Tensor:
    """Join what was computed of each part, view by view, into the whole batch's, view by view."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (views, -1)) for part in parts], dim=1).flatten(0, 1)


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p, p).sum(dim=-1).mean()
    return entropy


# --- The parts of DINO's optimiser that are easily missed

_TOKENS = ("pos_embed", "cls_token", "reg_token", "mask_token")


def parameter_groups(model: nn.Module, *, decay_tokens: bool = True) -> list[dict[str, Any]]:
    """Split the trainable parameters into decayed ones and those that are never decayed.

    Biases and one-dimensional parameters (norms) are not decayed. The position embedding and the
    class, register and mask tokens are, as in facebookresearch/dino, where only the number of
    dimensions counts.

    Args:
        model: whose parameters are to be optimised.
        decay_tokens: False also spares the position embedding and the tokens.

    Returns:
        Two groups for ``torch.optim.AdamW``; the second has ``weight_decay=0``.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        token = not decay_tokens and name.rsplit(".", 1)[-1] in _TOKENS
        is_spared = name.endswith(".bias") or parameter.ndim == 1 or token
        (spared if is_spared else decayed).append(parameter)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], limit: float, mode: ClipMode) -> Tensor:
    """Scale gradients down in place to an L2 norm of at most ``limit``, without a host sync.

    Args:
        gradients: to clip; of sharded parameters, each process's part.
        limit: greatest norm; 0 clips nothing.
        mode: ``"per_parameter"`` clips each tensor by its own norm, as facebookresearch/dino does;
            ``"global"`` clips by the norm of all together, as most others do.

    Returns:
        The global norm before clipping, a scalar tensor.
    """
    norms = norms_of_all(gradients)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if limit > 0:
        limits = [total] * len(norms) if mode == "global" else norms
        scales = [(limit / (norm + 1e-6)).clamp(max=1.0) for norm in limits]
        torch._foreach_mul_(local(gradients), scales)
    return total


def freeze_gradients(model: nn.Module, part: str) -> None:
    """Take away the gradients of parameters whose name contains ``part``.

    AdamW skips a parameter without a gradient altogether: no update, no decay, no moments.
    """
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.grad = None


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """Move an exponential moving average in place: average * m + current * (1 - m)."""
    torch._foreach_lerp_(local(average), local(current), 1 - momentum)
