"""Our maskers draw like their authors' code: golden statistics, compared by a test.

Each ``golden/<method>.json`` holds statistics of the masks that the authors' own generator drew, at
a named commit (``golden/make_golden.py`` wrote them). Here our masker draws 10,000 masks of the
same kind, with a fixed seed, and each statistic of each case is compared: histograms by the
two-sample chi-square test, shares by the two-proportion z test in each cell. A case fails if it
would by chance fail once in 1,000 times (family-wise significance 1e-3 over all of a case's
comparisons, by Bonferroni's rule). What is different on purpose is named in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maskdistill as md
from tests.masking import golden

SIGNIFICANCE = 1e-3
DRAWS = 10_000

Case = dict[str, Any]

GOLDEN = golden.read()


def ratio(case: Case) -> float:
    """Ask for the count that the original hid: how it was rounded plays no part."""
    return case["count"] / (case["grid"][0] * case["grid"][1])


def stratified(case: Case, jitter: bool) -> md.Stratified:
    """Shift the ratios by half a patch: our rounding to the nearest then rounds down."""
    half = 0.5 / (case["grid"][0] * case["grid"][1])
    low, high = case["collate"]
    return md.Stratified(low - half, high - half, share=case["share"], jitter=jitter)


def dinov2(case: Case, exact: bool = False) -> md.Masker:
    asked = stratified(case, jitter=not exact) if "collate" in case else ratio(case)
    patches = case["grid"][0] * case["grid"][1]
    return md.BlockMasker(asked, max_patches=patches // 2, exact=exact)


def capi(case: Case) -> md.Masker:
    masker = md.masking.SingleBlockMasker(ratio(case), inverse=case["inverse"])
    return masker.rolled() if case["roll"] else masker


def ibot(case: Case) -> md.Masker:
    if case["shape"] == "rand":
        return md.RandomMasker(ratio(case))
    return md.BlockMasker(ratio(case), min_patches=None, exact=False)


def attmask(case: Case) -> md.Masker:
    masker: md.Masker
    if case["mode"] == "hint":
        masker = md.masking.AttentionHintMasker(ratio(case), hint=case["hint"], exact=False)
    else:
        hide = "most" if case["mode"] == "high" else "least"
        masker = md.AttentionGuidedMasker(ratio(case), hide=hide)
    return masker if case["share"] == 1 else masker.sometimes(case["share"])


def cluster(case: Case) -> md.Masker:
    return md.masking.ClusterMasker(
        case["mean_count"] / (case["grid"][0] * case["grid"][1]), exact=False
    )


# Which masker of ours stands for which original.
MASKERS: dict[str, Callable[[Case], md.Masker]] = {
    "beit": lambda c: md.BlockMasker(ratio(c), min_patches=c["min_patches"], exact=False),
    "ibot": ibot,
    "dinov2": dinov2,
    "dinov3": lambda c: dinov2(c, exact=True),
    "capi": capi,
    "data2vec2": lambda c: md.masking.SquaresMasker(ratio(c), inverse=c["inverse"]),
    "ijepa": lambda c: md.masking.MultiBlockMasker(min_visible=c["min_keep"]),
    "mae": lambda c: md.RandomMasker(ratio(c)),
    "simmim": lambda c: md.RandomMasker(ratio(c)).in_units(c["unit"]),
    "um_mae": lambda c: md.masking.GridMasker(2, random=True),
    "colormae": lambda c: md.masking.ColorNoiseMasker(
        ratio(c), c["color"], fine=c["fine"], coarse=c["coarse"]
    ),
    "attmask": attmask,
    "hpm": lambda c: md.SignalMasker(ratio(c), "loss", share=c["share"]),
    "milan": lambda c: ~md.AttentionGuidedMasker(1 - ratio(c), temperature=1.0),
    "semmae": lambda c: md.masking.PartMasker(ratio(c), whole=1 - c["within"]),
    "cluster": cluster,
}


def draw(masker: md.Masker, case: Case) -> tuple[Tensor, dict[str, Any]]:
    """Draw masks, and measure what ``golden.describe`` does not know."""
    generator = torch.Generator().manual_seed(0)
    grid = tuple(case["grid"])
    if isinstance(masker, md.masking.MultiBlockMasker):
        blocks = masker.draw_blocks(DRAWS, grid, generator=generator)
        if case["masks"] == "hidden":
            return ~blocks.context, {}
        sizes = golden.histogram(blocks.targets[:, 0].sum(dim=1).numpy())
        return blocks.targets.any(dim=1), {"sizes": sizes}
    if "images" in masker.needs:  # as many as fit into memory at once
        drawn, typical = [], []
        for index in range(DRAWS // 1000):
            pictures = golden.images(1000, grid, seed=1000 + index)
            drawn.append(masker(1000, grid, generator=generator, images=pictures))
            typical.append(golden.typicality(pictures, grid))
        masks = torch.cat(drawn)
        return masks, {"p_by_rank": golden.by_rank(masks, torch.cat(typical))}
    if "parts" in masker.needs:
        parts = golden.parts(DRAWS, grid)
        masks = masker(DRAWS, grid, generator=generator, parts=parts)
        return masks, golden.in_parts(masks, parts)
    if masker.needs:
        signal = golden.attention(DRAWS, grid, seed=4)
        masks = masker(DRAWS, grid, generator=generator, attention=signal, loss=signal)
        return masks, {"p_by_rank": golden.by_rank(masks, signal)}
    return masker(DRAWS, grid, generator=generator), {}


def compare(method: str, case: Case, masker: md.Masker) -> dict[str, float]:
    """Compare a masker with a golden case: adjusted p-values, by statistic."""
    masks, known = draw(masker, case)
    ours = golden.describe(masks, tuple(case["grid"])) | known
    return golden.compare(case, GOLDEN[method]["draws"], ours, DRAWS)


def label(case: Case) -> str:
    said = {k: v for k, v in case.items() if k == "grid" or isinstance(v, (str, int, float))}
    return ",".join(f"{k}={v}" for k, v in said.items()).replace(" ", "")


CASES = [
    pytest.param(method, case, id=f"{method}:{label(case)}")
    for method, file in GOLDEN.items()
    for case in file["cases"]
    if case.get("compared", True)
]


@pytest.mark.parametrize(("method", "case"), CASES)
def test_draws_like_the_original(method: str, case: Case) -> None:
    found = compare(method, case, MASKERS[method](case))
    assert min(found.values()) >= SIGNIFICANCE, found


@pytest.mark.parametrize("case", [c for c in GOLDEN["dinov3"]["cases"] if "collate" in c])
def test_the_strata_of_a_small_batch(case: Case) -> None:
    """Of 16 crops, eight are whole, and eight hide the upper ends of eight equal strata."""
    found = dinov2(case, exact=True)(16, tuple(case["grid"])).sum(dim=1)
    assert found.sort().values.tolist() == case["counts_of_16"]


@pytest.mark.parametrize(
    ("method", "index", "other"),
    [
        ("beit", 0, md.BlockMasker(75 / 196, exact=False)),
        ("ibot", 0, md.BlockMasker(49 / 196, min_patches=12, exact=False)),
        ("dinov2", 0, md.BlockMasker(59 / 196, max_patches=98, aspect=(0.4, 2.5), exact=False)),
        ("dinov2", 0, md.BlockMasker(59 / 196, min_patches=6, max_patches=98, exact=False)),
        ("dinov3", 0, md.BlockMasker(59 / 196, max_patches=98, exact=False)),
        ("capi", 0, md.masking.SingleBlockMasker(69 / 196, aspect=(0.55, 1 / 0.55))),
        ("data2vec2", 0, md.masking.SquaresMasker(157 / 196, adjust=0.12, inverse=True)),
        ("ijepa", 0, md.masking.MultiBlockMasker(target_scale=(0.15, 0.21))),
        ("mae", 0, md.BlockMasker(147 / 196)),
        ("simmim", 0, md.RandomMasker(120 / 196)),
        ("um_mae", 0, md.RandomMasker(0.75)),
        ("attmask", 2, md.masking.AttentionHintMasker(58 / 196, hint=0.35, exact=False)),
        ("hpm", 1, md.SignalMasker(147 / 196, "loss", share=0.26)),
        ("milan", 0, ~md.AttentionGuidedMasker(49 / 196, temperature=1.1)),
        ("semmae", 1, md.masking.PartMasker(147 / 196, whole=0.55)),
        ("cluster", 0, md.masking.ClusterMasker(0.5, anchors=0.04, exact=False)),
        ("colormae", 1, md.masking.ColorNoiseMasker(147 / 196, "green", fine=1.3)),
    ],
    ids=lambda value: repr(value) if isinstance(value, md.Masker) else str(value),
)
def test_a_small_difference_is_noticed(method: str, index: int, other: md.Masker) -> None:
    """The power of the comparison: neighbours of the right masker fail it."""
    found = compare(method, GOLDEN[method]["cases"][index], other)
    assert min(found.values()) < SIGNIFICANCE, found


def test_every_file_names_its_source_and_is_used() -> None:
    assert GOLDEN.keys() == MASKERS.keys()
    for file in GOLDEN.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", file["source"])
        assert re.fullmatch(r"[0-9a-f]{40}", file["commit"])
        assert file["file"].endswith(".py")
        assert file["callable"]
        assert file["draws"] >= 10_000
        assert file["deliberate"] is None or file["deliberate"].endswith(".")
        for case in file["cases"]:
            assert sum(case["counts"].values()) == file["draws"]
            assert "compared" not in case or case["why"], "a case that is not compared says why"
    used = {(param.values[0], id(param.values[1])) for param in CASES}
    left = sum(
        (m, id(c)) not in used for m, f in GOLDEN.items() for c in f["cases"] if "why" not in c
    )
    assert left == 0


def test_components_on_known_shapes() -> None:
    drawn = torch.tensor(
        [
            [[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]],
            [[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]],
            [[0, 0, 0, 0]] * 4,
            [[1, 0, 1, 0], [0, 1, 0, 1]] * 2,
        ]
    )
    count, largest = golden.components(drawn.bool().numpy())
    assert count.tolist() == [4, 1, 0, 8]
    assert largest.tolist() == [3, 10, 0, 1]


def test_the_comparison_rejects_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    histograms, maps = [], []
    for _ in range(400):
        a, b = (torch.rand(n, 50, generator=generator) < 0.05 for n in (2000, 1000))
        counts = [golden.histogram(x.sum(dim=1).numpy()) for x in (a, b)]
        histograms.append(golden.homogeneity(*counts) < 0.05)
        shares = [x.float().mean(dim=0).numpy() for x in (a, b)]
        maps.append(golden.proportions(shares[0], 2000, shares[1], 1000) < 0.05)
    assert 0.02 < sum(histograms) / 400 < 0.08
    assert sum(maps) / 400 < 0.08
