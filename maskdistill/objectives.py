"""What is learned from the views: the projection head, and losses between student and teacher.

From top to bottom: the head; what a step shows to a loss, and what a loss is; DINO's between class
tokens, and MSN's; iBOT's between hidden patches; KoLeo's spreading of a batch; their weighted sum,
also from text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Centering: TypeAlias = Literal["center", "sinkhorn_knopp"]


class PrototypeLayer(nn.Module):
    """A linear layer with unit-length rows, one per prototype, each with a learnable length.

    The weight-normalised last layer of DINO's head, in float32 whatever the autocast: at a teacher
    temperature of 0.04 the differences between logits are lost in bfloat16.

    Args:
        in_dim: input width.
        out_dim: number of prototypes, K.
        freeze_lengths: keep all lengths at 1 (``norm_last_layer``).
    """

    def __init__(self, in_dim: int, out_dim: int, *, freeze_lengths: bool = True) -> None:
        super().__init__()
        # The names of torch's weight_norm, so that checkpoints of the original load.
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not freeze_lengths)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear, and the original

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_dim)`` to ``(B, K)`` float32."""
        with torch.autocast(x.device.type, enabled=False):
            direction = self.weight_v.float()
            weight = direction * (self.weight_g.float() / direction.norm(dim=1, keepdim=True))
            return F.linear(x.float(), weight)


class DINOHead(nn.Module):
    """DINO's projection head: an MLP, a unit-length bottleneck, and prototypes.

    >>> DINOHead(192, out_dim=4096)(torch.zeros(8, 192)).shape
    torch.Size([8, 4096])

    Args:
        in_dim: width of the backbone's embedding.
        out_dim: number of prototypes, K; 65536 for ImageNet in the paper.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width before the prototypes, L2-normalised.
        norm_last_layer: keep the prototypes at unit length, which trains more stably; the paper
            frees them for ViT-S.

    Caron et al., 2021, without batch norm, as for all its ViTs.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, freeze_lengths=norm_last_layer)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Map embeddings ``(B, D)`` to unit vectors ``(B, bottleneck_dim)``."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Map embeddings ``(B, D)`` to prototype scores ``(B, K)`` float32."""
        logits: Tensor = self.last_layer(self.bottleneck(x))
        return logits


def mean_scores(head: nn.Module, x: Tensor) -> Tensor:
    """Return the mean of a head's scores of embeddings ``(n, D)``, as ``(1, K)``.

    The last layer of a ``DINOHead`` is linear, so the mean goes through it, and ``(n, K)`` scores,
    gigabytes for the patches of a batch, are never made.
    """
    if isinstance(head, DINOHead):
        mean: Tensor = head.last_layer(head.bottleneck(x).float().mean(dim=0, keepdim=True))
    else:
        mean = head(x).float().mean(dim=0, keepdim=True)
    return mean


# --- What a step shows to a loss, and what a loss is


class TeacherOutput(NamedTuple):
    """What a loss may see of the teacher in one step: G global views, view by view.

    Attributes:
        logits: ``(G * B, K)`` scores of the class tokens.
        features: ``(G * B, D)`` embeddings before the head.
        temp: the teacher's softmax temperature at this step.
        patch_temp: the same for patches.
        patch_logits: ``(M, K)`` scores of the M patches that are hidden from the student, in the
            order of its mask; None where no loss needs patches.
        patch_mean: ``(1, K)``, mean of the scores of all patches, hidden or not; None likewise.
    """

    logits: Tensor
    features: Tensor
    temp: float
    patch_temp: float = 0.07
    patch_logits: Tensor | None = None
    patch_mean: Tensor | None = None


class StudentOutput(NamedTuple):
    """What a loss may see of the student: V views, view by view, the G global ones first.

    Attributes:
        logits: ``(V * B, K)`` scores of the class tokens.
        features: ``(V * B, D)`` embeddings before the head.
        views: number of views, V.
        global_views: number of global views, G.
        patch_logits: ``(M, K)`` scores of the hidden patches; None where no loss needs them.
        mask: ``(G * B, N)`` bool, which patches of the global views are hidden; None likewise.
    """

    logits: Tensor
    features: Tensor
    views: int
    global_views: int
    patch_logits: Tensor | None = None
    mask: Tensor | None = None


