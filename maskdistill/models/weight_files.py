"""Files of weights: read without running code; which network is in them, and which model fits."""

from __future__ import annotations

import argparse
import codecs
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Role = Literal["teacher", "student"]
State = dict[str, Tensor]

# The words by which code bases tell the two networks apart in their keys; the first counts most.
ROLES: dict[Role, tuple[str, ...]] = {
    "teacher": ("teacher", "ema", "target", "momentum"),
    "student": ("student", "online"),
}
# Wrappers that put themselves between a module and its children.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def read_tensors(
    source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[str, Mapping[str, Any], State]:
    """Return a name for messages, the content, and all tensors in it by dotted key.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds code, or no tensors.
    """
    if isinstance(source, Mapping):
        name, content = "the mapping", source
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        name, content = path.name, _read_file(path)
    else:
        raise ValueError(
            "source must be the path of a file or a mapping of tensors, such as "
            f"model.state_dict(); got {type(source).__name__}."
        )
    tensors: State = {}
    _collect(content, "", tensors)
    if not tensors:
        raise ValueError(f"{name} holds no tensors{_kinds(content)}; it is no file of weights.")
    empty = next((key for key, value in tensors.items() if value.is_meta), None)
    if empty is not None:
        raise ValueError(f"{name} has tensors on the meta device, without values, such as {empty}.")
    return name, content, tensors


