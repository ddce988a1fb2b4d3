"""Published methods: their policies, their words, and their cards."""

from __future__ import annotations

import importlib.util
import pickle
import re
import types
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
HALF = md.Uniform(0.1, 0.5)

MASKERS: dict[str, md.Masker | None] = {
    "dino": None,
    "asymmetric": md.RandomMasker(0.3),
    "ibot": md.BlockMasker(HALF, min_patches=None, exact=False).sometimes(0.5),
    "dinov2": md.BlockMasker(md.Stratified(0.1, 0.5, share=0.5), exact=False),
    "dinov3": md.BlockMasker(md.Stratified(0.1, 0.5, share=0.5, jitter=False)),
    "attmask_high": md.AttentionGuidedMasker(HALF).sometimes(0.5),
    "attmask_hint": md.AttentionHintMasker(HALF, HALF, 0.1, exact=False).sometimes(0.5),
    "attmask_low": md.AttentionGuidedMasker(HALF, hide="least").sometimes(0.5),
    "mst": md.AttentionGuidedMasker(1 / 8, hide="least") & md.BernoulliMasker(0.5),
    "msn": md.RandomMasker(0.15).shared(),
    "capi": md.SingleBlockMasker(0.65, inverse=True).rolled(),
    "ijepa": md.MultiBlockMasker().exactly(0.6),
    "data2vec2": md.SquaresMasker(0.8, inverse=True),
    "milan": ~md.AttentionGuidedMasker(0.25, temperature=1.0),
    "cluster": md.ClusterMasker(0.5),
    "beit": md.BlockMasker(75 / 196, min_patches=16, exact=False),
    "mae": md.RandomMasker(0.75),
    "mae_grid": md.GridMasker(2),
    "simmim": md.RandomMasker(0.6).in_units(2),
    "um_mae": md.GridMasker(2, random=True),
    "colormae": md.ColorNoiseMasker(0.75, "green"),
    "hpm": md.SignalMasker(0.75, "loss", share=md.Linear(0, 0.5)),
    "semmae": md.PartMasker(0.75),
    "dppmask": md.DPPMasker(0.75),
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


@pytest.fixture(scope="module")
def gallery() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("make_gallery", DOCS / "make_gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_preset_is_expected() -> None:
    assert set(presets.NAMES) == MASKERS.keys() | set(NETWORKS)
    assert tuple(presets.ALL) == presets.NAMES
    assert all(getattr(md.presets, name) is presets.ALL[name] for name in presets.NAMES)


@pytest.mark.parametrize("name", presets.NAMES)
def test_it_masks_the_students_global_views_alone(name: str) -> None:
    preset = build(name)
    crops = CROPS if preset.local_views else CROPS[: preset.global_crops]
    masks = preset(crops, patch_size=8, **signals(preset))
    masked = [mask is not None for mask in masks.student]
    views = preset.global_crops
    assert masked == [name != "dino"] * views + [False] * (len(crops) - views)
    assert masks.teacher == [None] * views
    for mask in masks.student[:views]:
        assert mask is None or mask.shape == (4, 49)


@pytest.mark.parametrize("name", MASKERS)
def test_it_is_the_policy_of_the_method(name: str) -> None:
    expected = md.ViewPolicy(MASKERS[name], global_crops=2 if name in PAIRS else 1)
    assert build(name) == expected
    assert hash(build(name)) == hash(expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_preset_holds_its_network(name: str) -> None:
    masker = build(name).student_global
    assert isinstance(masker, md.LearnedMasker)
    assert masker.network is NETWORK
    assert build(name) != presets.ALL[name](Brightness())


@pytest.mark.parametrize("name", presets.NAMES)
def test_its_masks_can_be_applied_as_it_says(name: str) -> None:
    preset = build(name)
    assert preset.apply in applying.APPLICATIONS
    if preset.apply == "drop":
        crops = CROPS if preset.local_views else CROPS[: preset.global_crops]
        mask = preset(crops, patch_size=8, **signals(preset)).student[0]
        assert applying.visible_indices(mask).shape[0] == 4
        assert preset.student_global.fixed_count((7, 7)) == int(mask.sum(1)[0])


def test_ijepas_rows_are_equal_on_request() -> None:
    assert presets.ijepa(None).student_global.fixed_count((14, 14)) is None
    assert presets.ijepa().student_global.fixed_count((14, 14)) == 118


def test_msn_draws_one_mask_for_the_batch() -> None:
    masks = presets.msn()(CROPS, patch_size=8).student
    assert bool((torch.cat(masks[:2]) == masks[0][0]).all())


@pytest.mark.parametrize("name", sorted(MASKERS))
def test_its_repr_builds_it(name: str) -> None:
    preset = build(name)
    assert repr(preset) == f"presets.{name}()"
    assert eval(repr(preset), {"presets": presets}) == preset


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


def test_a_network_is_named() -> None:
    assert repr(presets.adios(NETWORK, ratio=0.3)) == "presets.adios(Brightness(), ratio=0.3)"


@pytest.mark.parametrize("name", presets.NAMES)
def test_it_tells_where_it_comes_from(name: str) -> None:
    preset = build(name)
    assert preset.name == name
    assert preset.objectives
    assert preset.objective
    assert preset.hides
    assert preset.defaults
    assert preset.differences or name == "dino"
    paper = preset.paper
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert re.search(r"20\d\d$", paper.venue)
    assert paper.title
    assert not paper.code or re.search(r"github\.com/.+/tree/[0-9a-f]{40}", paper.code)
    assert paper.title in str(paper)
    for sentence in (preset.hides, *preset.differences, *preset.evidence):
        assert sentence.endswith(".") or sentence.endswith("`."), sentence
    doc = presets.ALL[name].__doc__ or ""
    source = " ".join(doc.partition("Source: ")[2].split())
    assert source.startswith(paper.authors.removesuffix(" et al."))
    assert ">>> " in doc


@pytest.mark.parametrize("name", presets.NAMES)
def test_it_prints_what_it_does(name: str) -> None:
    preset = build(name)
    lines = str(preset).splitlines()
    assert max(map(len, lines)) <= 90
    text = " ".join(" ".join(lines).split())
    assert preset.title in text
    assert preset.paper.arxiv in text
    assert " + ".join(preset.objectives) in text
    assert all(repr(masker) in text for masker in preset.maskers)
    assert (f"apply {preset.apply}" in text) == bool(preset.maskers)


def test_a_policy_of_several_maskers_prints_each_in_its_place() -> None:
    import dataclasses

    preset = dataclasses.replace(presets.ibot(), student_local=md.RandomMasker(0.1))
    assert "RandomMasker(0.1)" in str(preset).splitlines()[3]


@pytest.mark.parametrize("name", sorted(MASKERS))
def test_it_pickles(name: str) -> None:
    copy = pickle.loads(pickle.dumps(build(name)))
    assert copy == build(name)
    assert str(copy) == str(build(name))


def test_the_reconstruction_says_so() -> None:
    preset = presets.asymmetric()
    assert "reconstruction" in preset.title
    assert "reconstruction" in (DOCS / "methods" / "asymmetric.md").read_text(encoding="utf-8")


def test_every_card_is_up_to_date(gallery: types.ModuleType) -> None:
    pages = gallery.pages()
    assert {path.name for path in pages} == {"gallery.md"} | {f"{n}.md" for n in presets.NAMES}
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/make_gallery.py"


def test_every_picture_is_there_and_small(gallery: types.ModuleType) -> None:
    folder = DOCS / "img" / "methods"
    wanted = {f"{name}{size}.png" for name in presets.NAMES for size in ("", "-small")}
    assert {path.name for path in folder.iterdir()} == wanted
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000


def test_every_method_is_in_the_gallery_and_the_menu(gallery: types.ModuleType) -> None:
    page = gallery.gallery()
    menu = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"^ +- methods/(\w+)\.md$", menu, re.MULTILINE) == list(presets.NAMES)
    assert all(page.count(f"(methods/{name}.md) `presets.{name}`") == 1 for name in presets.NAMES)
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    assert re.findall(r"^::: maskdistill\.presets\.([a-z]\w+)$", api, re.MULTILINE) == list(
        presets.NAMES
    )


def test_a_masker_can_be_drawn() -> None:
    from maskdistill import plotting

    generator = torch.Generator().manual_seed(0)
    options = {"samples": 20, "batch": 10, "generator": generator}
    figure = plotting.plot_masker(md.BlockMasker(0.4), (4, 6), **options)
    assert len(figure.axes) == 8 + 3
    picture = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    guided = md.SignalMasker(0.5, "loss", share=md.Linear(0, 1))
    moments = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    loss = torch.rand(1, 24, generator=generator)
    figure = plotting.plot_masker(
        guided, (4, 6), pictures=picture, progress=moments, loss=loss, **options
    )
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["image", "loss", "progress 0.0", "progress 0.2"]
    with pytest.raises(ValueError, match="one number or 6"):
        plotting.plot_masker(guided, (4, 6), pictures=picture, progress=[0.0], loss=loss, **options)
    with pytest.raises(ValueError, match="1 or 4 images"):
        plotting.plot_masker(guided, (4, 6), pictures=picture.repeat(2, 1, 1, 1), **options)
    with pytest.raises(ValueError, match="5x6 divides"):
        plotting.plot_masker(md.RandomMasker(0.5), (5, 6), pictures=picture, **options)


def test_a_preset_of_one_view_takes_no_more() -> None:
    with pytest.raises(ValueError, match="has 1 view"):
        presets.simmim()([torch.zeros(2, 3, 32, 32)] * 2, patch_size=8)
