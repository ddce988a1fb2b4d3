"""Any backbone, ready to be evaluated: a run's, a file's, or timm's by name."""

from __future__ import annotations

import difflib
import json
import os
import re
import warnings
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskdistill.data.crops import MEAN, STD
from maskdistill.data.writing import file_checksum
from maskdistill.models import MaskedViT, load_weights
from maskdistill.models.backbones import backbone_arguments
from maskdistill.models.probing import SIZE_ARGUMENTS
from maskdistill.models.tokens import Application
from maskdistill.models.weights import (
    Role,
    State,
    find_part,
    fitting_model,
    read_tensors,
    recognise,
    timm_name,
)

_BACKBONE = "backbone.safetensors"
_ARGUMENTS = "timm.create_model"  # the entry of that file's header
_CHECKPOINT = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")
_READABLE = (
    "Can be read: a run's folder, its backbone.safetensors or a file of its checkpoints; files of "
    "facebookresearch/dino, iBOT, DINOv2, DINOv3 and timm; a model of timm by name"
)


def load_backbone(
    source: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    depth: int | None = None,
    model: str | None = None,
    role: Role = "teacher",
    pretrained: bool = False,
    apply: Application | None = None,
    seed: int = 0,
) -> MaskedViT:
    """Return a backbone to evaluate, from wherever it comes.

    >>> vit = load_backbone("vit_tiny_patch16_224", image_size=64, patch_size=8, depth=2)
    >>> vit.embed(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 192])
    >>> load_backbone("runs/first")  # doctest: +SKIP
    >>> load_backbone("dino_deitsmall16_pretrain.pth")  # doctest: +SKIP
    >>> load_backbone("vit_small_patch16_224.dino", pretrained=True)  # doctest: +SKIP

    The model is built as the run's settings say, or as the shapes of the weights do. Weights do not
    say everything: of a file from elsewhere, the number of heads and the pooling are those of the
    timm model of that width, which ``model`` overrides.

    Args:
        source: the folder of a run (its ``backbone.safetensors``, else the newest checkpoint that
            is whole); one of these files; a file of weights from another code base, as
            `maskdistill.load_weights` reads them; or timm's name of a model.
        image_size: pixels of a side that the positions are made for; None is the source's own.
            Most models take others as well.
        patch_size: pixels of a side of a patch; None is the source's own. Another one resamples the
            filters.
        depth: number of blocks, with timm's name of a model; None is the model's own.
        model: timm's name of the model that a file from elsewhere is for; None finds out.
        role: which network of a checkpoint.
        pretrained: take timm's weights of the named model, which may download them, in place of
            random ones.
        apply: how masks are applied; None is as in the run, else ``"token"``.
        seed: of random weights.

    Returns:
        The model, wrapped and in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: neither a file nor a model, an unknown layout, a damaged file, or weights that
            do not fit.
    """
    path = Path(source).expanduser()
    sizes = {"img_size": image_size, "patch_size": patch_size}
    if path.is_dir() or path.is_file():
        for name, given in (("pretrained", pretrained), ("depth", depth is not None)):
            if given:
                raise ValueError(f"{path} has weights of its own; leave out {name}.")
        file = path if path.is_file() else _file_of_run(path, role)
        return _from_file(file, sizes, model, role, apply)
    name = os.fspath(source)
    if model is not None or path.suffix in (".pth", ".pt", ".bin", ".safetensors", ".tar"):
        raise FileNotFoundError(f"there is no file {path} to load a backbone from.")
    return _from_timm(name, {**sizes, "depth": depth}, pretrained, apply, seed)


def _from_timm(
    name: str,
    arguments: dict[str, Any],
    pretrained: bool,
    apply: Application | None,
    seed: int,
) -> MaskedViT:
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"{name!r} is no file, no folder and no model of timm.{hint} {_READABLE}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = _create(name, arguments, pretrained=pretrained)
        token = getattr(backbone, "cls_token", None)
        if not pretrained and isinstance(token, nn.Parameter):
            nn.init.trunc_normal_(token, std=0.02)  # as the trainer's networks start
    if pretrained:
        _warn_of_colours(name, backbone, stacklevel=4)
    return MaskedViT(backbone, apply or "token").eval()


