"""Write the golden statistics: run each author's mask generator, and reduce what it draws.

    python -m tests.masking.golden.make_golden --peers DIR [--only METHOD ...] [--draws 20000]

DIR holds one checkout per method, named as in ``SOURCES``. Nothing of theirs is stored here: the
functions that draw are found by name in their files when this runs, and only numbers are written.
Set what is drawn, and what is measured, in the functions below, one per method.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import multiprocessing
import random
import subprocess
import time
import types
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import einops
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from tests.masking import golden

Case = dict[str, Any]
Grid = tuple[int, int]

GRIDS: tuple[Grid, ...] = ((14, 14), (7, 7), (16, 10))


def take(path: Path, *names: str, **known: Any) -> types.SimpleNamespace:
    """Compile the functions and classes of these names (``Class.method``) from a file, alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = []
    for name in names:
        body = tree.body
        for piece in name.split("."):
            (node,) = (n for n in body if getattr(n, "name", None) == piece)
            body = getattr(node, "body", [])
        node.decorator_list = []
        wanted.append(node)
    flags = annotations.compiler_flag  # their annotations name what is not imported here
    code = compile(ast.Module(wanted, []), str(path), "exec", flags, dont_inherit=True)
    space = {"math": math, "random": random, "np": np, "torch": torch, **known}
    exec(code, space)
    return types.SimpleNamespace(**{n.split(".")[-1]: space[n.split(".")[-1]] for n in names})


def case(grid: Grid, masks: Any, /, **arguments: Any) -> Case:
    return {"grid": grid, **arguments, **golden.describe(masks, grid)}


def draw(draws: int, one: Callable[[], Any]) -> np.ndarray:
    return np.stack([np.asarray(one()) for _ in range(draws)])


# --- rectangles


def beit(path: Path, draws: int) -> list[Case]:
    numbers = types.SimpleNamespace(**vars(np), int=int)  # np.int was removed from numpy 1.24
    found = take(path, "MaskingGenerator", np=numbers)
    cases = []
    for grid, count, least in [
        ((14, 14), 75, 16),
        ((14, 14), 78, 4),
        ((7, 7), 20, 4),
        ((16, 10), 64, 4),
    ]:
        generator = found.MaskingGenerator(grid, count, min_num_patches=least)
        cases.append(case(grid, draw(draws, generator), count=count, min_patches=least))
    return cases


def ibot(path: Path, draws: int) -> list[Case]:
    class Folder:  # stands for the data set that their class inherits from: one image
        def __init__(self, *grid: int) -> None:
            self.image = types.SimpleNamespace(shape=(3, *grid))

        def __getitem__(self, index: int) -> tuple[list[Any]]:
            return ([self.image],)

    found = take(path, "ImageFolderMask", ImageFolder=Folder)
    cases = []
    for grid, count, shape in [
        ((14, 14), 49, "block"),
        ((14, 14), 98, "block"),
        ((7, 7), 15, "block"),
        ((16, 10), 48, "block"),
        ((14, 14), 59, "rand"),
    ]:
        data = found.ImageFolderMask(
            *grid,
            patch_size=1,
            pred_ratio=Fraction(count, grid[0] * grid[1]),  # exact: ratio * H * W is whole
            pred_ratio_var=0,
            pred_aspect_ratio=(0.3, 1 / 0.3),
            pred_shape=shape,
        )
        cases.append(case(grid, draw(draws, lambda d=data: d[0][-1][0]), count=count, shape=shape))
    return cases


