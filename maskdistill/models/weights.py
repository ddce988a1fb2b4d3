"""Weights from elsewhere into a model: several code bases' layouts, checked whole, then loaded."""

from __future__ import annotations

import argparse
import codecs
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maskdistill.models.masked_vit import MaskedViT

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


TITLES = {
    "timm": "timm",
    "maskdistill": "maskdistill checkpoint",
    "dino": "facebookresearch/dino checkpoint",
    "ibot": "iBOT checkpoint",
    "dinov2": "DINOv2",
    "dinov3": "DINOv3",
}

# What a file may have and a model not, and why that is left out.
_SPARE = {
    r"^(head\w*|fc|last_layer|classifier|projectors)\.": "heads, which the model does not have",
    r"^(decoder|predictor)": "a decoder or predictor",
}
# Why timm's conversion leaves out what it does.
_CONVERTED = {
    r"(^|\.)rope": "constants, which the model computes",
    r"\.qkv\.bias_mask$": "masks of biases, which are applied",
    r"\.qkv\.bias$": "biases of zero, which the model does not have",
    r"^local_cls_norm\.": "used in training only",
}
_MASK_TOKENS = ("mask_token", "masked_embed")


@dataclass(frozen=True)
class LoadedWeights:
    """What ``load_weights`` recognised, loaded and left out; ``print`` it to read it.

    Attributes:
        layout: ``"timm"`` (which facebookresearch/dino's and iBOT's backbone files are, too),
            ``"maskdistill"``, ``"dino"``, ``"ibot"``, ``"dinov2"`` or ``"dinov3"``.
        part: what the keys of the loaded part start with, such as ``"teacher.backbone."``.
        tensors: number of the model's tensors that were loaded, the mask token among them.
        mask_token: whether the file's mask token was loaded.
        resized: the shape in the file and in the model, by the model's key.
        left_out: why a tensor of the file was not loaded, by its key in the file.
    """

    layout: str
    part: str
    tensors: int
    mask_token: bool
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """Tell it in a few lines, keys of one reason together."""
        token = ", the mask token among them" if self.mask_token else ""
        part = f", from {self.part}*" if self.part else ""
        lines = [f"{TITLES[self.layout]}{part}: {self.tensors} tensors loaded{token}"]
        lines += [f"resized: {key} from {was} to {now}" for key, (was, now) in self.resized.items()]
        reasons: dict[str, list[str]] = {}
        for key, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(key)
        for reason, keys in reasons.items():
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            lines.append(f"left out: {keys[0]}{more} ({reason})")
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    role: Role = "teacher",
) -> LoadedWeights:
    """Load a file of weights into a model, whichever code base wrote it.

    >>> vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0)  # doctest: +SKIP
    >>> print(load_weights(MaskedViT(vit), "dinov2_vits14_pretrain.pth"))  # doctest: +SKIP
    DINOv2: 175 tensors loaded, the mask token among them

    The layout is recognised by the keys: timm's, this library's, facebookresearch/dino's, iBOT's,
    DINOv2's and DINOv3's, released backbones and training checkpoints. timm's own conversion is
    used, which also resamples position and patch embeddings for another image or patch size.
    Everything is checked before anything is loaded; the model's device, dtype and
    ``requires_grad`` stay as they are.

    Args:
        model: a ``MaskedViT`` or the model itself, on any device but meta.
        source: a ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file, read without running any
            code in it, or a mapping of tensors, which may be nested.
        role: which network of a training checkpoint to take. Files that hold only one, and do not
            say which, are taken as they are.

    Returns:
        A report. A mask token in the file goes into a ``MaskedViT`` with ``apply="token"``; heads,
        optimisers and the other network are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged, holds code or no weights, or does not fit the model;
            nothing has been loaded then.
    """
    vit, backbone = _targets(model)
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}; got {role!r}.")
    name, content, tensors = read_tensors(source)
    own = dict(backbone.state_dict())
    part = find_part(tensors, own, role, name)
    inside = {key[len(part) :]: value for key, value in tensors.items() if key.startswith(part)}
    layout = recognise(content, tensors, part, inside)
    left_out = {key: f"not of the {role}'s backbone" for key in tensors if not key.startswith(part)}

    token_key, why_not = _find_mask_token(tensors, inside, part, vit, own)
    token = tensors[token_key] if token_key and not why_not else None
    if token_key:
        left_out.pop(token_key, None)
        if why_not:
            left_out[token_key] = why_not
    plain = {key: value for key, value in inside.items() if key in own or key not in _MASK_TOKENS}

    known = part or layout != "timm" or inside.keys() & own.keys()
    where = f"{name} ({TITLES[layout]}{', ' + part + '*' if part else ''})" if known else name
    with torch.no_grad():
        state, failure = _convert(plain, own, layout, backbone, where)
    misfit = _misfit(state, own, inside, layout, backbone)
    if misfit:
        raise ValueError(f"{where} does not fit {misfit} Nothing was loaded.") from failure
    resized, unused = _compare(plain, state, own)
    left_out.update({part + key: why for key, why in unused.items()})

    backbone.load_state_dict({key: state[key] for key in own})
    if vit is not None and vit.mask_token is not None and token is not None:
        with torch.no_grad():
            vit.mask_token.copy_(token.reshape(vit.mask_token.shape))
    loaded = len(own) + (token is not None)
    return LoadedWeights(layout, part, loaded, token is not None, resized, left_out)


