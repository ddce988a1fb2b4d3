"""Five lines that put masks into facebookresearch/dino, applied to a clone of it and run.

    git clone https://github.com/facebookresearch/dino
    python examples/recipe_dino.py --dino dino
    python examples/recipe_dino.py --dino dino --apply drop --masker "BlockMasker(0.4)"
    python examples/recipe_dino.py --dino dino --masker "AttentionGuidedMasker(0.4)"
    python examples/recipe_dino.py --dino dino --diff-only dino.patch
    python examples/recipe_dino.py --dino dino --data TRAIN --processes 8 -- --arch vit_small

The clone is copied, never changed. Without ``--data`` the copy trains for a few steps on built-in
scenes, in about a minute on 2 CPU cores; with it, for as long as the original would. What stands
after ``--`` goes to the original's ``main_dino.py``. The original wants a CUDA device; where there
is none, ``recipe_dino_shim.py`` stands around it, which is no part of the recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from patching import apply_diff, as_code

import maskdistill as md
from maskdistill.data import Scenes

COMMIT = "7c446df5b9f45747937fb0d72314eb9f7b66930a"
"""The commit of facebookresearch/dino that the diffs were made for, its last one."""

DIFF = """\
--- a/main_dino.py
+++ b/main_dino.py
@@ -33,2 +33,3 @@
 import utils
+import maskdistill as md
 import vision_transformer as vits
@@ -192,2 +193,3 @@
     )
+    for m in (student, teacher): m.backbone = md.MaskedViT(m.backbone, apply="token")
     # move networks to gpu
@@ -304,2 +306,3 @@
     metric_logger = utils.MetricLogger(delimiter="  ")
+    policy = md.AsymmetricMaskPolicy(md.RandomMasker(0.3))
     header = 'Epoch: [{}/{}]'.format(epoch, args.epochs)
@@ -318,3 +321,4 @@
             teacher_output = teacher(images[:2])  # only the 2 global views pass through the teacher
-            student_output = student(images)
+            with student.module.backbone.masking(policy(images, args.patch_size).student):
+                student_output = student(images)
             loss = dino_loss(student_output, teacher_output, epoch)
"""  # noqa: E501
"""The recipe, in token form."""

GUIDED_STEP = """\
@@ -317,4 +320,7 @@
         with torch.cuda.amp.autocast(fp16_scaler is not None):
-            teacher_output = teacher(images[:2])  # only the 2 global views pass through the teacher
-            student_output = student(images)
+            with teacher_without_ddp.backbone.record_attention() as seen:
+                teacher_output = teacher(images[:2])  # only the 2 global views pass through the teacher
+            masks = policy(images, args.patch_size, attention=seen.attention).student
+            with student.module.backbone.masking(masks):
+                student_output = student(images)
             loss = dino_loss(student_output, teacher_output, epoch)
"""  # noqa: E501
"""Takes the place of the last hunk where the masks follow the teacher's attention (AttMask)."""

FORMS = {
    "token": 'apply="token"',
    "drop": '"drop", first_block="blocks.0"',
    "pixel": '"pixel", patch_size=args.patch_size',
}
"""How the backbone is wrapped, by the way in which masks are applied."""

IMAGES = 8
"""Images per process of the short run, all of them in one step: the original logs each epoch."""

SMALL = {
    "arch": "vit_tiny", "patch_size": 16, "local_crops_number": 2, "out_dim": 1024, "lr": 0.016,
    "epochs": 8, "warmup_epochs": 0, "batch_size_per_gpu": IMAGES, "num_workers": 0,
    "saveckp_freq": 0,
}  # fmt: skip
"""The original's arguments for the short run: its smallest ViT, few crops."""


def recipe(apply: str = "token", masker: md.Masker | None = None) -> str:
    """Return the unified diff that puts a masker into ``main_dino.py``.

    >>> print(recipe("drop", md.BlockMasker(0.4)))  # doctest: +SKIP

    Args:
        apply: ``"token"``, ``"drop"`` or ``"pixel"``.
        masker: hides the student's global views, None for ``RandomMasker(0.3)``; one that needs
            attention gets the teacher's, in a few lines more.

    Raises:
        ValueError: another ``apply``, or a masker that needs what this loop does not have.
    """
    if apply not in FORMS:
        raise ValueError(f"apply must be one of {', '.join(FORMS)}; got {apply!r}.")
    masker = md.RandomMasker(0.3) if masker is None else masker
    missing = sorted(masker.needs - {"attention", "images"})
    if missing:
        raise ValueError(
            f"{masker!r} needs {', '.join(missing)}, which the original's loop does not have. "
            "Choose a masker that needs nothing or attention."
        )
    diff = DIFF
    if "attention" in masker.needs:
        diff = DIFF[: DIFF.index("@@ -318")] + GUIDED_STEP
    diff = diff.replace(FORMS["token"], FORMS[apply])
    return diff.replace("md.RandomMasker(0.3)", as_code(masker))


