"""Published methods: their policies, what they print, and their cards."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import maskdistill as md
from maskdistill import presets
from maskdistill.models import tokens as applying

DOCS = Path(__file__).parent.parent / "docs"
CROPS = [torch.randn(4, 3, 56, 56) for _ in range(2)] + [torch.randn(4, 3, 24, 24)] * 3
NETWORKS = ("adios", "cl_mae")
CODE = r"\[the code that was read\]\(([^)]*)\)"
HALF = md.Uniform(0.1, 0.5)

MASKERS: dict[str, md.Masker | None] = {
    "dino": None,
    "asymmetric": md.RandomMasker(0.3),
    "ibot": md.BlockMasker(HALF, min_patches=None, exact=False).sometimes(0.5),
    "dinov2": md.BlockMasker(md.Stratified(0.1, 0.5, share=0.5), exact=False),
    "dinov3": md.BlockMasker(md.Stratified(0.1, 0.5, share=0.5, jitter=False)),
    "attmask_high": md.AttentionGuidedMasker(HALF).sometimes(0.5),
    "attmask_hint": md.masking.AttentionHintMasker(HALF, HALF, 0.1, exact=False).sometimes(0.5),
    "attmask_low": md.AttentionGuidedMasker(HALF, hide="least").sometimes(0.5),
    "mst": md.AttentionGuidedMasker(1 / 8, hide="least") & md.masking.BernoulliMasker(0.5),
    "msn": md.RandomMasker(0.15).shared(),
    "capi": md.masking.SingleBlockMasker(0.65, inverse=True).rolled(),
    "ijepa": md.masking.MultiBlockMasker().exactly(0.6),
    "data2vec2": md.masking.SquaresMasker(0.8, inverse=True),
    "milan": ~md.AttentionGuidedMasker(0.25, temperature=1.0),
    "cluster": md.masking.ClusterMasker(0.5),
    "beit": md.BlockMasker(75 / 196, min_patches=16, exact=False),
    "mae": md.RandomMasker(0.75),
    "mae_grid": md.masking.GridMasker(2),
    "simmim": md.RandomMasker(0.6).in_units(2),
    "um_mae": md.masking.GridMasker(2, random=True),
    "colormae": md.masking.ColorNoiseMasker(0.75, "green"),
    "hpm": md.SignalMasker(0.75, "loss", share=md.Linear(0, 0.5)),
    "semmae": md.masking.PartMasker(0.75),
    "dppmask": md.masking.DPPMasker(0.75),
}
PAIRS = {"dino", "asymmetric", "ibot", "dinov2", "dinov3", "mst", "msn", "adios"} | {
    f"attmask_{which}" for which in ("high", "hint", "low")
}


class Brightness(torch.nn.Module):
    """Stands for a mask network."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)


NETWORK = Brightness()


def build(name: str) -> presets.Preset:
    return presets.ALL[name](NETWORK) if name in NETWORKS else presets.ALL[name]()


def signals(preset: presets.Preset) -> dict[str, list[Tensor]]:
    known = {
        "attention": lambda: torch.rand(4, 49),
        "loss": lambda: torch.rand(4, 49),
        "parts": lambda: torch.randint(7, (4, 49)),
    }
    needs = preset.needs & known.keys()
    return {need: [known[need]() for _ in range(preset.global_crops)] for need in needs}


def test_every_preset_is_expected() -> None:
    assert set(presets.NAMES) == MASKERS.keys() | set(NETWORKS)
    assert tuple(presets.ALL) == presets.NAMES
    assert all(getattr(md.presets, name) is presets.ALL[name] for name in presets.NAMES)


@pytest.mark.parametrize("name", MASKERS)
def test_it_is_the_policy_of_the_method(name: str) -> None:
    preset = build(name)
    expected = md.ViewPolicy(MASKERS[name], global_crops=2 if name in PAIRS else 1)
    assert preset == expected
    assert hash(preset) == hash(expected)
    assert repr(preset) == f"presets.{name}()"
    assert eval(repr(preset), {"presets": presets}) == preset
    copy = pickle.loads(pickle.dumps(preset))
    assert (copy, str(copy), repr(copy)) == (preset, str(preset), repr(preset))