def _targets(model: nn.Module) -> tuple[MaskedViT | None, nn.Module]:
    """Return the MaskedViT, if it is one, and the model that the weights are for."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    model = _unwrap(model)
    vit = model if isinstance(model, MaskedViT) else None
    backbone = _unwrap(model if vit is None else vit.backbone)
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise ValueError(
            "the model is on the meta device and has no memory for weights; call "
            "model.to_empty(device='cpu') first, or build it outside torch.device('meta')."
        )
    return vit, backbone


def _unwrap(model: nn.Module) -> nn.Module:
    """Take torch.compile's and DDP's wrappers off."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


# --- Fitting it to the model


def _find_mask_token(
    tensors: State, inside: State, part: str, vit: MaskedViT | None, own: State
) -> tuple[str | None, str | None]:
    """Return the key of the file's mask token, if any, and why it cannot be loaded, if so."""
    # A wrapper's token stands next to the model's own keys, one level up.
    above = re.sub(r"[^.]+\.$", "", part)
    keys = [place + name for place in (part, above) for name in _MASK_TOKENS]
    key = next((key for key in keys if key in tensors), None)
    if key is None or key.removeprefix(part) in own:
        return None, None
    token = tensors[key]
    if vit is None:
        return key, "a mask token; wrap the model in MaskedViT(model, apply='token') to take it"
    if vit.mask_token is None:
        return key, f"a mask token, and apply={vit.apply_mask!r} has none"
    if token.numel() != vit.mask_token.numel() or holds(inside, r"^decoder"):
        return key, f"a mask token of another network: {tuple(token.shape)}"
    return key, None


def _convert(
    plain: State, own: State, layout: str, backbone: nn.Module, where: str
) -> tuple[State, Exception | None]:
    """Rename and resize to what the model wants, as timm does for its own released weights.

    Returns what could be done, and what stopped timm, if anything did.
    """
    if all(key in plain and plain[key].shape == value.shape for key, value in own.items()):
        # The model's own layout; timm might take it for something else.
        return plain, None
    state = dict(plain)
    if layout == "dinov3":
        _settle_biases(state, own, where)
    if layout == "dinov2":
        state = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", k): v for k, v in state.items()}
    convert = _timms_conversion(backbone)
    if convert is None:
        return state, None
    _check_square(state, own, backbone, where)
    # timm's sign of DINOv2's layout, which it throws away.
    sign = {"mask_token": torch.zeros(())} if layout == "dinov2" else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about timm's way to interpolate
            return convert({**state, **sign}, backbone), None
    except Exception as error:  # another kind of network altogether: its keys will tell
        return state, error


def _timms_conversion(backbone: nn.Module) -> Callable[[State, nn.Module], State] | None:
    """Return the ``checkpoint_filter_fn`` of the model's family, if it is timm's."""
    for cls in type(backbone).__mro__:
        convert = getattr(sys.modules.get(cls.__module__), "checkpoint_filter_fn", None)
        if convert is not None:
            return convert  # type: ignore[no-any-return]
    return None


