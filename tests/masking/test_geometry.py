"""Masks that know where a crop lies in its image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import maskdistill as md
from maskdistill.masking.geometry import carry_signal


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(images: int, views: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    start = 0.6 * torch.rand(images, views, 2, generator=generator(seed))
    size = 0.2 + 0.2 * torch.rand(images, views, 2, generator=generator(seed + 1))
    boxes = torch.cat([start, start + size], dim=2)
    return boxes, torch.rand(images, views, generator=generator(seed + 2)) < 0.5


def corners(box: Tensor, flipped: bool, grid: tuple[int, int]) -> Tensor:
    """Return left, top, right, bottom of each patch in the image: ``(H, W, 4)``, by plain loops."""
    left, top, right, bottom = box.tolist()
    places = torch.zeros(*grid, 4)
    for i in range(grid[0]):
        for j in range(grid[1]):
            column = grid[1] - 1 - j if flipped else j
            width, height = (right - left) / grid[1], (bottom - top) / grid[0]
            x, y = left + column * width, top + i * height
            places[i, j] = torch.tensor([x, y, x + width, y + height])
    return places


def area_inside(place: Tensor, region: Tensor) -> float:
    """Measure the share of a rectangle that lies in hidden cells of a region, cell by cell."""
    x0, y0, x1, y1 = place.tolist()
    rows, columns = region.shape
    inside = 0.0
    for i, j in region.nonzero().tolist():
        across = min(x1, (j + 1) / columns) - max(x0, j / columns)
        down = min(y1, (i + 1) / rows) - max(y0, i / rows)
        inside += max(across, 0) * max(down, 0)
    return inside / ((x1 - x0) * (y1 - y0))


@pytest.mark.parametrize("cover", [0.0, 0.5, 1.0])
def test_a_scene_mask_hides_what_lies_in_the_region(cover: float) -> None:
    """Against areas computed patch by patch and cell by cell."""
    images, views, grid = 3, 2, (4, 5)
    boxes, flipped = random_boxes(images, views)
    inner = md.RandomMasker(0.5).in_units(3)
    masker = md.SceneMasker(inner, grid=(9, 7), cover=cover)
    memory: dict = {}
    mask = masker(
        images * views, grid, generator=generator(3), views=views, memory=memory,
        boxes=boxes.transpose(0, 1).flatten(0, 1), flipped=flipped.T.flatten(),
    ).view(views, images, *grid)  # fmt: skip
    scene = inner(images, (9, 7), generator=generator(3)).view(images, 9, 7)
    assert torch.equal(next(iter(memory.values())).view_as(scene), scene)
    seen = {True: 0, False: 0}
    for image in range(images):
        for view in range(views):
            places = corners(boxes[image, view], bool(flipped[image, view]), grid)
            for i in range(grid[0]):
                for j in range(grid[1]):
                    share = area_inside(places[i, j], scene[image])
                    if abs(share - cover) < 1e-3 and 0 < cover < 1:
                        continue
                    hidden = share > 1e-3 if cover == 0 else share > min(cover, 1 - 1e-3)
                    assert bool(mask[view, image, i, j]) == hidden, share
                    seen[hidden] += 1
    assert min(seen.values()) > 10


def crops(images: int, local: int) -> list[Tensor]:
    return [torch.zeros(images, 3, 64, 64)] * 2 + [torch.zeros(images, 3, 32, 32)] * local


def test_one_region_for_all_views_and_roles() -> None:
    """Where two views overlap, what one hides the other does not show, on whole patches."""
    images, local = 6, 3
    boxes = torch.tensor([0.25, 0.25, 0.75, 0.75]).repeat(images, 2 + local, 1)
    flipped = torch.zeros(images, 2 + local, dtype=torch.bool)
    flipped[:, 1] = True
    scene = md.SceneMasker(md.BlockMasker(0.5), grid=(16, 16))
    policy = md.ViewPolicy(student_global=scene, student_local=scene, teacher_global=scene)
    masks = policy(crops(images, local), 8, generator=generator(), boxes=boxes, flipped=flipped)
    first, second = (m.view(images, 8, 8) for m in masks.student[:2])  # type: ignore[union-attr]
    assert first.any()
    assert not first.all()
    assert torch.equal(first, second.flip(2))
    assert torch.equal(masks.teacher[0], masks.student[0])  # type: ignore[arg-type]
    for small in masks.student[2:]:
        assert torch.equal(small, masks.student[2])  # type: ignore[arg-type]
        # A local patch is four global ones here: hidden if at least two of them are.
        four = first.float().unfold(1, 2, 2).unfold(2, 2, 2).sum(dim=(3, 4)).flatten(1)
        assert torch.equal(small, four >= 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cover", "hides"), [(1.0, True), (0.0, False)])
def test_complementary_views_never_hide_or_never_show_the_same_place(
    cover: float, hides: bool
) -> None:
    images = 40
    boxes, flipped = random_boxes(images, 2, seed=5)
    boxes[:, 1] = (boxes[:, 0] + 0.05 * torch.rand(images, 4, generator=generator(9))).clamp(0, 1)
    masker = md.SceneMasker(
        md.RandomMasker(0.5).in_units(4), grid=(24, 24), cover=cover, views="complementary"
    )
    policy = md.AsymmetricMaskPolicy(masker)
    masks = policy(crops(images, 0), 8, generator=generator(), boxes=boxes, flipped=flipped)
    points = torch.rand(2000, 2, generator=generator(1))
    both = neither = 0
    for image in range(images):
        state = []
        for view in range(2):
            left, top, right, bottom = boxes[image, view]
            x, y = (points[:, 0] - left) / (right - left), (points[:, 1] - top) / (bottom - top)
            inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
            x = 1 - x if flipped[image, view] else x
            column, row = (8 * x).long().clamp(0, 7), (8 * y).long().clamp(0, 7)
            mask = masks.student[view]
            assert mask is not None
            state.append((inside, mask[image][8 * row + column]))
        inside = state[0][0] & state[1][0]
        same = state[0][1] & state[1][1] if hides else ~state[0][1] & ~state[1][1]
        other = ~state[0][1] & ~state[1][1] if hides else state[0][1] & state[1][1]
        both += int((same & inside).sum())
        neither += int((other & inside).sum())
    assert both == 0
    assert neither > 100  # the price: some places are treated alike the other way


def test_carrying_to_the_same_place_changes_nothing() -> None:
    boxes, flipped = random_boxes(5, 1)
    signal = torch.rand(5, 12, generator=generator())
    carried = carry_signal([signal], [(3, 4)], boxes, flipped, boxes[:, 0], flipped[:, 0], (3, 4))
    assert torch.allclose(carried, signal, atol=1e-5)
    mirrored = carry_signal([signal], [(3, 4)], boxes, flipped, boxes[:, 0], ~flipped[:, 0], (3, 4))
    assert torch.allclose(mirrored.view(5, 3, 4).flip(2).flatten(1), signal, atol=1e-5)


def test_carried_attention_agrees_with_areas_patch_by_patch() -> None:
    images, source, grid = 4, (6, 5), (3, 3)
    boxes, flipped = random_boxes(images, 2, seed=11)
    box, flip = random_boxes(images, 1, seed=21)
    box[:, 0] = boxes[:, 0] + 0.05  # mostly within the first source
    signals = [torch.rand(images, 30, generator=generator(k)) for k in (1, 2)]
    carried = carry_signal(signals, [source] * 2, boxes, flipped, box[:, 0], flip[:, 0], grid)
    checked = 0
    for image in range(images):
        targets = corners(box[image, 0], bool(flip[image, 0]), grid).view(-1, 4)
        wanted = []
        for place in targets:
            total = shown = 0.0
            for view in range(2):
                cells = corners(boxes[image, view], bool(flipped[image, view]), source).view(-1, 4)
                for cell, value in zip(cells, signals[view][image], strict=True):
                    low, high = (
                        torch.maximum(cell[:2], place[:2]),
                        torch.minimum(cell[2:], place[2:]),
                    )
                    area = float((high - low).clamp_min(0).prod())
                    total, shown = total + area * float(value), shown + area
            wanted.append(total / shown if shown > 1e-5 else None)
        known = [value for value in wanted if value is not None]
        mean = sum(known) / len(known)
        checked += len(known)
        expected = torch.tensor([mean if value is None else value for value in wanted])
        assert torch.allclose(carried[image], expected, atol=1e-4)
    assert checked > 20


def test_local_views_are_guided_by_the_teacher() -> None:
    """A local crop inside the attended quarter hides most where attention was high."""
    images = 4
    whole, quarter = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5]
    boxes = torch.tensor([whole, whole, quarter]).repeat(images, 1, 1)
    flipped = torch.zeros(images, 3, dtype=torch.bool)
    attention = torch.zeros(images, 2, 8, 8)
    attention[:, :, :4, :2] = 1.0  # the left half of the upper left quarter
    policy = md.ViewPolicy.local_only(md.AttentionGuidedMasker(0.5))
    given = [attention.flatten(2)] * 2
    masks = policy(crops(images, 1), 8, attention=given, boxes=boxes, flipped=flipped)
    small = masks.student[2]
    assert small is not None
    left = torch.tensor([True, True, False, False]).repeat(4)
    assert torch.equal(small, left.expand(images, 16))
    with pytest.raises(ValueError, match=r"Pass boxes= and flipped="):
        policy(crops(images, 1), 8, attention=given)
    with pytest.raises(ValueError, match="needs the signal"):
        policy(crops(images, 1), 8, boxes=boxes, flipped=flipped)


def test_a_place_that_nobody_saw_gets_the_mean_of_the_others() -> None:
    whole = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]])
    seen = torch.tensor([[4.0, 2.0]])
    still = torch.tensor([[False]])
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    carried = carry_signal([seen], [(2, 1)], whole, still, box, still[:, 0], (2, 2))
    assert carried.tolist() == [[4.0, 3.0, 2.0, 3.0]]
    away = torch.tensor([[0.6, 0.0, 1.0, 1.0]])
    assert not carry_signal([seen], [(2, 1)], whole, still, away, still[:, 0], (2, 2)).any()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="needs no signal"):
        md.SceneMasker(md.AttentionGuidedMasker(0.5))
    for bad in ({"grid": (0, 4)}, {"cover": 1.5}, {"views": "other"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            md.SceneMasker(md.RandomMasker(0.5), **bad)  # type: ignore[arg-type]
    masker = md.SceneMasker(md.RandomMasker(0.5))
    with pytest.raises(ValueError, match=r"boxes must be \(B, 4\)"):
        masker(2, (4, 4), boxes=torch.zeros(3, 4), flipped=torch.zeros(2))
    policy = md.AsymmetricMaskPolicy(masker)
    boxes, flipped = random_boxes(4, 2)
    with pytest.raises(ValueError, match="go together"):
        policy(crops(4, 0), 8, boxes=boxes)
    with pytest.raises(ValueError, match=r"boxes must be \(B, V, 4\)"):
        policy(crops(4, 1), 8, boxes=boxes, flipped=flipped)
    parts = torch.zeros(4, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="only one float per patch"):
        carry_signal([parts], [(4, 4)], boxes, flipped, boxes[:, 0], flipped[:, 0], (2, 2))


@pytest.mark.parametrize("cover", [0.0, 0.5, 1.0])
def test_all_or_nothing_at_any_precision(cover: float) -> None:
    """A patch that lies in the region entirely counts so, whatever the products are rounded to."""
    boxes = torch.tensor([[0.1, 0.2, 0.63, 0.77]]).repeat(8, 1)
    flipped = torch.zeros(8, dtype=torch.bool)
    whole = md.SceneMasker(~md.NoMasker(), cover=cover)
    nothing = md.SceneMasker(md.NoMasker(), cover=cover)
    with torch.autocast("cpu", torch.bfloat16):
        assert whole(8, (14, 14), boxes=boxes, flipped=flipped).all()
        assert not nothing(8, (14, 14), boxes=boxes, flipped=flipped).any()


@pytest.mark.parametrize(
    "box",
    [[0.0, 0.0, 224.0, 224.0], [0.5, 0.5, 0.3, 0.3], [0.0, 0.0, torch.nan, 1.0]],
    ids=["pixels", "width and height", "NaN"],
)
def test_what_is_no_box_is_refused(box: list[float]) -> None:
    masker = md.SceneMasker(md.BlockMasker(0.5))
    with pytest.raises(ValueError, match="shares of the image's width and height"):
        masker(2, (4, 4), boxes=torch.tensor([box] * 2), flipped=torch.zeros(2))
    policy = md.ViewPolicy.local_only(md.AttentionGuidedMasker(0.5))
    boxes = torch.tensor(box).repeat(4, 3, 1)
    with pytest.raises(ValueError, match="Divide pixels"):
        policy(crops(4, 1), 8, attention=torch.rand(8, 64), boxes=boxes,
               flipped=torch.zeros(4, 3, dtype=torch.bool))  # fmt: skip
