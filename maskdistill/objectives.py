"""What is learned from the views: DINO's projection head and its loss."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

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

    def forward(self, x: Tensor) -> Tensor:
        """Map embeddings ``(B, D)`` to prototype scores ``(B, K)`` float32."""
        logits: Tensor = self.last_layer(F.normalize(self.mlp(x), dim=-1))
        return logits


class DINOLoss(nn.Module):
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
        if centering not in ("center", "sinkhorn_knopp"):
            raise ValueError(f"centering must be center or sinkhorn_knopp; got {centering!r}.")
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
        scores = teacher.float()
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(scores, teacher_temp)
        return F.softmax((scores - self.center) / teacher_temp, dim=-1)

    def forward(self, student: Tensor, targets: Tensor, views: int) -> Tensor:
        """Return the scalar loss.

        Args:
            student: ``(V * B, K)`` scores, view by view, the global views first.
            targets: ``(G * B, K)`` distributions of the teacher's global views.
            views: number of student views, V.
        """
        log_p = F.log_softmax(student.float() / self.student_temp, dim=-1)
        log_p = rearrange(log_p, "(v b) k -> v (b k)", v=views)
        batch = student.shape[0] // views
        flat = rearrange(targets, "(g b) k -> g (b k)", b=batch)
        # One matrix product holds the cross-entropy of all pairs; the diagonal is the same view.
        pairs = -(flat @ log_p.T) / batch
        same = pairs.diagonal()
        return (pairs.sum() - same.sum()) / (pairs.numel() - same.numel())

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """Move the centre towards the mean of this step's scores, over all processes."""
        mean = teacher.float().mean(dim=0, keepdim=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 1 - self.center_momentum)


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Balance a batch's soft assignments, so that all prototypes are used alike.

    Args:
        scores: ``(B, K)`` on this process; all processes are balanced together.
        temperature: softmax temperature.
        iterations: of row and column normalisation.

    Returns:
        ``(B, K)`` float32, rows that sum to 1. (SwAV, Caron et al., 2020.)
    """
    distributed = dist.is_available() and dist.is_initialized()

    def total(x: Tensor) -> Tensor:
        if distributed:
            dist.all_reduce(x)
        return x

    # In the log domain nothing overflows, whatever the temperature.
    log_q = scores.float() / temperature
    for _ in range(iterations):
        peak = log_q.amax(dim=0)
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
