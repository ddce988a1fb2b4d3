"""A wrapper whose state dict has the keys of the model that it wraps."""

from __future__ import annotations

from typing import Any

from torch import nn

_CHILD = "backbone."
_TOKEN = "mask_token"


def own_mask_token(model: nn.Module, width: int) -> nn.Parameter | None:
    """Return the mask token that a model has already (DINOv2, Hugging Face), or None."""
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] == _TOKEN and parameter.numel() == width:
            return parameter
    return None


def install(wrapper: nn.Module) -> None:
    """Take the wrapper's level out of the keys when saving, and put it back when loading."""
    wrapper.register_state_dict_post_hook(_save)
    wrapper.register_load_state_dict_pre_hook(_load)


def _save(wrapper: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Rename ``backbone.blocks.0`` to ``blocks.0``, in place and in the order of the keys."""
    shared = _shares_token(wrapper)
    for key in [key for key in state if key.startswith(prefix)]:
        value = state.pop(key)
        rest = key[len(prefix) :]
        if rest == _TOKEN and shared:
            continue
        state[prefix + rest.removeprefix(_CHILD)] = value


def _load(wrapper: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Rename ``blocks.0`` to ``backbone.blocks.0``; a mask token that is missing stays as it is."""
    token: Any = wrapper._parameters.get(_TOKEN)
    own = token is not None and not _shares_token(wrapper)
    for key in [key for key in state if key.startswith(prefix)]:
        rest = key[len(prefix) :]
        if rest.startswith(_CHILD) or (rest == _TOKEN and own):
            continue
        state[prefix + _CHILD + rest] = state.pop(key)
    if token is not None:
        state.setdefault(prefix + _TOKEN, token.detach())
        if not own:  # one parameter under two names: both must load the same
            name = next(
                n
                for n, p in wrapper.named_parameters(remove_duplicate=False)
                if p is token and n != _TOKEN
            )
            state[prefix + _TOKEN] = state.get(prefix + name, token.detach())


def _shares_token(wrapper: nn.Module) -> bool:
    token = wrapper._parameters.get(_TOKEN)
    backbone: Any = wrapper.backbone
    return token is not None and any(token is p for p in backbone.parameters())
