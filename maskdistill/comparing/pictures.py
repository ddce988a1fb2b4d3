"""The pictures of a study's report, as ``data:`` addresses that a page holds in itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskdistill.comparing.results import Results, RunResult
from maskdistill.data import derive_seed, normalize
from maskdistill.data.augment import MultiCrop
from maskdistill.evaluation import load_backbone, reinitialised
from maskdistill.job_config import JobConfig, saved_config
from maskdistill.judge import JobImages, Judge
from maskdistill.measures import MEASURES
from maskdistill.models import MaskedViT
from maskdistill.plotting import (
    attention_pixels,
    masked_pixels,
    plot_intervals,
    plot_occlusion,
    plot_training_bands,
    style,
)
from maskdistill.views import ViewPolicy

_THUMB = 192  # pixels, twice those on the page
_DRAWS, _AT_ONCE = 2000, 100
_SHOWN = 8  # images whose attention is shown
_LOCAL = 3  # local views that are shown


@dataclass(frozen=True)
class Plot:
    """A plot for light pages and for dark ones.

    Attributes:
        light: ``data:`` address.
        dark: the same plot, for a dark page.
        title: what it shows.
    """

    light: str
    dark: str
    title: str = ""


class SheetRow(NamedTuple):
    """A row of pictures.

    Attributes:
        title: of the row.
        images: ``data:`` addresses; None is a view that is not seen.
    """

    title: str
    images: tuple[str | None, ...]


def plot_twice(draw: Callable[[], Any], title: str = "") -> Plot:
    """Draw a figure as SVG, once for light pages and once for dark ones."""
    found = []
    for page in (style.light, style.dark):
        with page():
            written = io.BytesIO()
            draw().savefig(written, format="svg")
            found.append(_address(written.getvalue(), "image/svg+xml"))
    return Plot(found[0], found[1], title)


def training_plots(results: Results) -> list[Plot]:
    """Draw k-NN accuracy and loss over training, with bands over seeds."""
    order = list(results.study.policies)
    policies = [policy for policy in order if results.of(policy)]
    accuracy = {p: [_with_start(run) for run in results.of(p)] for p in policies}
    pixels = [run.summary["knn_raw_pixels"] for run in results.done]
    floors = {"raw pixels": sum(pixels) / len(pixels)}
    losses: dict[str, list[Any]] = {}
    for policy in policies:  # a run of very few steps, or of no finite loss, has no line of it
        there = [list(r.metrics) for r in results.of(policy) if any("loss" in m for m in r.metrics)]
        if there:
            losses[policy] = there
    draw = partial(plot_training_bands, accuracy, "knn", floors=floors, order=order)
    plots = [plot_twice(draw, "20-NN accuracy over training")]
    if losses:
        draw = partial(plot_training_bands, losses, "loss", order=order)
        plots.append(plot_twice(draw, "Loss over training"))
    return plots


def robustness_plots(results: Results) -> list[Plot]:
    """Draw accuracy under each kind of occlusion that was measured."""
    order = list(results.study.policies)
    plots = []
    for kind, words in (
        ("random", "random patches"),
        ("salient", "patches of the object first"),
        ("background", "patches of the background first"),
    ):
        name = f"occlusion_{kind}"
        curves: dict[str, list[Any]] = {}
        for policy in order:
            there = [r.measured.curves[name] for r in results.of(policy)
                     if r.measured and name in r.measured.curves]  # fmt: skip
            if there:
                curves[policy] = there
        if curves:
            draw = partial(plot_occlusion, curves, label="20-NN accuracy (%)", order=order)
            plots.append(plot_twice(draw, f"Occlusion of {words}"))
    return plots


def forest_plot(results: Results) -> Plot | None:
    """Draw the differences to the baseline in the tested measures, with their intervals."""
    if not results.claims:
        return None
    differences: dict[str, dict[str, Sequence[float]]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    # Those in per cent share an axis, so they come first.
    for claim in sorted(results.claims, key=lambda c: MEASURES[c.measure].unit != "%"):
        mean, low, high = claim.interval
        differences.setdefault(claim.policy, {})[claim.measure] = claim.values
        ends = (mean if low is None else low, mean if high is None else high)
        intervals.setdefault(claim.policy, {})[claim.measure] = ends
    of = {name: MEASURES[name] for name in results.study.tested}
    return plot_twice(
        lambda: plot_intervals(
            differences,
            intervals,
            baseline=str(results.study.baseline),
            titles={name: measure.title for name, measure in of.items()},
            units={name: measure.unit for name, measure in of.items()},
            better={name: measure.better for name, measure in of.items()},
            order=list(results.study.policies),
        ),
        "Differences to the baseline",
    )


class ReportImages:
    """The backbones and images that pictures are made of, of one seed.

    Args:
        results: of the study.
        images: its data.

    Attributes:
        seed: the first with the most policies done.
        runs: of that seed, by policy.
    """

    def __init__(self, results: Results, images: JobImages) -> None:
        counts = {
            seed: sum(run.cell.seed == seed for run in results.done) for seed in results.study.seeds
        }
        self.seed = max(counts, key=lambda seed: counts[seed])  # the first of those
        self.runs = {r.cell.policy: r for r in results.done if r.cell.seed == self.seed}
        self.results = results
        self.images = images
        self.config: JobConfig = saved_config(next(iter(self.runs.values())).folder)
        self.judge = Judge(images, self.config.image_size, knn_train=1, knn_val=self.config.knn_val)
        self._lossless = self.config.image_size <= 64

    def backbone(self, policy: str) -> MaskedViT:
        """Return the trained backbone of a policy, on the CPU."""
        return load_backbone(self.runs[policy].folder).eval()

    def picture(self, pixels: Any) -> str:
        """Return the address of a picture: exact for small images, in WebP for photographs."""
        image, written = Image.fromarray(np.asarray(pixels)), io.BytesIO()
        if self._lossless:
            image.save(written, format="PNG", optimize=True)
            return _address(written.getvalue(), "image/png")
        image.save(written, format="WEBP", quality=88, method=6)
        return _address(written.getvalue(), "image/webp")

    # --- Attention

    def attention(self) -> tuple[list[SheetRow], bool] | None:
        """Return rows of attention, and whether objects are outlined; None without attention."""
        shown = self.judge.shown[:_SHOWN]
        pixels = self.judge.pixels(shown)
        masks = self.images.val_masks
        outlines = None if masks is None else torch.from_numpy(masks[shown])
        models: dict[str, MaskedViT] = {}
        first = next(iter(self.runs))
        models["random weights"] = reinitialised(self.backbone(first), self.seed)
        models.update({policy: self.backbone(policy) for policy in self.runs})
        rows = [SheetRow("image", tuple(self.picture(self._plain(image)) for image in pixels))]
        for name, vit in models.items():
            try:
                with torch.no_grad():
                    maps = vit.eval().attention(normalize(pixels)).mean(dim=1)
            except ValueError:  # a model without a class token
                return None
            grid = vit.grid(self.config.image_size, self.config.image_size)
            pictures = [
                attention_pixels(
                    pixels[i], maps[i], grid, size=_THUMB,
                    outline=None if outlines is None else outlines[i],
                )
                for i in range(len(shown))
            ]  # fmt: skip
            rows.append(SheetRow(name, tuple(self.picture(one) for one in pictures)))
        return rows, outlines is not None

    def _plain(self, image: Tensor) -> Any:
        return masked_pixels(image, None, (1, 1), size=_THUMB)

    # --- Masks

    def masks(self, policy: str) -> tuple[list[str], list[SheetRow]]:
        """Return titles of columns, and rows of what each role sees of an image's views."""
        crops, boxes, flipped = self._crops()
        drawn_from = self.results.study.policy(policy)
        vit = self.backbone(policy)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "report masks"))
        masks = self._draw(drawn_from, vit, crops, boxes, flipped, 1, generator)
        often: dict[str, Tensor] = {}
        for _ in range(_DRAWS // _AT_ONCE):  # some maskers compare all patches of all images
            part = self._draw(drawn_from, vit, crops, boxes, flipped, _AT_ONCE, generator)
            for role in ("student", "teacher"):
                first = getattr(part, role)[0]
                if first is not None:
                    often[role] = often.get(role, 0) + first.float().sum(dim=0) / _DRAWS
        views = min(len(crops), drawn_from.global_crops + _LOCAL)
        names = [
            f"global {i + 1}" if i < drawn_from.global_crops
            else f"local {i + 1 - drawn_from.global_crops}"
            for i in range(views)
        ]  # fmt: skip
        rows = []
        for role in ("student", "teacher"):
            own = getattr(masks, role)
            pictures = [self._seen(crops, own, vit, view) for view in range(views)]
            probability = None
            if role in often:
                grid = vit.grid(*crops[0].shape[-2:])
                probability = self.picture(
                    attention_pixels(None, often[role], grid, scale=1.0, size=_THUMB)
                )
            rows.append(SheetRow(role, (*pictures, probability)))
        return [*names, "how often"], rows

    def _seen(
        self, crops: list[Tensor], masks: Sequence[Tensor | None], vit: MaskedViT, view: int
    ) -> str | None:
        if view >= len(masks):
            return None
        mask, crop = masks[view], crops[view]
        drawn = masked_pixels(
            crop[0], None if mask is None else mask[0], vit.grid(*crop.shape[-2:]), size=_THUMB
        )
        return self.picture(drawn)

    def _crops(self) -> tuple[list[Tensor], Tensor, Tensor]:
        c = self.config
        assert c.local_size is not None
        cut = MultiCrop(c.image_size, c.local_size, c.local_crops, c.global_scale, c.local_scale)
        image = self.images.val[self.judge.shown[0]][0]
        return tuple(cut.cut([image], torch.tensor([derive_seed(self.seed, "report views")])))  # type: ignore[return-value]

    def _draw(
        self,
        policy: ViewPolicy,
        vit: MaskedViT,
        crops: list[Tensor],
        boxes: Tensor,
        flipped: Tensor,
        count: int,
        generator: torch.Generator,
    ) -> Any:
        signals: dict[str, Any] = {}
        if "attention" in policy.needs:
            with torch.no_grad():
                signals["attention"] = [
                    _repeated(vit.attention(normalize(crop)).mean(dim=1), count)
                    for crop in crops[: policy.global_crops]
                ]
        return policy(
            [_repeated(crop, count) for crop in crops],
            vit.patch_size,
            generator=generator,
            progress=1.0,  # schedules have come to their end
            boxes=_repeated(boxes, count),
            flipped=_repeated(flipped, count),
            **signals,
        )


def colour_scale() -> str:
    """Return a bar of the colours of attention, from none to most."""
    bar = attention_pixels(None, torch.arange(256) / 255, (1, 256), look="map", size=(8, 256))
    written = io.BytesIO()
    Image.fromarray(bar).save(written, format="PNG")
    return _address(written.getvalue(), "image/png")


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor.expand(count, *tensor.shape[1:])


def _with_start(run: RunResult) -> list[dict[str, Any]]:
    start = {"step": 0, "knn": run.summary["knn_random_init"]}
    return [start, *(dict(line) for line in run.metrics if "knn" in line)]


def _address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
