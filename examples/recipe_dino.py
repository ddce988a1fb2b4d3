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
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

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

SMALL = {
    "arch": "vit_tiny", "patch_size": 16, "local_crops_number": 2, "out_dim": 1024, "lr": 0.016,
    "warmup_epochs": 0, "num_workers": 0, "saveckp_freq": 0,
}  # fmt: skip
"""The original's arguments for a few steps: its smallest ViT, few crops."""


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
    # A masker's repr is the call that builds it; here its names are read from md.
    code = re.sub(r"(?<![\w.])([A-Z]\w*\()", r"md.\1", repr(masker))
    return diff.replace(FORMS["token"], FORMS[apply]).replace("md.RandomMasker(0.3)", code)


def apply_diff(diff: str, text: str, name: str = "main_dino.py") -> str:
    r"""Return the text with every hunk of a unified diff applied, wherever its lines now stand.

    >>> apply_diff("@@ -1,2 +1,2 @@\n one\n-two\n+2\n", "zero\none\ntwo\n")
    'zero\none\n2\n'

    Raises:
        ValueError: naming the first line of a hunk that the text does not have in its place, or a
            hunk that fits in more than one place.
    """
    lines = text.splitlines()
    for hunk in re.split(r"^@@.*@@.*\n", diff, flags=re.MULTILINE)[1:]:
        changes = hunk.splitlines()
        old = [change[1:] for change in changes if not change.startswith("+")]
        new = [change[1:] for change in changes if not change.startswith("-")]
        matched = [_matched(lines[start:], old) for start in range(len(lines))]
        places = [start for start, count in enumerate(matched) if count == len(old)]
        if not places:
            missing = old[max(matched, default=0)]
            raise ValueError(
                f"{name} has no line {missing.strip()!r} where the recipe expects it, so it is "
                f"another version than the one the recipe was made for. Check out {COMMIT[:7]} of "
                "facebookresearch/dino, or put the lines in by hand."
            )
        if len(places) > 1:
            raise ValueError(
                f"{name} has the line {old[0].strip()!r}, and those after it, {len(places)} times, "
                "so the recipe cannot tell where its lines belong. Put them in by hand."
            )
        lines[places[0] : places[0] + len(old)] = new
    return "\n".join(lines) + "\n"


def _matched(lines: Sequence[str], wanted: Sequence[str]) -> int:
    """Count how many lines agree before the first that does not."""
    count = 0
    for line, want in zip(lines, wanted, strict=False):
        if line != want:
            break
        count += 1
    return count


def unified(old: str, new: str, name: str = "main_dino.py") -> str:
    """Return the difference of two texts as ``git apply`` and ``patch -p1`` take it."""
    return "".join(
        difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}", f"b/{name}",
            n=1,
        )
    )  # fmt: skip


def patch_copy(clone: Path, folder: Path, diff: str | None) -> str:
    """Copy the clone into a folder, change its ``main_dino.py``, and return the difference.

    Raises:
        ValueError: no clone, a folder that is in use, or a clone that the diff does not fit.
    """
    text = _main_of(clone)
    patched = apply_diff(diff, text) if diff else text
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give an --output that is new.")
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    (folder / "main_dino.py").write_text(patched, encoding="utf-8")
    return unified(text, patched)


def _main_of(clone: Path) -> str:
    path = clone / "main_dino.py"
    if not path.is_file():
        raise ValueError(
            f"{clone} has no main_dino.py, so it is no clone of facebookresearch/dino: run "
            "git clone https://github.com/facebookresearch/dino, and give --dino its folder."
        )
    return path.read_text(encoding="utf-8")


def write_images(folder: Path, count: int, data: Path | None = None) -> None:
    """Make a class folder tree of so many images: links into ``data``, or built-in scenes.

    Raises:
        ValueError: ``data`` holds fewer.
    """
    if data is None:
        scenes = Scenes(count, size=160)
        for index in range(count):
            image, label = scenes[index]
            place = folder / scenes.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{index:05d}.png")
        return
    from torchvision.datasets import ImageFolder

    samples = [Path(path).resolve() for path, _ in ImageFolder(str(data)).samples]
    if len(samples) < count:
        raise ValueError(f"{data} holds {len(samples)} images, fewer than the {count} of a batch.")
    for index in range(count):  # evenly spread, so that there are many classes
        path = samples[index * len(samples) // count]
        place = folder / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:05d}{path.suffix}").symlink_to(path)


def train(folder: Path, arguments: Sequence[str], processes: int, *, shim: bool) -> None:
    """Run the ``main_dino.py`` in a folder, one process per device, and wait for it.

    Args:
        folder: of the patched copy.
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
    command += [str(folder / "main_dino.py"), *arguments]
    library = str(Path(md.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode:
        raise SystemExit(f"the original stopped with exit code {done.returncode}")


def arguments_for(options: argparse.Namespace, output: Path) -> list[str]:
    """Make the images of a short run, and return what the original is to be called with."""
    settings: dict[str, object] = {"data_path": options.data, "output_dir": output / "run"}
    if options.steps is not None:
        images = output / "images"
        write_images(images, options.batch * options.processes, options.data)
        # One step is one epoch, so that the original logs the loss of each.
        settings |= {**SMALL, "data_path": images, "epochs": options.steps}
        settings |= {"batch_size_per_gpu": options.batch}
    if not torch.cuda.is_available():
        settings["use_fp16"] = False
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def main() -> None:
    """Apply the recipe to a copy of the clone, and run it."""
    options = _options()
    masker = md.parse_masker(options.masker)
    diff = None if options.unmodified else recipe(options.apply, masker)
    if options.diff_only is not None:
        text = _main_of(options.dino)
        options.diff_only.write_text(unified(text, apply_diff(diff or "", text)), encoding="utf-8")
        print(f"wrote {options.diff_only}; apply it in the clone with git apply")
        return
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) if options.output is None else options.output.resolve()
        print(patch_copy(options.dino, output / "dino", diff) or "unmodified", flush=True)
        arguments = [*arguments_for(options, output), *options.original]
        shim = options.offline or not torch.cuda.is_available()
        train(output / "dino", arguments, options.processes, shim=shim)
        log = (output / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
        print("loss of each epoch:", *(f"{json.loads(line)['train_loss']:.4f}" for line in log))


def _options() -> argparse.Namespace:
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
    add("--steps", type=int, help="so many steps, on the images of one batch; 8 without --data")
    add("--batch", type=int, default=8, help="images per process, with --steps")
    add("--processes", type=int, default=1, help="processes, one per CUDA device")
    add("--offline", action="store_true", help="do without the original's question to the network")
    add("--diff-only", type=Path, metavar="FILE", help="only write the diff, for git apply")
    own, original = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, original = own[:at], own[at + 1 :]
    options = parser.parse_args(own, argparse.Namespace(original=original))
    if options.data is None and options.steps is None:
        options.steps = 8
    for name in ("steps", "batch", "processes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return options


if __name__ == "__main__":
    main()
