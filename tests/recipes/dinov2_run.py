"""DINOv2's own training loop on a CPU, for a few steps on built-in scenes: a program of its own.

    python -m tests.recipes.dinov2_run CLONE --steps 10 [--separate-head]

CLONE is a checkout of facebookresearch/dinov2, patched or not. ``do_train`` and all that computes
in it run as they are; stand-ins take the places of what a CPU does not have, or what would have to
be installed: xFormers, FSDP, CUDA, half precision, Fvcore, OmegaConf. Prints a list in JSON, one
entry per step: the losses, the hidden patches of each row, and whether mask tokens have gradients.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from maskdistill.data import Scenes

SETTINGS = """
compute_precision.grad_scaler: false
dino.head_n_prototypes: 256
dino.head_hidden_dim: 128
dino.head_bottleneck_dim: 64
ibot.head_n_prototypes: 256
ibot.head_hidden_dim: 128
ibot.head_bottleneck_dim: 64
student.arch: vit_small
student.patch_size: 8
student.drop_path_rate: 0.0
crops.global_crops_size: 32
crops.local_crops_size: 16
crops.local_crops_number: 2
train.batch_size_per_gpu: 4
train.num_workers: 0
optim.epochs: 1
optim.lr: 0.0005
optim.warmup_epochs: 0
optim.clip_grad: null
optim.freeze_last_layer_epochs: 0
teacher.warmup_teacher_temp_epochs: 0
evaluation.eval_period_iterations: 0
"""


class Settings(dict):  # type: ignore[type-arg]
    """Nested settings with dots, as OmegaConf gives them."""

    def __init__(self, values: dict[str, Any]) -> None:
        nested = {k: Settings(v) if isinstance(v, dict) else v for k, v in values.items()}
        super().__init__(nested)

    def __getattr__(self, name: str) -> Any:
        return self[name]


class BlockDiagonalMask:
    """Several sequences in one, each of which attends to itself (xformers.ops.fmha)."""

    def __init__(self, batches: list[int], lengths: list[int]) -> None:
        self.batches, self.lengths = batches, lengths

    @classmethod
    def from_tensor_list(cls, tensors: list[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        mask = cls([len(t) for t in tensors], [t.shape[1] for t in tensors])
        return mask, torch.cat([t.reshape(1, -1, t.shape[-1]) for t in tensors], dim=1)

    @classmethod
    def from_seqlens(cls, lengths: list[int]) -> BlockDiagonalMask:
        return cls([1] * len(lengths), list(lengths))

    def split(self, joined: Tensor) -> list[Tensor]:
        rows = [b * n for b, n in zip(self._counts(), self._each(), strict=True)]
        parts = zip(joined[0].split(rows), self._counts(), strict=True)
        return [part.unflatten(0, (batch, -1)) for part, batch in parts]

    def _counts(self) -> list[int]:
        return getattr(self, "_batch_sizes", None) or self.batches  # DINOv2 sets the former

    def _each(self) -> list[int]:
        starts, at = [], 0
        for count in self._counts():
            starts.append(self.lengths[at])
            at += count if hasattr(self, "_batch_sizes") else 1
        return starts


def attend(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask | None = None) -> Tensor:
    def each(*qkv: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))
        return out.transpose(1, 2)

    if attn_bias is None:
        return each(q, k, v)
    parts = zip(*(attn_bias.split(x) for x in (q, k, v)), strict=True)
    return torch.cat([each(*part).flatten(0, 1)[None] for part in parts], dim=1)


def stand_in(name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


class Nothing:
    """A checkpointer that keeps nothing."""

    def __init__(self, *unused: Any, **named: Any) -> None: ...

    def resume_or_load(self, *unused: Any, **named: Any) -> dict[str, Any]:
        return {}

    def step(self, *unused: Any) -> None: ...


def put_up_stand_ins() -> None:
    ops = {
        "fmha": types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask),
        "memory_efficient_attention": attend,
        "unbind": torch.unbind,
        "scaled_index_add": None,  # for stochastic depth only, which is off
        "index_select_cat": None,
    }
    stand_in("xformers")
    stand_in("xformers.ops", **ops)
    stand_in("omegaconf", OmegaConf=types.SimpleNamespace(load=lambda path: None))
    stand_in("fvcore")
    stand_in("fvcore.common")
    stand_in("fvcore.common.checkpoint", Checkpointer=Nothing, PeriodicCheckpointer=Nothing)
    torch.Tensor.cuda = lambda self, *unused, **named: self  # type: ignore[assignment]
    torch.half = torch.float32


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, transform: Any) -> None:
        self.scenes, self.transform = Scenes(200, 48), transform

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Any, tuple[()]]:
        return self.transform(self.scenes[index][0]), ()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clone", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--separate-head", action="store_true")
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    put_up_stand_ins()
    sys.path.insert(0, str(args.clone))
    import dinov2.models.vision_transformer as vits  # type: ignore[import-not-found]
    from dinov2.train import ssl_meta_arch, train  # type: ignore[import-not-found]

    text = (args.clone / "dinov2" / "configs" / "ssl_default_config.yaml").read_text()
    config = Settings(yaml.safe_load(text))
    for path, value in yaml.safe_load(SETTINGS).items():
        group, name = path.split(".")
        config[group][name] = value
    config.ibot["separate_head"] = args.separate_head
    config.train["OFFICIAL_EPOCH_LENGTH"] = args.steps
    config.train["output_dir"] = tempfile.mkdtemp()

    block = functools.partial(vits.Block, attn_class=vits.MemEffAttention)
    vits.vit_small = functools.partial(
        vits.DinoVisionTransformer, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, block_fn=block
    )
    train.make_dataset = lambda dataset_str, transform, target_transform: Pictures(transform)
    train.FSDPCheckpointer = Nothing
    ssl_meta_arch.reshard_fsdp_model = lambda model: None
    model = train.SSLMetaArch(config)
    model.teacher.load_state_dict(model.student.state_dict())
    model.need_to_synchronize_fsdp_streams = False

    def update_teacher(momentum: float) -> None:  # the original's looks for FSDP's modules
        pairs = zip(model.teacher.parameters(), model.student.parameters(), strict=True)
        with torch.no_grad():
            for average, parameter in pairs:
                average.lerp_(parameter, 1 - momentum)

    steps: list[dict[str, Any]] = []
    forward_backward = model.forward_backward

    def watched(images: dict[str, Any], teacher_temp: float) -> Any:
        losses = forward_backward(images, teacher_temp)
        steps.append({
            "hidden": images["collated_masks"].sum(dim=1).tolist(),
            "student_gradient": bool(model.student.backbone.mask_token.grad.any()),
            "teacher_gradient": model.teacher.backbone.mask_token.grad is not None,
            **{name: float(loss.detach()) for name, loss in losses.items()},
        })  # fmt: skip
        return losses

    model.update_teacher, model.forward_backward = update_teacher, watched
    logging.disable(logging.CRITICAL)
    train.do_train(config, model)
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