@pytest.mark.parametrize("name", presets.NAMES)
def test_its_masks_can_be_applied_as_it_says(name: str) -> None:
    preset = build(name)
    crops = CROPS if preset.local_views else CROPS[: preset.global_crops]
    masks = preset(crops, patch_size=8, **signals(preset))
    views = preset.global_crops
    assert masks.teacher == [None] * views
    assert masks.student[views:] == [None] * (len(crops) - views)
    assert preset.apply in applying.APPLICATIONS
    for mask in masks.student[:views]:
        assert name == "dino" if mask is None else mask.shape == (4, 49)
    if preset.apply == "drop":
        assert preset.student_global.fixed_count((7, 7)) == int(masks.student[0].sum(1)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_preset_holds_its_network(name: str) -> None:
    masker = build(name).student_global
    assert isinstance(masker, md.masking.LearnedMasker)
    assert masker.network is NETWORK
    assert build(name) != presets.ALL[name](Brightness())
    assert repr(presets.ALL[name](NETWORK, 0.3)) == f"presets.{name}(Brightness(), ratio=0.3)"


def test_ijepas_rows_are_equal_on_request() -> None:
    assert presets.ijepa(None).student_global.fixed_count((14, 14)) is None
    assert presets.ijepa().student_global.fixed_count((14, 14)) == 118


def test_msn_draws_one_mask_for_the_batch() -> None:
    masks = presets.msn()(CROPS, patch_size=8).student
    assert bool((torch.cat(masks[:2]) == masks[0][0]).all())


def test_a_preset_of_one_view_takes_no_more() -> None:
    with pytest.raises(ValueError, match="has 1 view"):
        presets.simmim()([torch.zeros(2, 3, 32, 32)] * 2, patch_size=8)


@pytest.mark.parametrize(
    "text",
    [
        "presets.asymmetric(ratio=0.5)",
        "presets.ibot(ratio=Uniform(0.2, 0.4), p=Linear(0.0, 0.5))",
        "presets.dinov3(high=0.3, rolled=True)",
        "presets.attmask_hint(ratio=0.4, pool=0.2)",
        "presets.colormae(color='red')",
        "presets.ijepa(ratio=None)",
    ],
)
def test_its_repr_names_what_was_changed(text: str) -> None:
    names = {"presets": presets, "Uniform": md.Uniform, "Linear": md.Linear}
    preset = eval(text, names)
    assert repr(preset) == text
    assert eval(repr(preset), names) == preset
    assert preset != presets.ALL[preset.name]()


@pytest.mark.parametrize("name", presets.NAMES)
def test_it_prints_what_it_does(name: str) -> None:
    preset = build(name)
    lines = str(preset).splitlines()
    assert max(map(len, lines)) <= 90
    text = " ".join(" ".join(lines).split())
    assert text.startswith(f"{preset.title}: {preset.paper}")
    assert f"{' + '.join(preset.objectives)}: {preset.objective}" in text
    assert all(repr(masker) in text for masker in preset.maskers)
    assert (f"apply {preset.apply}" in text) == bool(preset.maskers)


def test_a_policy_of_several_maskers_prints_each_in_its_place() -> None:
    preset = dataclasses.replace(presets.ibot(), student_local=md.RandomMasker(0.1))
    assert "RandomMasker(0.1)" in str(preset).splitlines()[3]


# --- Their cards; tests/test_docs.py runs the code there, and compares what it prints


@pytest.mark.parametrize("name", presets.NAMES)
def test_its_card_names_what_it_is(name: str) -> None:
    preset = build(name)
    card = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {preset.title}\n")
    text = " ".join(card.split())
    paper = preset.paper
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert re.search(r"20\d\d$", paper.venue)
    source = rf"{paper.authors}, \*[^*]+\*, {paper.venue}\. \[arXiv {paper.arxiv}\]\({paper.url}\)"
    assert re.search(source, text)
    assert ("## The settings of the authors' code" in card) == ("[the code that was read]" in text)
    assert all(re.search(r"/tree/[0-9a-f]{40}", link) for link in re.findall(CODE, text))
    for heading in ("In code", "The settings of the", "What differs from the", "What was measured"):
        assert f"\n## {heading}" in card
    assert f"\npreset = md.presets.{name}(" in card
    assert "print(preset)\n```\n\n```text\n" in card
    for picture in (f"{name}.png", f"{name}-small.png"):
        assert (DOCS / "img" / "methods" / picture).is_file()
    assert f"(../img/methods/{name}.png)" in card


def test_the_reconstruction_says_so() -> None:
    assert "reconstruction" in presets.asymmetric().title


def test_every_method_is_in_the_gallery_the_menu_and_the_api() -> None:
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for name in presets.NAMES:
        preset = build(name)
        objectives = " + ".join(preset.objectives)
        how = f"{preset.apply} · {objectives}" if preset.maskers else objectives
        entry = f"[**{preset.title}**](methods/{name}.md) `presets.{name}`\n\n"
        assert re.search(f"{re.escape(entry)}.* · {re.escape(how)}\n", page), name
    menu = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"^ +- methods/(\w+)\.md$", menu, re.MULTILINE) == list(presets.NAMES)
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: maskdistill\.presets\.([a-z]\w+)$", api, re.MULTILINE)
    assert listed == list(presets.NAMES)


def test_the_pictures_are_small() -> None:
    files = list((DOCS / "img" / "methods").iterdir())
    assert len(files) == 2 * len(presets.NAMES)
    assert sum(file.stat().st_size for file in files) < 1_500_000


def test_a_changed_preset_does_not_claim_to_be_the_old_one() -> None:
    one = dataclasses.replace(md.presets.msn(), global_crops=1)
    assert repr(one) == (
        "ViewPolicy(student_global=RandomMasker(0.15).shared(), student_local=None, "
        "teacher_global=None, global_crops=1)"
    )
    for build in (md.presets.ibot, md.presets.msn):
        three = build(global_crops=3)
        assert repr(three) == f"presets.{build.__name__}(global_crops=3)"
        masks = three([torch.zeros(2, 3, 32, 32)] * 4, patch_size=8)
        assert [mask is None for mask in masks.student] == [False] * 3 + [True]
