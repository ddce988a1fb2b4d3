"""At most five lines that put masks into lightly's DINO, iBOT and DINOv2 examples, and run them.

    pip install lightly
    git clone https://github.com/lightly-ai/lightly
    python examples/recipe_lightly.py --lightly lightly --example dino
    python examples/recipe_lightly.py --lightly lightly --example dino --apply pixel
    python examples/recipe_lightly.py --lightly lightly --example ibot
    python examples/recipe_lightly.py --lightly lightly --example dinov2 \
        --masker "AttentionGuidedMasker(0.4)"
    python examples/recipe_lightly.py --lightly lightly --example ibot --diff-only ibot.patch

The clone holds the examples, which the package leaves out; it is read, never changed. The recipe is
the diff alone. What makes the example small, so that it runs in a minute or two on 2 CPU cores and
without a download, stands around the run and is no part of the recipe: see ``small`` and ``run``.
For the real run take ``--diff-only``, ``git apply`` it in the clone, and start the example itself.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from patching import apply_diff, as_code
from timm.models import vision_transformer as timm_vits
from torch.utils.data import DataLoader, Dataset

import maskdistill as md
from maskdistill.data import Scenes

COMMIT = "e8d317fc5a87f4387a85a35e689869039ec249ee"
"""The commit of lightly-ai/lightly whose examples the diffs were made for."""

DINO = """\
--- a/examples/pytorch/dino.py
+++ b/examples/pytorch/dino.py
@@ -9,2 +9,3 @@
 
+import maskdistill as md
 import torch
@@ -48,4 +49,4 @@
 # original paper (you might have to reduce the batch size in this case):
-# backbone = torch.hub.load('facebookresearch/dino:main', 'dino_vits16', pretrained=False)
-# input_dim = backbone.embed_dim
+backbone = md.MaskedViT(torch.hub.load('facebookresearch/dino:main', 'dino_vits16', pretrained=False))
+input_dim = backbone.embed_dim
 
@@ -103,3 +104,4 @@
         teacher_out = [model.forward_teacher(view) for view in global_views]
-        student_out = [model.forward(view) for view in views]
+        with model.student_backbone.masking(md.presets.asymmetric(0.3)(views, 16).student):
+            student_out = [model.forward(view) for view in views]
         loss = criterion(teacher_out, student_out, epoch=epoch)
"""  # noqa: E501
"""DINO with the ViT that the example has in a comment: five lines."""

DINO_PIXEL = """\
--- a/examples/pytorch/dino.py
+++ b/examples/pytorch/dino.py
@@ -9,2 +9,3 @@
 
+import maskdistill as md
 import torch
@@ -44,3 +45,3 @@
 resnet = torchvision.models.resnet18()
-backbone = nn.Sequential(*list(resnet.children())[:-1])
+backbone = md.MaskedViT(nn.Sequential(*list(resnet.children())[:-1]), "pixel", patch_size=32)
 input_dim = 512
@@ -103,3 +104,4 @@
         teacher_out = [model.forward_teacher(view) for view in global_views]
-        student_out = [model.forward(view) for view in views]
+        with model.student_backbone.masking(md.presets.asymmetric(0.3)(views, 32).student):
+            student_out = [model.forward(view) for view in views]
         loss = criterion(teacher_out, student_out, epoch=epoch)
"""
"""DINO with the example's own ResNet, which only the pixels can hide something from: four lines."""

DINO_DDP = """\
--- a/examples/pytorch_lightning_distributed/dino.py
+++ b/examples/pytorch_lightning_distributed/dino.py
@@ -9,2 +9,3 @@
 
+import maskdistill as md
 import pytorch_lightning as pl
@@ -27,4 +28,4 @@
         # original paper (you might have to reduce the batch size in this case):
-        # backbone = torch.hub.load('facebookresearch/dino:main', 'dino_vits16', pretrained=False)
-        # input_dim = backbone.embed_dim
+        backbone = md.MaskedViT(torch.hub.load('facebookresearch/dino:main', 'dino_vits16', pretrained=False))
+        input_dim = backbone.embed_dim
 
@@ -60,3 +61,4 @@
         teacher_out = [self.forward_teacher(view) for view in global_views]
-        student_out = [self.forward(view) for view in views]
+        with self.student_backbone.masking(md.presets.asymmetric(0.3)(views, 16).student):
+            student_out = [self.forward(view) for view in views]
         loss = self.criterion(teacher_out, student_out, epoch=self.current_epoch)
"""  # noqa: E501
"""The same five lines in lightly's own Lightning example for several processes."""

IBOT = """\
--- a/examples/pytorch/ibot.py
+++ b/examples/pytorch/ibot.py
@@ -10,2 +10,3 @@
 
+import maskdistill as md
 import torch
@@ -144,2 +145,3 @@
 num_batches = len(dataloader)
+masker = md.BlockMasker(md.Stratified(0.1, 0.5, share=0.5))
 total_steps = epochs * num_batches
@@ -165,3 +167,3 @@
         )
-        block_mask = random_block_mask(size=(B, H, W), device=mask.device)
+        block_mask = masker(B, (H, W), device=mask.device, progress=epoch / epochs).view(B, H, W)
         mask[:, 1:] = block_mask.flatten(start_dim=1)
"""
"""iBOT and DINOv2, whose examples have these lines in common: three lines."""