def _read_file(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder. Give the file in it; of torch.distributed.checkpoint's folders, "
            "make one: python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to load weights from.")
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path} is empty.")
    try:
        # By content, not by name: safetensors begin with the length of a JSON header.
        content = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path)
    except Exception as error:  # of many kinds; torch takes some damaged files for OSErrors
        raise ValueError(_why_unreadable(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, not a mapping of tensors as "
            "torch.save(model.state_dict(), path) writes it."
        )
    return content


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _plain_types() -> list[Any]:
    """Return what DINO's and iBOT's checkpoints hold besides tensors, and what runs no code.

    Their command line, and learning rates that are numbers of NumPy.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds: list[Any] = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")]
    old, new = "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"
    return [argparse.Namespace, np.dtype, codecs.encode, (scalar, old), (scalar, new), *kinds]


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals(_plain_types()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other pickle protocols: what follows is tested anyway
        return torch.load(path, map_location="cpu", weights_only=True)


def _why_unreadable(path: Path, error: Exception) -> str:
    text = str(error)
    code = re.search(r"GLOBAL:? (\S+)", text)
    if code:
        return (
            f"{path} holds more than tensors and plain values: it asks for {code[1]}, which could "
            "run code and was not called. If you trust where it is from, read it yourself by "
            "torch.load(path, weights_only=False) and give load_weights what comes out."
        )
    lines = [line for line in text.splitlines() if line.strip()]
    return (
        f"{path} cannot be read as a file of weights ({type(error).__name__}"
        f"{': ' + lines[0][:100] if lines else ''}). It is truncated, damaged or of another kind; "
        ".safetensors files and those of torch.save can be read."
    )


def _collect(content: Mapping[Any, Any], prefix: str, tensors: State) -> None:
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[_WRAPPERS.sub("", f"{prefix}{key}")] = value
        elif isinstance(value, Mapping):
            _collect(value, f"{prefix}{key}.", tensors)


def _kinds(content: Mapping[Any, Any]) -> str:
    kinds = [f"{key} is a {type(value).__name__}" for key, value in list(content.items())[:3]]
    return f" ({', '.join(kinds)})" if kinds else ": it is empty"


def holds(keys: Iterable[str], pattern: str) -> bool:
    """Whether one of the keys has the pattern."""
    return any(re.search(pattern, key) for key in keys)


# --- Finding the backbone in the file


def find_part(tensors: State, own: State, role: Role, name: str) -> str:
    """Return what the keys of the wanted backbone start with.

    Code bases nest and name their networks in many ways, but what is inside a network has one name
    in all of them: the patch embedding. Whatever stands before it is the prefix.
    """
    is_vit = holds(tensors, r"(^|\.)patch_embed\.proj\.weight$")
    anchors = ["patch_embed.proj.weight"] if is_vit else list(own)[:3]
    found = {
        key[: -len(anchor)]
        for key in tensors
        for anchor in anchors
        if key == anchor or key.endswith(f".{anchor}")
    }
    counts = {part: sum(part + key in tensors for key in own) for part in found}
    least = max(counts.values(), default=0)
    if not is_vit:
        least = max(least, len(own))  # other names are too common to tell
    parts = sorted(part for part in found if 2 * counts[part] >= least)

    def rank(part: str, role: Role) -> int:
        words = re.split(r"[._]", part)
        if "gram" in words:  # DINOv3 keeps an old teacher by this name, for another loss
            return len(ROLES[role])
        return min((i for i, w in enumerate(ROLES[role]) if w in words), default=9)

    other: Role = "student" if role == "teacher" else "teacher"
    mine = [part for part in parts if rank(part, role) < len(ROLES[role])]
    mine = [part for part in mine if rank(part, role) == min(rank(p, role) for p in mine)]
    nobodys = [part for part in parts if rank(part, role) == rank(part, other) == 9]
    chosen = mine or nobodys
    if len(chosen) == 1:
        return chosen[0]
    if len(chosen) > 1:
        raise ValueError(
            f"{name} holds several networks that could be the {role}: "
            f"{', '.join(part + '*' for part in chosen[:5])}. Give load_weights the mapping of one."
        )
    if not parts:  # another family of models: timm's own conversion may know it
        wraps = ("model.", "state_dict.", "module.")
        return next((w for w in wraps if any(key.startswith(w) for key in tensors)), "")
    raise ValueError(
        f"{name} holds no {role}, only {', '.join(part + '*' for part in parts[:5])}. "
        f"Pass role={other!r} to load that."
    )


def recognise(content: Mapping[str, Any], tensors: State, part: str, inside: State) -> str:
    """Return the layout of the part, by keys that only that code base has."""
    if {"storage_tokens", "rope_embed.periods"} & inside.keys():
        return "dinov3"
    if holds(inside, r"^register_tokens$|^blocks\.\d+\.\d+\.(norm1|attn)\."):
        return "dinov2"
    if "mask_token" in inside and inside["mask_token"].ndim == 2:
        return "dinov2"
    if {"format", "policy", "objective"} <= content.keys():
        return "maskdistill"
    if "masked_embed" in inside or holds(tensors, r"^ibot_loss\."):
        return "ibot"
    if part and holds(tensors, r"^dino_loss\.|(^|\.)head\.last_layer\.weight_[gv]$"):
        return "dino"
    return "timm"


# --- What model a file is for

_SIZES = {
    "dinov2": {384: ("small", 12), 768: ("base", 12), 1024: ("large", 24), 1536: ("giant", 40)},
    "dinov3": {
        192: ("tiny", 12),
        384: ("small", 12),
        768: ("base", 12),
        1024: ("large", 24),
        1280: ("huge_plus", 32),
        4096: ("7b", 40),
    },
    "others": {
        192: ("tiny", 12),
        384: ("small", 12),
        768: ("base", 12),
        1024: ("large", 24),
        1280: ("huge", 32),
    },
}


def fitting_model(state: Mapping[str, Tensor], layout: str) -> str:
    """Return a sentence on what the file holds, and the timm model that it is for, if known."""
    if holds(state, r"(^|\.)(encoder\.)?layer\.\d+\.(attention|norm1)\."):
        return (
            "The keys are those of Hugging Face transformers; take the authors' own file of the "
            "same weights, or timm's."
        )
    patches = state.get("patch_embed.proj.weight")
    blocks = [re.match(r"blocks\.(?:\d+\.)?(\d+)\.", key) for key in state]
    depth = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    if patches is None or patches.ndim != 4 or not depth:
        return "Its layout is not known: it has no patch_embed.proj.weight with blocks, as a ViT."
    width, patch = patches.shape[0], patches.shape[-1]
    registers = next(
        (
            state[k].shape[1]
            for k in ("register_tokens", "storage_tokens", "reg_token")
            if k in state
        ),
        0,
    )
    told = f"The file holds {depth} blocks of width {width} in patches of {patch}" + (
        f" with {registers} register tokens" if registers else ""
    )
    name, arguments = timm_name(state, layout, width, depth, patch, registers)
    if name is None:
        return f"{told}."
    import timm

    if not timm.is_model(name):
        return (
            f"{told}, which is {name}; timm {timm.__version__} does not have it. "
            "DINOv3's models came with timm 1.0.20."
        )
    written = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f"{told}: build timm.create_model({name!r}, num_classes=0{written})."


def timm_name(
    state: Mapping[str, Tensor], layout: str, width: int, depth: int, patch: int, registers: int
) -> tuple[str | None, dict[str, Any]]:
    """Return the name of timm's model and what differs from it; None for what cannot be told."""
    size, blocks = _SIZES.get(layout, _SIZES["others"]).get(width, (None, 0))
    if size is None:
        return None, {}
    arguments: dict[str, Any] = {}
    if layout == "dinov3":
        biased = any(
            part.any()
            for key, bias in state.items()
            if key.endswith(".qkv.bias")
            for part in bias.chunk(3)[::2]  # the keys' is masked
        )
        plus = "_plus" if size == "small" and holds(state, r"\.mlp\.w1\.") else ""
        name, usual, patches = f"vit_{size}{plus}_patch16_dinov3{'_qkvb' * biased}", 4, 16
        arguments["global_pool"] = "token"
    elif layout == "dinov2":
        usual, patches = (4 if registers else 0), 14
        name = f"vit_{size}_patch14_{'reg4_' * bool(registers)}dinov2"
    elif registers or not {"cls_token", "pos_embed"} <= state.keys() or holds(state, r"gamma|rel"):
        return None, {}  # timm has many of these
    else:
        usual, patches = 0, {"huge": 14}.get(size, 16)
        if patch == 8 and size in ("small", "base"):
            patches = 8
        name = f"vit_{size}_patch{patches}_224"
    if registers != usual:
        arguments["reg_tokens" if layout == "dinov2" else "num_reg_tokens"] = registers
    if patch != patches:
        arguments["patch_size"] = patch
    if depth != blocks:
        arguments["depth"] = depth
    return name, arguments