class Objective(nn.Module):
    """A loss between a student and its teacher, as ``train_step`` calls it.

    A subclass fills ``compare``, and the others where it has targets or keeps something from step
    to step. It computes in float32 whatever the autocast.

    Attributes:
        needs_patches: whether it looks at the scores of hidden patches.
        in_parts: whether the loss of a batch is the mean of the losses of its parts, so that
            ``accumulate`` leaves it as it is.
    """

    needs_patches: ClassVar[bool] = False
    in_parts: ClassVar[bool] = True

    def prepare(self, teacher: TeacherOutput) -> Tensor | None:
        """Return the targets of a step, before the student runs: ``(G * B, K)``, or None.

        Those of a loss that needs patches are ``(M, K)``.
        """
        return None

    def compare(self, student: StudentOutput, targets: Tensor | None) -> Tensor:
        """Return the scalar loss."""
        raise NotImplementedError

    def finish(self, teacher: TeacherOutput) -> None:
        """Take note of the teacher when the step's targets are made and used."""

    def terms(self) -> dict[str, tuple[Objective, float]]:
        """Return the losses that this one is a sum of, each with its weight, by name."""
        return {"loss": (self, 1.0)}


def in_float32(like: Tensor) -> AbstractContextManager[None]:
    """Switch autocast off for a loss: products of probabilities are lost in bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


class DINOLoss(Objective):
    """Cross-entropy between the teacher's and the student's prototype scores across views.

    >>> loss = DINOLoss(out_dim=4096)
    >>> student, teacher = torch.randn(10 * 8, 4096), torch.randn(2 * 8, 4096)
    >>> loss(student, loss.targets(teacher, teacher_temp=0.04), views=10).shape
    torch.Size([])
    >>> loss.update_center(teacher)

    Every student view is compared to every teacher view but the same one; the mean is over pairs
    and images. The teacher's global views are the student's first ones.

    Args:
        out_dim: number of prototypes, K.
        student_temp: the student's softmax temperature.
        center_momentum: of the running mean of the teacher's scores.
        centering: ``"center"`` subtracts that running mean (Caron et al., 2021, eq. 4), updated
            *after* it is used; ``"sinkhorn_knopp"`` balances the batch instead, in 3 iterations
            (SwAV, Caron et al., 2020; used by DINOv2).

    Attributes:
        center: ``(1, K)`` buffer, so that it is saved with a checkpoint.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        *,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: Centering = "center",
    ) -> None:
        super().__init__()
        _check_centering(centering)
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.centering = centering
        self.register_buffer("center", torch.zeros(1, out_dim))

    @torch.no_grad()
    def targets(self, teacher: Tensor, teacher_temp: float) -> Tensor:
        """Turn the teacher's scores ``(G * B, K)`` into target distributions of the same shape.

        Args:
            teacher: scores of the global views.
            teacher_temp: the teacher's softmax temperature at this step.
        """
        return _targets(teacher, self.center, teacher_temp, self.centering)

    def forward(self, student: Tensor, targets: Tensor, views: int) -> Tensor:
        """Return the scalar loss.

        Args:
            student: ``(V * B, K)`` scores, view by view, the global views first.
            targets: ``(G * B, K)`` distributions of the teacher's global views.
            views: number of student views, V.
        """
        with in_float32(student):
            log_p = F.log_softmax(student.float() / self.student_temp, dim=-1)
            log_p = rearrange(log_p, "(v b) k -> v (b k)", v=views)
            batch = student.shape[0] // views
            flat = rearrange(targets.float(), "(g b) k -> g (b k)", b=batch)
            # One matrix product holds the cross-entropy of all pairs; the diagonal is one view's.
            pairs = -(flat @ log_p.T) / batch
            same = pairs.diagonal()
            return (pairs.sum() - same.sum()) / (pairs.numel() - same.numel())

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """Move the centre towards the mean of this step's scores, over all processes."""
        mean = teacher.float().mean(dim=0, keepdim=True)
        if _distributed():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 1 - self.center_momentum)

    def prepare(self, teacher: TeacherOutput) -> Tensor:
        """Return ``targets`` of the teacher's class tokens."""
        return self.targets(teacher.logits, teacher.temp)

    def compare(self, student: StudentOutput, targets: Tensor | None) -> Tensor:
        """Return the loss between the class tokens of different views."""
        assert targets is not None
        loss: Tensor = self(student.logits, targets, student.views)
        return loss

    def finish(self, teacher: TeacherOutput) -> None:
        """Update the centre, after it was used."""
        self.update_center(teacher.logits)