def dino_blocks(path: Path, draws: int, collate: str, **options: Any) -> list[Case]:
    found = take(path, "MaskingGenerator")
    together = take(path.parent / collate, "collate_data_and_cast").collate_data_and_cast
    cases = []
    for grid, count in [((14, 14), 59), ((14, 14), 98), ((7, 7), 15), ((16, 10), 48)]:
        generator = found.MaskingGenerator(grid, max_num_patches=grid[0] * grid[1] // 2)
        masks = draw(draws, partial(generator, count))
        cases.append(case(grid, masks, count=count))
    nothing = torch.zeros(1)
    for grid, images in [((14, 14), draws), ((7, 7), draws)]:
        generator = found.MaskingGenerator(grid, max_num_patches=grid[0] * grid[1] // 2)
        # One batch of `images` crops, two per sample.
        samples = [({"global_crops": [nothing] * 2, "local_crops": [nothing]},)] * (images // 2)
        batch = together(
            samples,
            (0.1, 0.5),
            0.5,
            torch.float32,
            n_tokens=grid[0] * grid[1],
            mask_generator=generator,
            **options,
        )
        few = together(
            samples[:8],
            (0.1, 0.5),
            0.5,
            torch.float32,
            n_tokens=grid[0] * grid[1],
            mask_generator=generator,
            **options,
        )["collated_masks"].sum(dim=1)
        arguments = {
            "collate": [0.1, 0.5],
            "share": 0.5,
            "counts_of_16": few.sort().values.tolist(),
        }
        cases.append(case(grid, batch["collated_masks"].numpy(), **arguments))
    return cases


def capi(path: Path, draws: int) -> list[Case]:
    found = take(path, "BlockMasking", "InverseBlockMasking")
    cases = []
    for grid, count, inverse, roll in [
        ((14, 14), 69, False, False),
        ((7, 7), 17, False, False),
        ((16, 10), 56, False, False),
        ((14, 14), 69, False, True),
        ((16, 10), 56, False, True),
        ((14, 14), 127, True, False),
        ((14, 14), 127, True, True),
        ((7, 7), 31, True, True),
        ((16, 10), 104, True, True),
    ]:
        kind = found.InverseBlockMasking if inverse else found.BlockMasking
        masks = draw(draws, partial(kind(grid, roll=roll), count))
        cases.append(case(grid, masks, count=count, inverse=inverse, roll=roll))
    return cases


def data2vec2(path: Path, draws: int) -> list[Case]:
    found = take(path, "compute_block_mask_2d", Tuple=tuple)
    cases = []
    for grid, ratio, inverse in [
        ((14, 14), 0.8, True),
        ((7, 7), 0.8, True),
        ((14, 14), 0.5, False),
    ]:
        masks = found.compute_block_mask_2d(
            (draws, grid[0] * grid[1]),
            mask_prob=ratio,
            mask_length=3,
            mask_prob_adjust=0.07,
            inverse_mask=inverse,
        )
        count = int(masks[0].sum())
        cases.append(case(grid, masks.numpy(), count=count, inverse=inverse))
    return cases


class Fresh(float):
    """A uniform number that is another one each time it is multiplied."""

    def __mul__(self, other: float) -> float:
        return random.random() * other


def ijepa(path: Path, draws: int) -> list[Case]:
    quiet = types.SimpleNamespace(warning=lambda *_: None)
    mended = types.SimpleNamespace(
        **vars(torch)
        | {
            "rand": lambda *_, **__: types.SimpleNamespace(item=Fresh),
            "randint": lambda low, high, size: torch.randint(low, high + 1, size),
        }
    )
    cases = []
    for grid, least, ours in [
        ((14, 14), 10, mended),
        ((16, 10), 10, mended),
        ((7, 7), 4, mended),
        ((14, 14), 10, torch),
    ]:
        found = take(
            path, "MaskCollator", torch=ours, logger=quiet, Value=multiprocessing.Value
        ).MaskCollator
        # One image per call: sizes are drawn for each call, and nothing is cut to the shortest.
        collator = found(
            input_size=grid,
            patch_size=1,
            enc_mask_scale=(0.85, 1.0),
            pred_mask_scale=(0.15, 0.2),
            aspect_ratio=(0.75, 1.5),
            nenc=1,
            npred=4,
            min_keep=least,
        )
        hidden = np.ones((draws, grid[0] * grid[1]), bool)
        targets = np.zeros((draws, grid[0] * grid[1]), bool)
        size = []
        for row in range(draws):
            _, (context,), blocks = collator([torch.zeros(1)])
            hidden[row, context[0]] = False
            for block in blocks:
                targets[row, block[0]] = True
            size.append(blocks[0].shape[1])
        bugs = {} if ours is mended else {"compared": False, "why": "with its bugs, for the record"}
        some = {"min_keep": least, **bugs}
        cases.append(case(grid, hidden, masks="hidden", **some))
        cases.append(case(grid, targets, masks="targets", **some))
        cases[-1]["sizes"] = golden.histogram(np.array(size))
    return cases


# --- uniform and regular


def mae(path: Path, draws: int) -> list[Case]:
    method = take(path, "MaskedAutoencoderViT.random_masking").random_masking
    cases = []
    for grid in GRIDS:
        masks = method(None, torch.zeros(draws, grid[0] * grid[1], 1), 0.75)[1]
        cases.append(case(grid, masks.numpy(), count=int(masks[0].sum())))
    return cases


def simmim(path: Path, draws: int) -> list[Case]:
    found = take(path, "MaskGenerator")
    cases = []
    for grid, unit in [((14, 14), 2), ((12, 12), 4), ((7, 7), 1)]:
        generator = found.MaskGenerator(grid[0], unit, 1, 0.6)
        masks = draw(draws, generator)
        cases.append(case(grid, masks, unit=unit, count=int(masks[0].sum())))
    return cases


def um_mae(path: Path, draws: int) -> list[Case]:
    found = take(path, "RandomMaskingGenerator", rearrange=einops.rearrange, print=lambda *_: None)
    return [
        case(grid, draw(draws, found.RandomMaskingGenerator(grid, 0.75, regular=True)))
        for grid in ((14, 14), (16, 10))
    ]


# --- guided


def attmask(path: Path, draws: int) -> list[Case]:
    found = take(path, "AttMask", "get_mask", "attention_masking", "show_hints")
    cases = []
    for grid, mode, share, shown in [
        ((14, 14), "high", 1.0, 0.0),
        ((14, 14), "low", 1.0, 0.0),
        ((14, 14), "hint", 1.0, 0.3),
        ((16, 10), "hint", 1.0, 0.5),
        ((14, 14), "hint", 0.5, 0.3),
    ]:
        signal = golden.attention(draws, grid, seed=1)
        masks = found.AttMask(signal, share, f"attmask_{mode}", 0.3, 0.1 * shown, 0.1)
        count = int(grid[0] * grid[1] * 0.3)
        arguments = {"mode": mode, "share": share, "hint": shown, "count": count}
        cases.append(case(grid, masks, **arguments))
        cases[-1]["p_by_rank"] = golden.by_rank(masks, signal)
    return cases


def hpm(path: Path, draws: int) -> list[Case]:
    method = take(path, "MaskedAutoencoderViT.generate_mask").generate_mask
    grid, cases = (14, 14), []
    for share in (0.0, 0.25, 0.5):
        signal = golden.attention(draws, grid, seed=2)
        # The share is (epoch + 1) / total / 2.
        masks = method(None, signal, 0.75, epoch=round(share * 400) - 1, total_epoch=200)
        cases.append(case(grid, masks, share=share, count=int(masks[0].sum())))
        cases[-1]["p_by_rank"] = golden.by_rank(masks > 0, signal)
    return cases


def milan(path: Path, draws: int) -> list[Case]:
    method = take(path, "MaskedAutoencoderViT.attention_masking").attention_masking
    cases = []
    for grid in ((14, 14), (7, 7)):
        signal = golden.attention(draws, grid, seed=3)
        masks = method(None, torch.zeros(draws, grid[0] * grid[1], 1), 0.75, signal)[1]
        cases.append(case(grid, masks, count=int(masks[0].sum())))
        cases[-1]["p_by_rank"] = golden.by_rank(masks > 0, signal)
    return cases


def argsort(x: Tensor, dim: int) -> Tensor:
    """Sort with ties in random order. What they sort are whole numbers, or random anyway."""
    return torch.argsort(x + torch.rand(x.shape) / 2 if x.is_floating_point() else x, dim=dim)


MENDED = types.SimpleNamespace(**vars(torch) | {"argsort": argsort})


def semmae(path: Path, draws: int) -> list[Case]:
    self = types.SimpleNamespace(unpatchify=lambda x: x)
    grid, cases = (14, 14), []
    for within, ours in [(1.0, MENDED), (0.5, MENDED), (0.25, MENDED), (0.0, MENDED), (0.5, torch)]:
        name = "random_masking_setting3"
        method = getattr(take(path, f"MaskedAutoencoderViT.{name}", torch=ours), name)
        masks = []
        for size in [2000] * (draws // 2000):
            labels = golden.parts(size, grid)
            member = F.one_hot(labels, 7).float()
            total = member.sum(dim=1, keepdim=True).expand(-1, labels.shape[1], -1)
            place = torch.arange(labels.shape[1]).expand(size, -1)
            blank = torch.zeros(size, labels.shape[1], 1)
            result = method(self, within, blank, blank, 0.75, member, total, place)
            shuffled, where = result[2] > 0, result[4]  # in shuffled order, and whence each came
            masks.append(torch.zeros_like(shuffled).scatter(1, where, shuffled))
        hidden = torch.cat(masks)
        why = {"compared": False, "why": "trimmed in the order of a sort's ties, for the record"}
        some = {} if ours is MENDED else why
        cases.append(case(grid, hidden, within=within, count=int(hidden[0].sum()), **some))
        cases[-1] |= golden.in_parts(hidden, golden.parts(draws, grid))
    return cases


def cluster(path: Path, draws: int) -> list[Case]:
    cut = take(path.parent / "utils.py", "patchify").patchify
    cases = []
    for grid, count in [((14, 14), 98), ((7, 7), 25)]:
        patches = grid[0] * grid[1]
        dropout = types.SimpleNamespace(prob=0.03, training=True, exclude_first_token=True)
        method = take(
            path, "PatchDropout.forward", torch=MENDED, patchify=partial(cut, p=golden.PIXELS)
        ).forward

        def hidden(
            threshold: float,
            pictures: Tensor,
            method: Callable[..., Any] = method,
            self: Any = dropout,
            patches: int = patches,
        ) -> Tensor:
            # Each token is its own number, so that what comes back says which were kept.
            tokens = torch.arange(-1, patches)[None, :, None].repeat(len(pictures), 1, 1).float()
            kept, barred, _ = method(self, tokens, pictures, sim=threshold, min_mask_ratio=0.3)
            shown = barred[:, 0, 1:] == 0
            everything = torch.ones(len(pictures), patches, dtype=torch.bool)
            return everything.scatter(1, kept[:, 1:, 0].long(), ~shown)

        # One threshold for all, so that they hide the ratio on average, the least included.
        sample = golden.images(2000, grid, seed=5)
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            more = hidden(middle, sample).sum(dim=1).float().mean() > count
            low, high = (middle, high) if more else (low, middle)
        drawn, typical = [], []
        for index in range(draws // 500):
            pictures = golden.images(500, grid, seed=6 + index)
            drawn.append(hidden(high, pictures))
            typical.append(golden.typicality(pictures, grid))
        masks = torch.cat(drawn)
        cases.append(case(grid, masks, mean_count=count, threshold=round(high, 4)))
        cases[-1]["p_by_rank"] = golden.by_rank(masks, torch.cat(typical))
    return cases


def blurred(noise: np.ndarray, width: float) -> np.ndarray:
    """Filter images ``(L, M, M)`` by a Gaussian, around the edges."""
    distance = np.minimum(np.arange(noise.shape[-1]), noise.shape[-1] - np.arange(noise.shape[-1]))
    weight = np.exp(-0.5 * (distance / width) ** 2)
    filter_ = np.fft.fft(weight / weight.sum())
    spectrum = np.fft.fft2(noise) * filter_[:, None] * filter_
    return np.fft.ifft2(spectrum).real


def colormae(path: Path, draws: int) -> list[Case]:
    found = take(path, "NormalizeBySliceMax", "ColorMasking", transforms=transforms)
    cases = []
    fine, coarse = 1.0, 2.0
    for grid in ((14, 14), (7, 7)):
        for color in ("red", "green", "blue", "purple"):
            masks = []
            for _ in range(draws // 2000):
                white = np.random.random((2000, 48, 48))
                weak, strong = blurred(white, fine), blurred(white, coarse)
                bank = {
                    "red": strong,
                    "green": weak - strong,
                    "blue": white - weak,
                    "purple": white - (weak - strong),
                }[color]

                class Bank(found.ColorMasking):
                    def change_color_pattern(self, data_path: torch.Tensor) -> None:
                        self.image_tensor, self.device = data_path, torch.device("cpu")

                # Not negative, as their division by the greatest value expects it to be.
                masker = Bank(grid[0], 0.75, torch.from_numpy(bank - bank.min()))
                masks.append(masker.color_noise_mask(masker.extract_windows(len(bank)))[0])
            hidden = torch.cat(masks)
            count = int(hidden[0].sum())
            cases.append(case(grid, hidden, color=color, fine=fine, coarse=coarse, count=count))
    return cases


METHODS: dict[str, tuple[Callable[[Path, int], list[Case]], str, str, str, str | None]] = {
    # method: (draws it, repository, file, callable, what ours does differently on purpose)
    "beit": (beit, "microsoft/unilm", "beit/masking_generator.py", "MaskingGenerator", None),
    "ibot": (
        ibot,
        "bytedance/ibot",
        "loader.py",
        "ImageFolderMask.__getitem__",
        "A request that is no whole number of patches is rounded, not kept as a fraction.",
    ),
    "dinov2": (
        partial(dino_blocks, collate="collate.py"),
        "facebookresearch/dinov2",
        "dinov2/data/masking.py",
        "MaskingGenerator, collate_data_and_cast",
        "Ratios are rounded to the nearest number of patches, not down.",
    ),
    "dinov3": (
        partial(dino_blocks, collate="collate.py"),
        "facebookresearch/dinov3",
        "dinov3/data/masking.py",
        "MaskingGenerator, collate_data_and_cast",
        "Ratios are rounded to the nearest number of patches, not down.",
    ),
    "capi": (
        capi,
        "facebookresearch/capi",
        "data.py",
        "BlockMasking, InverseBlockMasking",
        None,
    ),
    "data2vec2": (
        data2vec2,
        "facebookresearch/fairseq",
        "fairseq/data/data_utils.py",
        "compute_block_mask_2d",
        "Grids need not be square.",
    ),
    "ijepa": (
        ijepa,
        "facebookresearch/ijepa",
        "src/masks/multiblock.py",
        "MaskCollator",
        "Mended when the golden draws were made, and not reproduced: the last place of a block was "
        "never drawn, and scale and aspect came from one number. Drawn one image at a time: "
        "sizes shared by a batch, and lists cut to the shortest, are not reproduced either. Where "
        "20 contexts are too small, the largest of them is taken; no target is given up.",
    ),
    "mae": (
        mae,
        "facebookresearch/mae",
        "models_mae.py",
        "MaskedAutoencoderViT.random_masking",
        None,
    ),
    "simmim": (
        simmim,
        "microsoft/SimMIM",
        "data/data_simmim.py",
        "MaskGenerator",
        "The number of hidden units is rounded to the nearest, not up; grids need not be square.",
    ),
    "um_mae": (
        um_mae,
        "implus/UM-MAE",
        "mask_transform.py",
        "RandomMaskingGenerator",
        "Each cell draws its visible patch alone; there the four places are dealt from a deck that "
        "holds each equally often.",
    ),
    "attmask": (
        attmask,
        "gkakogeorgiou/attmask",
        "attmask.py",
        "AttMask",
        "Ratios are drawn per image, not per batch; a hint of no patches at all is no error.",
    ),
    "hpm": (
        hpm,
        "Haochen-Wang409/HPM",
        "models_mae_learn_loss.py",
        "MaskedAutoencoderViT.generate_mask",
        None,
    ),
    "milan": (
        milan,
        "zejiangh/MILAN",
        "models_milan.py",
        "MaskedAutoencoderViT.attention_masking",
        None,
    ),
    "cluster": (
        cluster,
        "Zi-hao-Wei/Efficient-Vision-Language-Pre-training-by-Cluster-Masking",
        "open_clip/transformer.py",
        "PatchDropout.forward",
        "The threshold holds for a batch, not for all of training, and is the one that hides the "
        "ratio (the code passes the ratio itself as the threshold). What is hidden to reach the "
        "least share is random, not what a sort leaves last among equals (mended when the golden "
        "draws were made).",
    ),
    "colormae": (
        colormae,
        "carlosh93/ColorMAE",
        "models/utils/masking_generator.py",
        "ColorMasking",
        "The authors' files of noise are not reproduced, whose widths are not published: the noise "
        "for the golden draws was made by the paper's formulas with the widths given in each case, "
        "and the authors' code cut the masks from it.",
    ),
    "semmae": (
        semmae,
        "ucasligang/SemMAE",
        "models_mae_setting3.py",
        "MaskedAutoencoderViT.random_masking_setting3",
        "The exact count is reached by showing or hiding patches at random, not those that a sort "
        "leaves first among equals (mended when the golden draws were made).",
    ),
}


def plain(value: Any) -> Any:
    """Numbers that JSON knows, shares with four decimals, keys in order."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return [round(float(v), 4) for v in value] if value.ndim == 1 else [plain(v) for v in value]
    return value


def write(method: str, peers: Path, draws: int) -> None:
    make, source, file, name, deliberate = METHODS[method]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    began = time.perf_counter()
    git = ["git", "-C", str(peers / method), "rev-parse", "HEAD"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    record = {
        "source": source,
        "commit": commit,
        "file": file,
        "callable": name,
        "draws": draws,
        "deliberate": deliberate,
        "cases": make(peers / method / file, draws),
    }
    lines = ",\n".join(json.dumps(plain(c)) for c in record.pop("cases"))
    head = json.dumps(record, indent=1)[:-2]
    path = golden.HERE / f"{method}.json"
    path.write_text(f'{head},\n "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{method}: {path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="folder of their checkouts")
    parser.add_argument("--only", nargs="*", default=list(METHODS), help="methods to write")
    parser.add_argument("--draws", type=int, default=20_000, help="masks per case")
    options = parser.parse_args()
    for method in options.only:
        write(method, options.peers, options.draws)


if __name__ == "__main__":
    main()