PIXELS = """\
@@ -89,3 +90,3 @@
     ) -> tuple[Tensor, Tensor | None]:
-        features = self.student_backbone.encode(x, mask=mask)
+        features = self.student_backbone.encode(x if mask is None else md.mask_pixels(x, mask[:, 1:], 16))
         cls_tokens = features[:, 0]
"""  # noqa: E501
"""With pixels instead of lightly's mask token: a hunk more, and one line."""

BLOCKS = "md.BlockMasker(md.Stratified(0.1, 0.5, share=0.5))"
"""DINOv2's masks: half of the images of a step, evenly from a tenth to half of their patches."""

ATTENTION = """\
--- a/examples/pytorch/ibot.py
+++ b/examples/pytorch/ibot.py
@@ -10,2 +10,3 @@
 
+import maskdistill as md
 import torch
@@ -144,2 +145,4 @@
 num_batches = len(dataloader)
+masker = md.AttentionGuidedMasker(0.4)
+teacher = md.MaskedViT(model.teacher_backbone.vit, "pixel")
 total_steps = epochs * num_batches
@@ -165,3 +168,4 @@
         )
-        block_mask = random_block_mask(size=(B, H, W), device=mask.device)
+        attention = teacher.attention(global_views)
+        block_mask = masker(B, (H, W), attention=attention, progress=epoch / epochs).view(B, H, W)
         mask[:, 1:] = block_mask.flatten(start_dim=1)
"""
"""Masks that follow the teacher's attention (AttMask), in iBOT and DINOv2: five lines."""

FORMS = {
    "dino": ("token", "drop", "pixel"),
    "dino-ddp": ("token", "drop"),
    "ibot": ("token", "pixel"),
    "dinov2": ("token", "pixel"),
}
"""The ways in which each example can be masked."""

FILES = {
    "dino": "examples/pytorch/dino.py",
    "dino-ddp": "examples/pytorch_lightning_distributed/dino.py",
    "ibot": "examples/pytorch/ibot.py",
    "dinov2": "examples/pytorch/dinov2.py",
}
"""Where the examples lie in the clone."""


def recipe(example: str, apply: str = "token", masker: md.Masker | None = None) -> str:
    """Return the unified diff of an example.

    >>> print(recipe("ibot"))  # doctest: +SKIP

    Args:
        example: ``"dino"``, ``"dino-ddp"``, ``"ibot"`` or ``"dinov2"``.
        apply: ``"token"`` or ``"pixel"``, for DINO also ``"drop"``.
        masker: hides the student's global views; None for the example's usual one. In iBOT and
            DINOv2, one that needs attention gets the teacher's.

    Raises:
        ValueError: another example, a form or a masker that it cannot have.
    """
    if example not in FORMS:
        raise ValueError(f"example must be one of {', '.join(FORMS)}; got {example!r}.")
    patches = example in ("ibot", "dinov2")
    if apply == "drop" and patches:
        raise ValueError(
            f"{example} predicts the hidden patches, and dropped patches have no output to predict "
            "them from. Use apply='token' or 'pixel'; the dino example takes 'drop'."
        )
    if apply not in FORMS[example]:
        raise ValueError(
            f"apply must be one of {', '.join(FORMS[example])} for {example}; got {apply!r}."
        )
    needs = frozenset() if masker is None else masker.needs
    missing = needs - ({"attention"} if patches else {"images"})
    if missing:
        raise ValueError(
            f"{masker!r} needs {', '.join(sorted(missing))}, which the {example} example does not "
            "have at hand. Choose a masker that needs nothing; ibot and dinov2 have attention, "
            "dino the images."
        )
    code = as_code(masker) if masker is not None else ""
    if patches:
        diff, usual = (ATTENTION, "md.AttentionGuidedMasker(0.4)") if needs else (IBOT, BLOCKS)
        if apply == "pixel":
            diff = diff.replace("@@ -144", f"{PIXELS}@@ -144")
        return diff.replace("ibot.py", f"{example}.py").replace(usual, code or usual)
    diff = {"dino": DINO, "dino-ddp": DINO_DDP}[example] if apply != "pixel" else DINO_PIXEL
    if apply == "drop":
        diff = diff.replace("=False))", '=False), "drop", first_block="blocks.0")')
    usual = "md.presets.asymmetric(0.3)"
    return diff.replace(usual, f"md.AsymmetricMaskPolicy({code})" if code else usual)


def patched(clone: Path, example: str, diff: str) -> str:
    """Return an example's text with the diff applied; the clone stays as it is."""
    name = FILES[example]
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / name
        copy.parent.mkdir(parents=True)
        shutil.copy(clone / name, copy)
        if diff:
            apply_diff(diff, Path(temporary), COMMIT)
        return copy.read_text(encoding="utf-8")