class MSNLoss(DINOLoss):
    """MSN's loss: DINO's with sharpened targets instead of a centre, and prototypes used evenly.

    >>> loss = MSNLoss(out_dim=1024)
    >>> student = StudentOutput(torch.randn(4 * 8, 1024), torch.randn(4 * 8, 192), 4, 2)
    >>> teacher = TeacherOutput(torch.randn(2 * 8, 1024), torch.randn(2 * 8, 192), temp=0.04)
    >>> loss.compare(student, loss.prepare(teacher)).shape
    torch.Size([])

    The targets are softmax(scores / (student_temp * sharpening)). What keeps the networks from
    collapse is the second term: ln K minus the entropy of the mean prediction over all views of
    all processes' batches (Assran et al., 2022, eq. 2, with its weight 1).

    Args:
        out_dim: number of prototypes, K; 1,024 in the paper.
        student_temp: the student's softmax temperature.
        sharpening: of the targets, below 1.
        entropy_weight: of the second term.
        balanced: balance the targets of a batch by Sinkhorn-Knopp, as the published recipe for
            ViT-S does.
    """

    in_parts = False

    def __init__(
        self,
        out_dim: int,
        *,
        student_temp: float = 0.1,
        sharpening: float = 0.25,
        entropy_weight: float = 1.0,
        balanced: bool = False,
    ) -> None:
        super().__init__(out_dim, student_temp=student_temp)
        self.sharpening = sharpening
        self.entropy_weight = entropy_weight
        self.balanced = balanced

    @torch.no_grad()
    def prepare(self, teacher: TeacherOutput) -> Tensor:
        """Return the sharpened targets."""
        with in_float32(teacher.logits):
            temp = self.student_temp * self.sharpening
            log_q = F.log_softmax(teacher.logits.float() / temp, dim=-1)
            return sinkhorn_knopp(log_q, 1.0) if self.balanced else log_q.exp()

    def compare(self, student: StudentOutput, targets: Tensor | None) -> Tensor:
        """Return the cross-entropy between views, and how unevenly prototypes are used."""
        loss = super().compare(student, targets)
        with in_float32(student.logits):
            mean = F.softmax(student.logits.float() / self.student_temp, dim=-1).mean(dim=0)
            if _distributed():
                from torch.distributed.nn.functional import all_reduce  # with a gradient

                mean = all_reduce(mean) / dist.get_world_size()
            entropy = -torch.special.xlogy(mean, mean).sum()
            unevenness: Tensor = math.log(len(mean)) - entropy
            return loss + self.entropy_weight * unevenness

    def finish(self, teacher: TeacherOutput) -> None:
        """Do nothing: there is no centre."""