def _settle_biases(state: State, own: State, where: str) -> None:
    """Apply DINOv3's masks of biases, and take biases away that are zero where there are none.

    timm's models have no bias of the keys, and those without "qkvb" in their name none at all;
    its conversion drops what they lack, whatever it is.
    """
    for key in [key for key in state if key.endswith(".qkv.bias") and key not in own]:
        bias, mask = state[key], state.pop(f"{key}_mask", None)
        if mask is not None and mask.isfinite().all():
            state[key] = bias = bias * mask
        if bias.chunk(3)[1].any():
            raise ValueError(
                f"{where} has a bias of the keys, {key}, which timm's DINOv3 models do not have. "
                "Train with mask_k_bias=True, as the released models, or use DINOv3's own code. "
                "Nothing was loaded."
            )
        if key.replace("qkv.bias", "q_bias") not in own:
            if bias.any():
                raise ValueError(
                    f"{where} has biases, {key} and so on, and the model has none. "
                    f"{fitting_model(state, 'dinov3')} Nothing was loaded."
                )
            del state[key]


def _check_square(state: State, own: State, backbone: nn.Module, where: str) -> None:
    """Refuse to resample positions of a grid that is not square: a file does not say its sides."""
    there, here = state.get("pos_embed"), own.get("pos_embed")
    if there is None or here is None or there.ndim != 3 or there.shape == here.shape:
        return
    registers = bool({"register_tokens", "reg_token"} & state.keys())
    if registers != ("reg_token" in own):
        return  # not the file's only misfit
    prefix = int(getattr(backbone, "num_prefix_tokens", 1))
    if getattr(backbone, "no_embed_class", False):
        prefix = int("register_tokens" in state)  # DINOv2's: the class token alone has a position
    count = there.shape[1] - prefix
    if count != here.shape[1] and int(max(count, 0) ** 0.5) ** 2 != count:
        raise ValueError(
            f"{where} has positions for {count} patches, which are no square, and the model wants "
            f"{here.shape[1] - prefix}. Build the model with the img_size of the file. "
            "Nothing was loaded."
        )


def _misfit(
    state: State, own: State, inside: State, layout: str, backbone: nn.Module
) -> str | None:
    """Say what does not fit, naming at most five keys and the model that would fit."""
    problems = {
        "missing": [key for key in own if key not in state],
        "unknown to the model": [key for key in state if key not in own and not _why(key, _SPARE)],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
        "of another type": [
            f"{key} {state[key].dtype} instead of {value.dtype}"
            for key, value in own.items()
            if key in state and state[key].is_floating_point() != value.is_floating_point()
        ],
    }
    periods, rope = inside.get("rope_embed.periods"), getattr(backbone, "rope", None)
    ours = getattr(rope, "periods", None)
    if periods is not None and isinstance(ours, Tensor):
        # The released files hold them in bfloat16.
        same = periods.shape == ours.shape and torch.allclose(
            periods.float().cpu(), ours.float().cpu(), rtol=0.02
        )
        if not same:
            problems["other rotary periods than the model's"] = ["rope_embed.periods"]
    listed = itertools.zip_longest(
        *([(kind, key) for key in keys] for kind, keys in problems.items())
    )
    first = [one for row in listed for one in row if one is not None][:5]
    if not first:
        return None
    told = []
    for kind, keys in problems.items():
        shown = [key for name, key in first if name == kind]
        if shown:
            more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
            told.append(f"{kind}: {', '.join(shown)}{more}")
    keys = [key for found in problems.values() for key in found]
    if all(key.startswith("head") for key in keys):
        advice = (
            "The model has a classifier that the file does not fit: build it with num_classes=0, "
            "load, then call reset_classifier."
        )
    else:
        advice = fitting_model(inside, layout)
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    kind = cfg.get("architecture") or type(backbone).__name__
    return f"{kind}: {'; '.join(told)}. {advice}"


def _why(key: str, reasons: dict[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if re.search(pattern, key)), None)


def _compare(
    plain: State, state: State, own: State
) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], dict[str, str]]:
    """Return what was resized, and which keys of the part were not used, and why."""
    loaded = {state[key].data_ptr() for key in own}
    resized, unused = {}, {}
    for key, value in plain.items():
        inner = re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key)
        if inner in own:
            was, now = tuple(value.shape), tuple(own[inner].shape)
            # DINOv2 with registers: the class token's position is added to the class token.
            moved = inner == "pos_embed" and "register_tokens" in plain
            if was != now and not (moved and was[1] - 1 == now[1]):
                resized[inner] = (was, now)
        elif value.data_ptr() not in loaded:
            unused[key] = _why(key, _SPARE | _CONVERTED) or "not used by timm's conversion"
    return resized, unused
