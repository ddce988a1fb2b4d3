"""From settings to networks, objective and optimiser, refusing early what cannot work."""

from __future__ import annotations

import torch
from torch import nn

from maskdistill.data.loading import derive_seed
from maskdistill.drawing import OF_EVERY_VIEW
from maskdistill.models import MaskedViT, MultiCropWrapper, create_backbone
from maskdistill.models.probing import evaluating
from maskdistill.models.speed import compile_blocks, unfuse_attention
from maskdistill.objectives import DINOHead, DINOLoss
from maskdistill.training.config import TrainingConfig
from maskdistill.training.distributed import Processes
from maskdistill.training.optimizer import parameter_groups
from maskdistill.training.sharding import replicate, shard
from maskdistill.training.step import TrainState, make_teacher
from maskdistill.views import ViewPolicy


def build_state(
    config: TrainingConfig,
    policy: ViewPolicy,
    processes: Processes,
    backbone: nn.Module | None = None,
) -> TrainState:
    """Build a fresh student, its teacher, the objective and the optimiser.

    Args:
        config: resolved settings; the weights depend on its seed alone.
        policy: that the networks will train under.
        processes: where to compute.
        backbone: a ViT to train instead of ``config.model``.

    Raises:
        ValueError: settings, model and policy that do not go together.
    """
    assert config.out_dim is not None, "the settings must be resolved"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.seed, "weights"))
        if backbone is None:
            backbone = create_backbone(
                config.model,
                config.image_size,
                config.patch_size,
                local_size=config.local_size,
                depth=config.depth,
                drop_path=config.drop_path,
            )
        vit = MaskedViT(backbone, config.apply)
        head = DINOHead(
            _embedding_width(vit, config),
            config.out_dim,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
            norm_last_layer=config.norm_last_layer,
        )
    if processes.device.type == "cpu" and (
        config.precision == "bfloat16" or _is_short(vit, config)
    ):
        unfuse_attention(vit)
    student = MultiCropWrapper(vit, head).to(processes.device)
    _check_policy(policy, config, vit)
    if vit.mask_token is not None and not policy.masks_student:
        # Without a gradient it would stop data parallelism.
        vit.mask_token.requires_grad_(False)
    for parameter in classifier_parameters(
        backbone
    ):  # nor has it one: it lies behind the embedding
        parameter.requires_grad_(False)
    objective = DINOLoss(
        config.out_dim,
        student_temp=config.student_temp,
        center_momentum=config.center_momentum,
        centering=config.centering,
    ).to(processes.device)
    teacher = make_teacher(student)
    if config.compile:
        for network in (student, teacher):
            compile_blocks(network.backbone.backbone)
    wrapped: nn.Module = student
    if config.sharding == "fsdp" and processes.world > 1:
        for network in (student, teacher):
            shard(network)
        with torch.no_grad():  # FSDP2 must see the whole network before its backbone alone
            teacher([_empty_image(vit, config.image_size)])
    elif processes.world > 1:
        wrapped = replicate(student, processes.device)
    optimizer = torch.optim.AdamW(
        parameter_groups(student, decay_tokens=config.decay_tokens), fused=True
    )
    return TrainState(wrapped, teacher, objective, optimizer)


def classifier_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a timm model's classifier, or classifiers."""
    find = getattr(backbone, "get_classifier", None)
    found = find() if callable(find) else ()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    return [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]


def _is_short(vit: MaskedViT, config: TrainingConfig) -> bool:
    """Say whether sequences are so short that fused attention is the slower one on a CPU."""
    rows, columns = vit.grid(config.image_size, config.image_size)
    return rows * columns <= 128


def _check_policy(policy: ViewPolicy, config: TrainingConfig, vit: MaskedViT) -> None:
    apply = getattr(policy, "apply", config.apply)  # a preset says how it is applied
    if apply != config.apply and policy.masks_student:
        raise ValueError(
            f"{policy!r} is applied by {apply!r}, but the settings say {config.apply!r}. Set "
            f"apply={apply!r}, or take its masks alone: ViewPolicy(student_global=...)."
        )
    unknown = sorted(policy.needs - {"attention"} - OF_EVERY_VIEW)
    if unknown:
        raise ValueError(
            f"the policy needs the signal(s) {unknown}, but the trainer supplies 'attention' and "
            f"{sorted(OF_EVERY_VIEW)} only. "
            "Supply others in a loop of your own, with policy.student_masks(...)."
        )
    if policy.global_crops != 2:
        raise ValueError(
            f"DINO's multi-crop has 2 global crops; the policy is for {policy.global_crops}. Its "
            "masker serves in a policy of your own: ViewPolicy(student_global=...)."
        )
    if "attention" in policy.needs:
        vit.attention(_empty_image(vit, config.image_size))  # refuses a model that has none
    if config.apply == "drop":
        _check_drop(policy, config, vit)


def _check_drop(policy: ViewPolicy, config: TrainingConfig, vit: MaskedViT) -> None:
    if "attention" in policy.needs and policy.teacher_global is not None:
        raise ValueError(
            "apply='drop' with teacher_global leaves the teacher without attention to the patches "
            f"it does not see, but {policy.student_global!r} needs it. Use apply='token'."
        )
    assert config.local_size is not None
    for masker, size in (
        (policy.student_global, config.image_size),
        (policy.student_local, config.local_size),
        (policy.teacher_global, config.image_size),
    ):
        rows, columns = vit.grid(size, size)
        for progress in (i / 64 for i in range(65)):
            count = 0 if masker is None else masker.fixed_count((rows, columns), progress)
            if count is None:
                raise ValueError(
                    f"apply='drop' needs a masker that hides the same number of patches in every "
                    f"image, and {masker!r} may not. Use .exactly(ratio), or apply='token'."
                )
            if count == rows * columns:
                raise ValueError(
                    f"apply='drop' with {masker!r} leaves no patch of a {rows}x{columns} grid. "
                    "Use a smaller ratio."
                )


def _empty_image(vit: MaskedViT, size: int) -> torch.Tensor:
    return torch.zeros(1, 3, size, size, device=next(vit.parameters()).device)


def _embedding_width(vit: MaskedViT, config: TrainingConfig) -> int:
    """Return the width of the embeddings of crops of all sizes; refuses sizes it does not take."""
    assert config.local_size is not None
    sizes = (config.local_size, config.image_size)
    with torch.no_grad(), evaluating(vit):
        widths = [vit.embed(_empty_image(vit, size)).shape[1] for size in sizes]
    return int(widths[-1])
