"""The backbones that a command is given: what they are called, and what their runs say of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from maskdistill.models import MaskedViT
    from maskdistill.training.job import JobConfig


@dataclass(frozen=True)
class Backbone:
    """A backbone that was asked for.

    Attributes:
        name: what it is called in tables, as short as the others allow.
        source: as it was given.
        vit: the model.
        trained: False where its weights are random.
        settings: of the run that it comes from, if it does.
    """

    name: str
    source: str
    vit: MaskedViT
    trained: bool
    settings: JobConfig | None

    @property
    def form(self) -> object:
        """What two models share whose random weights are the same."""
        weights = self.vit.backbone.state_dict().items()
        return repr(self.vit), tuple((name, tuple(weight.shape)) for name, weight in weights)

    @property
    def own_size(self) -> int:
        """Pixels of a side of the images that it was made for."""
        if self.settings is not None:
            return self.settings.image_size
        stem = getattr(self.vit.backbone, "patch_embed", None)
        size = getattr(stem, "img_size", None) or getattr(
            self.vit.backbone, "pretrained_cfg", {}
        ).get("input_size", (3, 224, 224))
        return int(size[-1] if isinstance(size, Sequence) else size)


def open_backbones(
    sources: Sequence[str],
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    model: str | None = None,
    pretrained: bool = False,
    apply: Literal["drop"] | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[Backbone]:
    """Load all backbones before anything is measured, so that a wrong one is told at once.

    Args:
        sources: runs, files of weights, or names of timm models.
        image_size: pixels of a side; None is each one's own.
        patch_size: pixels of a patch's side; None is each one's own.
        model: timm's name of what files from elsewhere hold; None finds out.
        pretrained: take timm's weights of named models.
        apply: how masks are applied; None is as in the run.
        seed: of random weights.
        device: where they go; None is an accelerator, if there is one.

    Raises:
        ValueError: no or twice the same source, and what `load_backbone` refuses.
        OSError: likewise.
    """
    import torch

    from maskdistill.evaluation import load_backbone

    if not sources:
        raise ValueError(
            "give at least one backbone: a run's folder, a file of weights, or a timm model's name."
        )
    if twice := sorted({source for source in sources if sources.count(source) > 1}):
        raise ValueError(f"{twice[0]} is given twice.")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {where} cannot be used: {reason}") from error
    found = []
    for name, source in zip(_short(sources), sources, strict=True):
        path = Path(source).expanduser()
        named = not path.exists()
        try:
            vit = load_backbone(
                source, image_size=image_size, patch_size=patch_size,
                model=None if named else model, pretrained=pretrained and named, apply=apply,
                seed=seed,
            )  # fmt: skip
        except RuntimeError as error:
            if not named or "pretrained tag" not in str(error):
                raise
            raise ValueError(_no_tag(source)) from None
        trained = pretrained or not named
        found.append(Backbone(name, source, vit.to(where), trained, _settings_of(path)))
    return found


def _no_tag(source: str) -> str:
    import timm

    name, _, tag = source.partition(".")
    known = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
    return f"timm has no weights {tag!r} of {name}; it has {', '.join(known) or 'none'}."


def common_size(backbones: Sequence[Backbone], image_size: int | None) -> int:
    """Return the size of image that all are measured at.

    Raises:
        ValueError: none was given, and they were made for several.
    """
    if image_size is not None:
        return image_size
    sizes = {one.own_size: one.name for one in reversed(backbones)}
    if len(sizes) > 1:
        own = ", ".join(f"{name} for {size}" for size, name in sorted(sizes.items()))
        raise ValueError(
            f"the backbones were made for images of several sizes ({own} pixels); say at which to "
            "compare them, with --image-size."
        )
    return next(iter(sizes))


def _settings_of(path: Path) -> JobConfig | None:
    """Return the settings of the run that a folder or file belongs to, if it belongs to one."""
    from maskdistill.training.job import saved_config

    for folder in (path, path.parent, path.parent.parent):
        files = folder == path or path.is_file()  # only a file is looked for further up
        if files and (folder / "config.json").is_file() and _is_run(folder):
            return saved_config(folder)
    return None


def _is_run(folder: Path) -> bool:
    return (folder / "backbone.safetensors").is_file() or (folder / "checkpoints").is_dir()


def _short(sources: Sequence[str]) -> Iterator[str]:
    """Yield the last part of each path, and as many before it as tell them apart."""
    parts = [os.fspath(source).rstrip("/").split("/") for source in sources]
    for own in parts:
        count = 1
        while count < len(own) and sum(p[-count:] == own[-count:] for p in parts) > 1:
            count += 1
        yield "/".join(own[-count:])
