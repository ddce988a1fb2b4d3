"""Signs of collapse, from features and assignments alone: scalar tensors, on the device they came.

Nothing here reads a result, so a training step may call these and go on; a value is waited for
where it is logged. For the same reason NaN is refused on the CPU only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill import objectives


class PrototypeUsage(NamedTuple):
    """How many of the K prototypes a batch uses; scalar tensors.

    Attributes:
        share: prototypes that are some image's first choice, of K; at most B / K.
        perplexity: exp(entropy of the mean assignment), of K: 1 / K with one prototype alone, 1
            when all are used alike.
    """

    share: Tensor
    perplexity: Tensor


@torch.no_grad()
def effective_rank(features: Tensor, *, centre: bool = False) -> Tensor:
    """Return RankMe: the exponential of the entropy of the normalised singular values.

    >>> effective_rank(torch.eye(4))
    tensor(4.0000)
    >>> effective_rank(torch.ones(8, 4))
    tensor(1.0000)

    Garrido et al., 2023, eq. 1, uncentred as there. From 1, all features on one line, to min(n, D);
    the paper uses 25,600 images, and fewer than D of them bound the rank from above.

    The decomposition is the one thing here for which an accelerator makes the host wait: keep the
    features and call this when the values are logged, or use `participation_ratio`.

    Args:
        features: ``(n, D)``, not normalised.
        centre: subtract the mean first, which RankMe does not.

    Returns:
        A scalar float32 tensor.

    Raises:
        ValueError: misshapen or empty features, or (on the CPU) NaN or infinite ones.
    """
    _check("features", features)
    values = torch.linalg.svdvals(_as_floats(features, centre))
    # 1e-7 as in the paper: it keeps the logarithm of a rank-deficient matrix finite.
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + 1e-7
    rank: Tensor = (-(p * p.log()).sum()).exp()
    return rank


@torch.no_grad()
def participation_ratio(features: Tensor, *, centre: bool = False) -> Tensor:
    """Return (sum of the squared singular values)^2 over the sum of their fourth powers.

    >>> participation_ratio(torch.eye(4))
    tensor(4.)

    An effective rank that needs no decomposition, so that nothing waits; it gives weak directions
    less weight than RankMe and is never greater. Of centred features it is the participation ratio
    of their covariance's eigenvalues (Gao et al., 2017).

    Args:
        features: ``(n, D)``, not normalised.
        centre: subtract the mean first.

    Returns:
        A scalar float32 tensor, from 1 to min(n, D); NaN if all features are zero.

    Raises:
        ValueError: misshapen or empty features, or (on the CPU) NaN or infinite ones.
    """
    _check("features", features)
    x = _as_floats(features, centre)
    x = x / x.square().mean().sqrt()  # the ratio does not mind, and fourth powers stay in range
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    return gram.diagonal().sum().square() / gram.square().sum()


@torch.no_grad()
def feature_spread(features: Tensor) -> Tensor:
    """Return how far unit-length features spread, as ``objectives.feature_spread`` of a step.

    >>> feature_spread(torch.eye(2).repeat(3, 1))
    tensor(0.7071)

    Raises:
        ValueError: misshapen or empty features, or (on the CPU) NaN or infinite ones.
    """
    _check("features", features)
    return objectives.feature_spread(features)


@torch.no_grad()
def teacher_entropy(probabilities: Tensor) -> Tensor:
    """Return the mean entropy of the teacher's targets, in nats.

    >>> teacher_entropy(torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    tensor(0.6931)

    At ln(K) the teacher says nothing; at 0 each image has one prototype, which is collapse only if
    it is the same one: see `prototype_usage` (Caron et al., 2021, section 5.3).

    Args:
        probabilities: ``(B, K)``, rows that sum to 1.

    Returns:
        A scalar float32 tensor in [0, ln(K)].

    Raises:
        ValueError: misshapen or empty probabilities, or (on the CPU) ones that are no
            distributions.
    """
    _check_probabilities(probabilities)
    return entropy(probabilities.float()).mean()


@torch.no_grad()
def kl_to_uniform(probabilities: Tensor) -> Tensor:
    """Return the mean divergence of assignments from the uniform one, in nats: ln(K) - entropy.

    >>> kl_to_uniform(torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    tensor(0.6931)

    Of each image it falls to 0 when the output is uniform; of the batch's mean,
    ``probabilities.mean(dim=0, keepdim=True)``, it rises to ln(K) when all images share a
    prototype. Those are the two ways in which DINO collapses (Caron et al., 2021, section 5.3).

    Args:
        probabilities: ``(B, K)``, rows that sum to 1.

    Returns:
        A scalar float32 tensor in [0, ln(K)].

    Raises:
        ValueError: as for `teacher_entropy`.
    """
    _check_probabilities(probabilities)
    return math.log(probabilities.shape[-1]) - entropy(probabilities.float()).mean()


@torch.no_grad()
def prototype_usage(probabilities: Tensor) -> PrototypeUsage:
    """Return how many prototypes a batch uses, by first choices and by the mean assignment.

    >>> prototype_usage(torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0]]))
    PrototypeUsage(share=tensor(0.5000), perplexity=tensor(0.5000))

    A batch of B images has at most B first choices: with K = 65536 join the probabilities of many
    batches, or read the share against B / K.

    Args:
        probabilities: ``(B, K)``, rows that sum to 1.

    Raises:
        ValueError: as for `teacher_entropy`.
    """
    _check_probabilities(probabilities)
    p = probabilities.float()
    first = torch.zeros(p.shape[1], device=p.device).index_fill_(0, p.argmax(dim=1), 1.0)
    return PrototypeUsage(first.mean(), entropy(p.mean(dim=0)).exp() / p.shape[1])


@torch.no_grad()
def alignment(first: Tensor, second: Tensor, *, power: float = 2.0) -> Tensor:
    """Return how far two views of the same images lie apart: 0 is best.

    >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor(2.0000)

    Wang and Isola, 2020: the mean of |x - y|^power over unit-length features x, y of one image.

    Args:
        first: ``(n, D)``, of one view of each image.
        second: ``(n, D)``, of another view of the same images, in the same order.
        power: the paper's alpha.

    Returns:
        A scalar float32 tensor, from 0 to 2 ** power.

    Raises:
        ValueError: features that do not match, or (on the CPU) NaN or infinite ones.
    """
    _check("first", first)
    _check("second", second)
    if first.shape != second.shape:
        raise ValueError(
            "the two views must have features of the same images, (n, D) both; got "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    x, y = (F.normalize(part.float(), dim=1) for part in (first, second))
    distance: Tensor = (x - y).norm(dim=1).pow(power).mean()
    return distance


@torch.no_grad()
def uniformity(features: Tensor, *, scale: float = 2.0, chunk: int = 1024) -> Tensor:
    """Return how evenly features cover the sphere: the lower, the more evenly; 0 at one point.

    >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    tensor(-8.)

    Wang and Isola, 2020: the logarithm of the mean of exp(-scale * |x - y|^2) over all pairs of
    different images, with unit-length features.

    Args:
        features: ``(n, D)``, n >= 2.
        scale: the paper's t.
        chunk: images whose pairs are formed at a time, which bounds the memory.

    Returns:
        A scalar float32 tensor in [-4 * scale, 0].

    Raises:
        ValueError: fewer than two features, or (on the CPU) NaN or infinite ones.
    """
    _check("features", features)
    if len(features) < 2:
        raise ValueError("uniformity is over pairs of images; give features of at least two.")
    x = F.normalize(features.float(), dim=1)
    total = x.new_zeros((), dtype=torch.float64)
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        near = (scale * (2 * (part @ x.T) - 2)).exp()  # |x - y|^2 = 2 - 2 <x, y>
        near.diagonal(start).zero_()  # an image with itself is no pair
        total += near.sum(dtype=torch.float64)
    return (total / (len(x) * (len(x) - 1))).log().float()


def _as_floats(features: Tensor, centre: bool) -> Tensor:
    x = features.float()
    return x - x.mean(dim=0) if centre else x


def entropy(shares: Tensor) -> Tensor:
    """Return the entropy in nats of distributions ``(..., K)``, over the last dimension."""
    found: Tensor = torch.special.entr(shares).sum(dim=-1)
    return found


def _check(name: str, features: Tensor) -> None:
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"{name} must be (n, D) with n >= 1; got {tuple(features.shape)}.")
    if _may_look_at(features) and not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name} hold NaN or infinite numbers; has training diverged?")


def _check_probabilities(p: Tensor) -> None:
    if p.ndim != 2 or not p.numel():
        raise ValueError(f"probabilities must be (B, K) with B >= 1; got {tuple(p.shape)}.")
    if not _may_look_at(p):
        return
    off = (p.float().sum(dim=1) - 1).abs()
    # Written so that NaN is refused as well; the margin forgives the rounding of bfloat16.
    if not bool((p >= 0).all()) or not bool((off < 0.05).all()):
        raise ValueError(
            "probabilities must be non-negative, in rows that sum to 1. Put scores through the "
            "teacher's softmax first: loss.targets(scores, teacher_temp)."
        )


def _may_look_at(tensor: Tensor) -> bool:
    """Whether reading a value is free: on an accelerator the host would wait for it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