def write_scenes(folder: Path, count: int) -> None:
    """Write built-in scenes as a tree of class folders, as torchvision's ``ImageFolder`` reads."""
    scenes = Scenes(count, size=160)
    for index in range(count):
        image, label = scenes[index]
        place = folder / scenes.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{index:05d}.png")


def train(script: Path, arguments: Sequence[str], processes: int, *, shim: bool) -> None:
    """Run the original's script, one process per device, and wait for it.

    Args:
        script: ``main_dino.py`` of the patched copy.
        arguments: for the original.
        processes: how many.
        shim: start it through ``recipe_dino_shim.py``.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}"]
    if shim:
        print("the original runs through recipe_dino_shim.py", flush=True)
        command.append(str(Path(__file__).resolve().with_name("recipe_dino_shim.py")))
    command += [str(script), *arguments]
    library = str(Path(md.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode:
        raise SystemExit(f"the original stopped with exit code {done.returncode}")


def run(options: argparse.Namespace, diff: str, output: Path) -> None:
    """Copy the clone, change the copy by the diff, train it, and print the losses of its log."""
    copy = output / "dino"
    if copy.exists() and any(copy.iterdir()):
        raise ValueError(f"{copy} is not empty; give an --output that is new.")
    shutil.copytree(options.dino, copy, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    if diff:
        apply_diff(diff, copy, COMMIT)
    print(diff or "unmodified", flush=True)
    settings: dict[str, object] = {"data_path": options.data, "output_dir": output / "run"}
    if options.data is None:
        write_scenes(output / "images", IMAGES * options.processes)
        settings |= {**SMALL, "data_path": output / "images"}
    if not torch.cuda.is_available():
        settings["use_fp16"] = False
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    shim = options.offline or not torch.cuda.is_available()
    train(copy / "main_dino.py", [*arguments, *options.original], options.processes, shim=shim)
    log = (output / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    print("loss of each epoch:", *(f"{json.loads(line)['train_loss']:.4f}" for line in log))


def main() -> None:
    """Apply the recipe to a copy of the clone, and run it."""
    parser = argparse.ArgumentParser(
        description="Put masks into a copy of facebookresearch/dino, and run it.",
        epilog="What stands after -- goes to the original's main_dino.py.",
    )
    add = parser.add_argument
    add("--dino", type=Path, required=True, help="clone of facebookresearch/dino")
    add("--apply", choices=FORMS, default="token", help="how the masks are applied")
    add("--masker", default="RandomMasker(0.3)", help="what is hidden, as in Python")
    add("--unmodified", action="store_true", help="run the original as it is, to compare")
    add("--data", type=Path, help="folder of class folders with images; none: built-in scenes")
    add("--output", type=Path, help="new folder for the copy, the log and the checkpoint")
    add("--processes", type=int, default=1, help="processes, one per CUDA device")
    add("--offline", action="store_true", help="do without the original's question to the network")
    add("--diff-only", type=Path, metavar="FILE", help="only write the diff, for git apply")
    add("original", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()

    if not (options.dino / "main_dino.py").is_file():
        raise ValueError(
            f"{options.dino} has no main_dino.py, so it is no clone of facebookresearch/dino: run "
            "git clone https://github.com/facebookresearch/dino, and give --dino its folder."
        )
    diff = "" if options.unmodified else recipe(options.apply, md.parse_masker(options.masker))
    if options.diff_only is not None:
        apply_diff(diff, options.dino, COMMIT, check=True)
        options.diff_only.write_text(diff, encoding="utf-8")
        print(f"wrote {options.diff_only}; apply it in the clone with git apply")
    elif options.output is not None:
        run(options, diff, options.output.resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            run(options, diff, Path(temporary))


if __name__ == "__main__":
    main()