def _create(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build a timm model without a classifier, for images of other sizes too where it can."""
    import timm

    given = {key: value for key, value in arguments.items() if value is not None}
    error: Exception | None = None
    for sizes in SIZE_ARGUMENTS:
        try:
            model: nn.Module = timm.create_model(
                name, **{"num_classes": 0, **sizes, **given}, pretrained=pretrained
            )
        except TypeError as problem:  # an argument that the family does not have
            error = problem
            continue
        except RuntimeError as problem:
            if "No pretrained weights" not in str(problem):
                raise
            raise ValueError(
                f"timm has no weights of {name}; timm.list_models(pretrained=True) lists those "
                "that it has. Leave out pretrained for random ones."
            ) from problem
        return model
    raise ValueError(
        f"{name} does not take {', '.join(f'{k}={v!r}' for k, v in given.items())}: {error}."
    ) from error


def _warn_of_colours(name: str, backbone: nn.Module, stacklevel: int) -> None:
    settings = getattr(backbone, "pretrained_cfg", None) or {}
    mean, std = (tuple(settings.get(key) or usual) for key, usual in (("mean", MEAN), ("std", STD)))
    if (mean, std) != (MEAN, STD):
        warnings.warn(
            f"{name} was trained on images normalised by {mean} and {std}, not by ImageNet's "
            f"statistics: pass statistics=({mean}, {std}) to extract_features.",
            UserWarning,
            stacklevel,
        )


# --- Files


def _file_of_run(folder: Path, role: Role) -> Path:
    """Return the file to read of a run's folder: the backbone, else the newest whole checkpoint."""
    if role == "teacher" and (folder / _BACKBONE).is_file():
        return folder / _BACKBONE
    found = [*folder.glob("checkpoints/step-*.pt"), *folder.glob("step-*.pt")]
    named = [(int(name[1]), path) for path in found if (name := _CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(named, reverse=True):
        if _is_whole(path):
            return path
        warnings.warn(
            f"{path} is damaged (its checksum does not match) and was passed over.",
            UserWarning,
            stacklevel=3,
        )
    there = sorted(path.name for path in folder.iterdir())
    what = (
        f"only damaged checkpoints ({len(named)})" if named else ", ".join(there[:5]) or "nothing"
    )
    raise ValueError(
        f"{folder} holds no {role} to load: it has neither {_BACKBONE} nor a whole checkpoint in "
        f"checkpoints/. Found: {what}. {_READABLE}."
    )


def _is_whole(path: Path) -> bool:
    """Compare a checkpoint of ours with the checksum in its name."""
    return path.stem.endswith(file_checksum(path))


def _from_file(
    path: Path,
    sizes: dict[str, int | None],
    model: str | None,
    role: Role,
    apply: Application | None,
) -> MaskedViT:
    if _CHECKPOINT.fullmatch(path.name) and not _is_whole(path):
        raise ValueError(f"{path} is damaged: its checksum does not match. Take an earlier one.")
    backbone, own = _build_for(path, sizes, model, role)
    vit = MaskedViT(backbone, apply or own or "token")
    load_weights(vit, path, role=role)
    return vit.eval()


def _build_for(
    path: Path, sizes: dict[str, int | None], model: str | None, role: Role
) -> tuple[nn.Module, Application | None]:
    """Build the model that a file is for, and say how its run applied masks, if it is a run's."""
    if model is not None:
        return _create(model, sizes), None
    wanted = {key: value for key, value in sizes.items() if value is not None}
    stated = _stated_arguments(path)
    if stated is not None:
        if role == "student":
            raise ValueError(f"{path} holds the teacher alone; give the folder of its run.")
        backbone = _create(stated.pop("model_name"), stated | wanted)
        if "pretrained_cfg_overlay" in stated:  # a fine-tuned model states its normalisation
            _warn_of_colours(str(path), backbone, stacklevel=5)
        return backbone, None
    name, content, tensors = read_tensors(path)
    config = content.get("config")
    if {"teacher", "student", "policy"} <= content.keys() and isinstance(config, Mapping):
        arguments = backbone_arguments(
            config["model"],
            sizes["img_size"] or config["image_size"],
            sizes["patch_size"] or config["patch_size"],
            config["depth"],
            config["local_size"],
        )
        return _create(arguments.pop("model_name"), arguments), config["apply"]
    part = find_part(tensors, {}, role, name)
    inside = {key[len(part) :]: value for key, value in tensors.items() if key.startswith(part)}
    known, arguments = _model_of(name, inside, recognise(content, tensors, part, inside))
    return _create(known, arguments | wanted), None


def _stated_arguments(path: Path) -> dict[str, Any] | None:
    """Return the arguments that a run writes into the header of its backbone's file, if any."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError:  # another kind of file, or a damaged one, which its reader tells
        return None
    if _ARGUMENTS not in header:
        return None
    arguments: dict[str, Any] = json.loads(header[_ARGUMENTS])
    return arguments


def _model_of(name: str, inside: State, layout: str) -> tuple[str, dict[str, Any]]:
    """Return timm's name of the ViT that the shapes are of, and the arguments to build it.

    Raises:
        ValueError: they are of none that is known; says what was found, and what can be read.
    """
    import timm

    patches = inside.get("patch_embed.proj.weight")
    blocks = {m[1] for key in inside if (m := re.match(r"blocks\.(?:\d+\.)?(\d+)\.", key))}
    if patches is not None and patches.ndim == 4 and blocks:
        registers = [
            inside[key].shape[1]
            for key in ("register_tokens", "storage_tokens", "reg_token")
            if key in inside
        ]
        width, patch = int(patches.shape[0]), int(patches.shape[-1])
        known, arguments = timm_name(
            inside, layout, width, len(blocks), patch, registers[0] if registers else 0
        )
        if known is not None and timm.is_model(known):
            positions = inside.get("pos_embed")
            if positions is not None and positions.ndim == 3:
                side = isqrt(int(positions.shape[1]) - 1)  # the class token has a position
                arguments["img_size"] = side * patch
            return known, arguments
    found = [f"{key} {tuple(value.shape)}" for key, value in list(inside.items())[:3]]
    raise ValueError(
        f"{name}: no model is known for these {len(inside)} tensors: {', '.join(found)}, ... "
        f"{fitting_model(inside, layout)} {_READABLE}. If timm has the model, name it: "
        "load_backbone(file, model='...')."
    )