class PatchLoss(Objective):
    """iBOT's loss: cross-entropy between teacher and student at the hidden patches of one view.

    >>> loss, mask = PatchLoss(out_dim=4096), torch.zeros(2, 9, dtype=torch.bool)
    >>> mask[0, :3] = True                                # three patches of the first view
    >>> student, teacher = torch.randn(3, 4096), torch.randn(3, 4096)
    >>> loss(student, loss.targets(teacher, teacher_temp=0.07), mask).shape
    torch.Size([])
    >>> loss.update_center(teacher)

    The teacher sees the view whole. The cross-entropies of a view are averaged over its hidden
    patches, and those means over all views of the batch, in which a view without a hidden patch
    counts as 0: sum over views of (1 / hidden) * sum over its hidden patches, divided by the views
    (iBOT: Zhou et al., 2022, eq. 2; DINOv2's weights are the same numbers).

    Args:
        out_dim: number of prototypes, K.
        student_temp: the student's softmax temperature.
        center_momentum: of the running mean of the teacher's scores.
        centering: as in `DINOLoss`; Sinkhorn-Knopp balances the hidden patches of all processes.
        center_over: which patches' scores the centre is the mean of, in training: ``"all"``, hidden
            or not, as iBOT's, or the ``"hidden"`` ones, as DINOv2's. Over several processes DINOv2
            averages the means of each, however many patches they hide; here every patch weighs the
            same.

    Attributes:
        center: ``(1, K)`` buffer.
    """

    needs_patches = True
    center: Tensor

    def __init__(
        self,
        out_dim: int,
        *,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: Centering = "center",
        center_over: Literal["all", "hidden"] = "all",
    ) -> None:
        super().__init__()
        _check_centering(centering)
        if center_over not in ("all", "hidden"):
            raise ValueError(f"center_over must be all or hidden; got {center_over!r}.")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.centering = centering
        self.center_over = center_over
        self.register_buffer("center", torch.zeros(1, out_dim))

    @torch.no_grad()
    def targets(self, teacher: Tensor, teacher_temp: float) -> Tensor:
        """Turn the teacher's scores of hidden patches ``(M, K)`` into target distributions."""
        return _targets(teacher, self.center, teacher_temp, self.centering)

    def forward(self, student: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Return the scalar loss; 0, with a gradient of 0, where nothing is hidden.

        Args:
            student: ``(M, K)`` scores of the hidden patches, in the order of ``mask``.
            targets: ``(M, K)`` distributions of the teacher at the same patches.
            mask: ``(R, N)`` bool, True = hidden, of R views; M of them are hidden.

        Raises:
            ValueError: scores that are not those of the hidden patches, by their number.
        """
        if student.shape != targets.shape or mask.ndim != 2:
            raise ValueError(
                f"student and targets must be (M, K) and mask (R, N); got {tuple(student.shape)}, "
                f"{tuple(targets.shape)} and {tuple(mask.shape)}."
            )
        weights = (1 / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
        if len(weights) != len(student):
            raise ValueError(
                f"the mask hides {len(weights)} patches, but scores of {len(student)} came."
            )
        with in_float32(student):
            log_p = F.log_softmax(student.float() / self.student_temp, dim=-1)
            entropies = -(targets.float() * log_p).sum(dim=-1)
            return (entropies * weights).sum() / len(mask)

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """Move the centre towards the mean of scores ``(n, K)``, over all processes.

        Where no process has any, n = 0, it stays.
        """
        total, count = teacher.float().sum(dim=0, keepdim=True), teacher.new_tensor(len(teacher))
        count = count.float()
        if _distributed():
            dist.all_reduce(total)
            dist.all_reduce(count)
        mean = torch.where(count > 0, total / count.clamp(min=1), self.center)
        self.center.lerp_(mean, 1 - self.center_momentum)

    def prepare(self, teacher: TeacherOutput) -> Tensor:
        """Return ``targets`` of the teacher's patches that are hidden from the student."""
        assert teacher.patch_logits is not None
        return self.targets(teacher.patch_logits, teacher.patch_temp)

    def compare(self, student: StudentOutput, targets: Tensor | None) -> Tensor:
        """Return the loss at the hidden patches of the global views."""
        assert targets is not None
        loss: Tensor = self(student.patch_logits, targets, student.mask)
        return loss

    def finish(self, teacher: TeacherOutput) -> None:
        """Update the centre, after it was used."""
        seen = teacher.patch_mean if self.center_over == "all" else teacher.patch_logits
        assert seen is not None
        self.update_center(seen)


class KoLeoLoss(Objective):
    """Spreads a batch: minus the mean logarithm of the distance to the nearest other embedding.

    >>> KoLeoLoss()(torch.eye(3))
    tensor(-0.3466)

    Embeddings are taken to unit length. In training they are the student's class tokens before the
    head, and the loss is the sum over its global views, each by itself: two views of an image
    should not be apart. (Sablayrolles et al., 2019; DINOv2: Oquab et al., 2023, with weight 0.1.)
    """

    in_parts = False

    def forward(self, features: Tensor) -> Tensor:
        """Return the scalar loss of ``(B, D)`` embeddings; 0 for a single one."""
        with in_float32(features):
            unit = F.normalize(features.float(), eps=1e-8)
            if len(unit) < 2:
                return unit.sum() * 0
            with torch.no_grad():
                nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(dim=1)
            # eps: the slope at distance 0 is finite, so that twins in a batch do no harm.
            apart = F.pairwise_distance(unit, unit[nearest], eps=1e-8)
            return -(apart + 1e-8).log().mean()

    def compare(self, student: StudentOutput, targets: Tensor | None) -> Tensor:
        """Return the sum of the losses of the global views."""
        views = student.features.chunk(student.views)[: student.global_views]
        return torch.stack([self(view) for view in views]).sum()


class WeightedSum(Objective):
    """A weighted sum of losses, each known by its name.

    >>> objective = WeightedSum({"dino": DINOLoss(64), "koleo": KoLeoLoss()}, {"koleo": 0.1})
    >>> [(name, weight) for name, (_, weight) in objective.terms().items()]
    [('dino', 1.0), ('koleo', 0.1)]

    Args:
        losses: by name.
        weights: by the same names; 1 where there is none.

    Raises:
        ValueError: no loss, or a weight of none of them.
    """

    def __init__(
        self, losses: Mapping[str, Objective], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        weights = weights or {}
        if not losses or not set(weights) <= set(losses):
            raise ValueError(
                f"weights must be of the losses {', '.join(losses) or '(none)'}; got "
                f"{', '.join(weights)}."
            )
        self.losses = nn.ModuleDict(losses)
        self.weights = {name: float(weights.get(name, 1.0)) for name in losses}

    def terms(self) -> dict[str, tuple[Objective, float]]:
        """Return the losses and their weights, by name."""
        return {name: (self.losses[name], w) for name, w in self.weights.items()}  # type: ignore[misc]


# --- Objectives as text

_TEMPERED = ("student_temp", "center_momentum", "centering")


def _with(kind: Callable[..., Objective], *names: str) -> Callable[[Any], Objective]:
    """Return what builds a loss between scores from settings of these names."""
    return lambda s: kind(s.out_dim, **{name: getattr(s, name) for name in names})


LOSSES: dict[str, tuple[Callable[[Any], Objective], float]] = {
    "dino": (_with(DINOLoss, *_TEMPERED), 1.0),
    "ibot": (_with(PatchLoss, *_TEMPERED), 1.0),
    "koleo": (lambda settings: KoLeoLoss(), 0.1),
    "msn": (_with(MSNLoss, "student_temp"), 1.0),
}
"""Losses by name: how one is built from a run's settings of the head, and its usual weight."""


def parse_objective(text: str) -> dict[str, float]:
    """Return the weights of the losses that a text adds up, by name.

    >>> parse_objective("dino + ibot + 0.2*koleo"), parse_objective("dino+koleo")
    ({'dino': 1.0, 'ibot': 1.0, 'koleo': 0.2}, {'dino': 1.0, 'koleo': 0.1})

    Args:
        text: names joined by ``+``, each with a weight before it or with its usual one.

    Raises:
        ValueError: a name that is none, one that comes twice, or a weight that is not above 0.
    """
    weights: dict[str, float] = {}
    for term in text.split("+"):
        factor, star, name = (part.strip() for part in term.rpartition("*"))
        if name not in LOSSES or name in weights:
            raise ValueError(
                f"an objective is a sum such as dino+ibot+0.1*koleo, each of {', '.join(LOSSES)} "
                f"at most once; got {text!r}."
            )
        try:
            weights[name] = float(factor) if star else LOSSES[name][1]
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(f"the weight of {name} must be a number above 0; got {factor!r}.")
    return weights


def build_objective(text: str, settings: Any) -> Objective:
    """Build the losses that a text adds up.

    Args:
        text: as for `parse_objective`.
        settings: with ``out_dim``, ``student_temp``, ``center_momentum`` and ``centering``, as
            `maskdistill.training.TrainingConfig` has them.
    """
    weights = parse_objective(text)
    losses = {name: LOSSES[name][0](settings) for name in weights}
    if list(weights.values()) == [1.0]:
        return next(iter(losses.values()))
    return WeightedSum(losses, weights)


def _targets(scores: Tensor, center: Tensor, temp: float, centering: Centering) -> Tensor:
    """Return the teacher's distributions in float32, centred or balanced."""
    with in_float32(scores):
        if centering == "sinkhorn_knopp":
            return sinkhorn_knopp(scores, temp)
        return F.softmax((scores.float() - center) / temp, dim=-1)


def _check_centering(centering: str) -> None:
    if centering not in ("center", "sinkhorn_knopp"):
        raise ValueError(f"centering must be center or sinkhorn_knopp; got {centering!r}.")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Balance a batch's soft assignments, so that all prototypes are used alike.

    Args:
        scores: ``(B, K)`` on this process, B >= 0; all processes are balanced together.
        temperature: softmax temperature.
        iterations: of row and column normalisation.

    Returns:
        ``(B, K)`` float32, rows that sum to 1. (SwAV, Caron et al., 2020.)
    """
    distributed = _distributed()

    def total(x: Tensor) -> Tensor:
        if distributed:
            dist.all_reduce(x)
        return x

    # In the log domain nothing overflows, whatever the temperature.
    log_q = scores.float() / temperature
    for _ in range(iterations):
        none = log_q.new_full((1, log_q.shape[1]), -math.inf)  # a process may have no row
        peak = torch.cat([log_q, none]).amax(dim=0)
        if distributed:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        log_q = log_q - peak - total((log_q - peak).exp().sum(dim=0)).log()
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


@torch.no_grad()
def feature_spread(features: Tensor) -> Tensor:
    """Return how far unit-length features spread: 0 at one point, 1 in all directions.

    >>> feature_spread(torch.eye(2).repeat(3, 1))
    tensor(0.7071)

    Args:
        features: ``(n, D)``.

    Returns:
        sqrt(1 - |mean of the unit vectors|^2), a scalar float32 tensor; NaN where features are.
    """
    mean = F.normalize(features.float(), dim=-1).mean(dim=0)
    return (1 - mean.square().sum()).clamp(min=0).sqrt()
