"""Every command by its name, and those that are one call of the library."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from maskdistill.cli.backbones import attention, evaluate
from maskdistill.cli.compare import compare
from maskdistill.cli.show import show
from maskdistill.cli.terminal import (
    NEEDS_TRAIN,
    exit_code,
    plain_warnings,
    print_table,
    progress_bar,
)
from maskdistill.cli.train import train

_DESCRIPTION = """Masking strategies for self-distillation of Vision Transformers.

  maskdistill show "BlockMasker(0.4)"     what a masker hides
  maskdistill train                       a first run, on built-in scenes
  maskdistill train --data PATH           on images of your own
  maskdistill evaluate runs/first         what it learned, next to random weights
  maskdistill compare study.toml          policies x seeds, and a report
  maskdistill COMMAND --help              all about one command
  maskdistill --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``maskdistill`` or ``python -m maskdistill``, and return the exit code.

    Example:
        >>> main(["pack", "mini-imagenet", "mini.npz"])  # doctest: +SKIP
        mini.npz: 60,000 images of 100 classes, 286 MiB.
        0

    Args:
        argv: arguments; None is the command line's.

    Returns:
        0; 1 where data is too damaged or training had to stop; 2 where the arguments or the data
        cannot work; 130 where the user interrupted, 143 where a scheduler did.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        import maskdistill

        print(f"maskdistill {maskdistill.__version__}")
        return 0
    if arguments[:1] == ["train"]:  # its defaults depend on its arguments
        return train(argv=arguments[1:], prog="maskdistill train")
    try:
        import tyro
    except ImportError:
        print(NEEDS_TRAIN, file=sys.stderr)
        return 2
    app = tyro.extras.SubcommandApp()
    app.command(name="train")(_train)
    for command in (evaluate, attention, compare, show, models, pack):
        app.command(command)

    def run() -> object:
        with plain_warnings():
            warnings.simplefilter("always", UserWarning)
            return app.cli(
                prog="maskdistill",
                description=_DESCRIPTION,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),  # --json alone, without a --no-json
            )

    return exit_code(run)


def _train() -> None:
    """Train DINO under a masking policy, evaluate, and draw; "train --help" says more."""


def models(pattern: str = "vit_*", /, why: bool = False, json: bool = False) -> None:
    """Say what the transformers of timm take: mask tokens, dropped tokens, attention, other sizes.

    maskdistill models "swin_*" --why

    Each model is run on the meta device, without weights and without a download: about a second
    each. Pixels can be masked in front of every one of them.

    Args:
        pattern: which names, as in a shell: "vit_*", "*_dinov2*", "*" for all, some ten minutes.
        why: also say, in a sentence each, why a model does not take something.
        json: print a JSON object per line instead.
    """
    import dataclasses
    from json import dumps

    from maskdistill.models.backbones import support_of, transformer_names

    names = transformer_names(pattern)
    if not names:
        raise ValueError(
            f'no transformer of timm matches {pattern!r}. A pattern is as in a shell: "vit_*", in '
            'quotes; "*" is all of them.'
        )
    bar = progress_bar(iterable=names, desc="running models", unit="model")
    found = [support_of(name) for name in bar]
    if json:
        for model in found:
            print(dumps(dataclasses.asdict(model)))
        return
    rows = [("model", "image", "patch", "token", "drop", "attention", "other sizes")]
    rows += [
        (
            model.name,
            "x".join(map(str, model.image_size)),
            "x".join(map(str, model.patch_size)),
            "yes" if model.token else "no",
            "yes" if model.drop else "no",
            model.attention or "no",
            (model.sizes_by or "yes") if model.sizes else "no",
        )
        for model in found
    ]
    print_table(rows)
    for model in found if why else []:
        for name, reason in model.reasons.items():
            print(f"\n{model.name}, {name}: {reason}")


def pack(
    source: Path,
    out: Path,
    /,
    shards: int | None = None,
    format: str = "auto",
    allow_pickle: bool = False,
    size: int | None = None,
    quality: int | None = None,
    max_damaged: int = 10,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a data set into one file that opens by memory map, or into shards that stream.

    The pack has the images, the classes and the split of its source. Encoded images are copied as
    they are; each is decoded once to check it. docs/data.md describes forms, packs and shards.

    Args:
        source: folder or file of images, in any form that --data takes.
        out: the file to write, NAME.npz; with --shards, the folder.
        shards: write WebDataset shards instead: so many for training, their share for validation.
        format: auto, or the form of the source by name.
        allow_pickle: permit reading pickles (by an unpickler that can only build arrays).
        size: pixels to which the shorter side of larger images is reduced.
        quality: of JPEG, to which all images are then encoded; without it, at 95 what was reduced.
        max_damaged: how many images that do not decode may be left out.
        workers: processes that decode; without it, one per core.
        overwrite: replace OUT if it exists.
    """
    from typing import Any

    from maskdistill.data import packing

    options: dict[str, Any] = {
        "format": format, "allow_pickle": allow_pickle, "size": size, "quality": quality,
        "max_damaged": max_damaged, "workers": workers, "overwrite": overwrite,
    }  # fmt: skip
    if shards is None:
        packed = packing.pack(source, out, **options)
    else:
        packed = packing.pack_shards(source, out, shards, **options)
    print(
        f"{packed.path}: {packed.images:,} images of {packed.classes} classes, "
        f"{packed.bytes / 2**20:,.1f} MiB; {packed.note}"
    )
    if packed.damaged:
        print(f"{len(packed.damaged)} damaged images were left out.")
