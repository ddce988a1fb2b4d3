"""What a wrapper is to other people's code: the wrapped model, by its own names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_CHILD = "backbone."
TOKEN = "mask_token"


class Transparent(nn.Module):
    """Holds a model as ``backbone`` and shows its keys and attributes as its own.

    State dicts lack the level of the wrapper, as those of torch's activation checkpointing do.
    Attributes that the wrapper does not have are read from the model, and written to it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # First, since a model may have a mask token of its own, which would be found by attribute.
        self.register_parameter(TOKEN, None)
        self.backbone = model
        self._token_path: str | None = None
        self._is_open = False  # until the wrapper's own attributes are set
        self.register_state_dict_post_hook(_save)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load)  # type: ignore[no-untyped-call]

    def share_mask_token(self, path: str) -> None:
        """Take the model's own mask token as the wrapper's, without a second name in state dicts.

        Args:
            path: its dotted name.
        """
        del self._parameters[TOKEN]
        self._token_path = path

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm spares from weight decay, by their names here."""
        spared: Any = getattr(self.backbone, "no_weight_decay", set)
        return {_CHILD + name for name in spared()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of layers, for their learning rates, for the names here."""
        matcher: Any = self.backbone.group_matcher
        groups = {group: _prefixed(pattern) for group, pattern in matcher(coarse=coarse).items()}
        if isinstance(groups.get("stem"), str):
            groups["stem"] += rf"|^{TOKEN}$"
        return groups

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":
                raise
            found: Any = self.backbone
            path = self.__dict__.get("_token_path") if name == TOKEN else None
            for part in (path or name).split("."):
                found = getattr(found, part)
            return found

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_is_open") and not self._has(name) and hasattr(self.backbone, name):
            setattr(self.backbone, name, value)
        else:
            super().__setattr__(name, value)

    def _has(self, name: str) -> bool:
        own = (self.__dict__, self._parameters, self._buffers, self._modules)
        return any(name in names for names in own) or hasattr(type(self), name)


def _save(wrapper: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Rename ``backbone.blocks.0`` to ``blocks.0``, in place and in the order of the keys."""
    for key in [key for key in state if key.startswith(prefix)]:
        value = state.pop(key)
        state[prefix + key[len(prefix) :].removeprefix(_CHILD)] = value


def _load(wrapper: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Rename ``blocks.0`` to ``backbone.blocks.0``; a mask token that is missing stays as it is."""
    backbone: Any = wrapper.backbone
    theirs = set(backbone.state_dict())
    own = {*wrapper._modules, *wrapper._parameters, *wrapper._buffers} - {"backbone"}
    for key in [key for key in state if key.startswith(prefix)]:
        rest = key[len(prefix) :]
        if rest in theirs or rest.split(".")[0] not in own:
            state[prefix + _CHILD + rest] = state.pop(key)
    token = wrapper._parameters.get(TOKEN)
    if token is not None:
        state.setdefault(prefix + TOKEN, token.detach())


def _prefixed(pattern: Any) -> Any:
    """Put the wrapper's level before the names that a pattern of timm's matches."""
    if isinstance(pattern, str):
        return rf"^{re.escape(_CHILD)}(?:{pattern.removeprefix('^')})"
    if isinstance(pattern, tuple) and pattern and isinstance(pattern[0], str):
        return (_prefixed(pattern[0]), *pattern[1:])
    if isinstance(pattern, (list, tuple)):
        return type(pattern)(_prefixed(part) for part in pattern)
    return pattern