# --- Around the run: no part of the recipe


class SmallData(Dataset[tuple[Any, Any]]):
    """Built-in scenes in place of Pascal VOC: takes the arguments that the examples give it."""

    count = 8

    def __init__(self, root: str, download: bool, transform: Any, target_transform: Any) -> None:
        self.scenes = Scenes(self.count, size=128)
        self.transform, self.target_transform = transform, target_transform

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = self.scenes[index]
        return self.transform(image), self.target_transform(label)


def shallow(vit: Any, blocks: int) -> Any:
    """Keep the first blocks of a ViT, of whichever make."""
    vit.blocks = vit.blocks[:blocks]
    return vit


@contextlib.contextmanager
def small(
    steps: int = 2, batch: int = 4, blocks: int = 2, dino: Path | None = None
) -> Iterator[None]:
    """Make what an example loads small while it runs; its own lines stay as they are.

    Pascal VOC becomes built-in scenes; loaders have no workers and small batches; ViTs have few
    blocks; and facebookresearch/dino's ViT comes from a clone, or from timm, not from the network.
    """
    start: Any = DataLoader.__init__
    hub: Any = torch.hub.load
    timm_vit: Any = timm_vits.vit_small_patch16_224

    def load(self: Any, dataset: Any, batch_size: int, num_workers: int, **settings: Any) -> None:
        start(self, dataset, batch_size=batch, num_workers=0, **settings)

    def vit(**settings: Any) -> Any:
        return shallow(timm_vit(**settings), blocks)

    def hub_vit(repository: str, name: str, pretrained: bool) -> Any:
        if dino is None:
            return vit(num_classes=0, dynamic_img_size=True)
        return shallow(hub(str(dino), name, source="local", pretrained=pretrained), blocks)

    with (
        mock.patch("torchvision.datasets.VOCDetection", SmallData),
        mock.patch.object(SmallData, "count", steps * batch),
        mock.patch.object(DataLoader, "__init__", load),
        mock.patch.object(timm_vits, "vit_small_patch16_224", vit),
        mock.patch("torch.hub.load", hub_vit),
    ):
        yield


def run(text: str, epochs: int = 3, **settings: Any) -> dict[str, Any]:
    """Run an example's text for a few steps and return its variables.

    These of its lines are changed here too: the number of epochs, and the device where the example
    takes it for granted that there is a GPU of one make or another: two processes on the CPU stand
    for several GPUs.

    Args:
        text: of the example.
        epochs: to run.
        **settings: what ``small`` takes.
    """
    text = re.sub(r"^epochs = \d+$", f"epochs = {epochs}", text, flags=re.MULTILINE)
    text = re.sub(r"max_epochs=\d+,", f"max_epochs={epochs},", text)
    if not torch.cuda.is_available():
        text = text.replace('"auto",\n    accelerator="gpu"', '2, accelerator="cpu"')
    if not torch.backends.mps.is_available():
        text = text.replace('else "mps"', 'else "cpu"')
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    variables = {"__name__": "__main__"}  # not by runpy: further processes start from sys.argv
    with small(**settings):
        exec(compile(text, "the example", "exec"), variables)
    return variables


def main() -> None:
    """Apply the diff, and run the example or write the diff."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lightly", type=Path, default=Path("lightly"), help="a clone of lightly")
    parser.add_argument("--example", choices=list(FORMS), default="dino")
    parser.add_argument("--apply", choices=("token", "drop", "pixel"), default="token")
    parser.add_argument("--masker", help="a masker's repr, instead of the diff's")
    parser.add_argument("--unmodified", action="store_true", help="run the example without masks")
    parser.add_argument("--diff-only", type=Path, help="write the diff there and run nothing")
    parser.add_argument("--dino", type=Path, help="a clone of facebookresearch/dino, for its ViT")
    parser.add_argument("--batch", type=int, default=4, help="images of a step")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the ViTs, of 12")
    args = parser.parse_args()

    if not (args.lightly / FILES[args.example]).is_file():
        sys.exit(
            f"there is no {args.lightly / FILES[args.example]}; give --lightly the folder that "
            "git clone https://github.com/lightly-ai/lightly makes."
        )
    try:
        masker = md.parse_masker(args.masker) if args.masker else None
        diff = "" if args.unmodified else recipe(args.example, args.apply, masker)
        text = patched(args.lightly, args.example, diff)
    except ValueError as error:
        sys.exit(str(error))
    if args.diff_only:
        args.diff_only.write_text(diff, encoding="utf-8")
        return
    print(f"{FILES[args.example]}: {len(re.findall('^[+](?![+])', diff, re.M))} lines changed")
    settings = {"batch": args.batch, "blocks": args.blocks, "dino": args.dino}
    model = run(text, **settings)["model"]
    for role in ("student", "teacher"):
        token = getattr(getattr(model, f"{role}_backbone"), "mask_token", None)
        if token is not None:
            print(f"{role}'s mask token: norm {float(token.detach().norm()):.4f}, 0 at the start")


if __name__ == "__main__":
    main()
