"""Studies: what a file may say, and how it is told what is wrong."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import maskdistill as md
from maskdistill.comparing import Cell, Study, read_study
from maskdistill.comparing.study import TEMPLATE

POLICIES = {"none": {"policy": "none"}, "random": {"masker": "RandomMasker(0.3)"}}


def written(folder: Path, text: str, name: str = "study.toml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def test_the_template_is_a_study() -> None:
    study = read_study(TEMPLATE)
    assert list(study.policies) == ["none", "asymmetric", "symmetric"]
    assert study.baseline == "none"
    assert study.policy("asymmetric") == md.AsymmetricMaskPolicy(md.RandomMasker(0.3))
    assert study.config("none", 2).seed == 2
    assert study.config("none", 0).image_size == 32  # those of the scenes


def test_the_study_in_the_docs_reads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/compare.md").read_text(encoding="utf-8")
    study = read_study(written(tmp_path, re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0]))
    assert list(study.policies) == ["none", "asymmetric", "ibot"]


def test_settings_of_all_runs_and_of_one_policy(tmp_path: Path) -> None:
    study = read_study(
        written(
            tmp_path,
            """
            [settings]
            data = "pictures"
            epochs = 7
            global_scale = [0.3, 1.0]
            [policies.blocks]
            masker = "BlockMasker(0.4)"
            apply = "drop"
            [policies.ibot]
            preset = "ibot"
            """,
        )
    )
    config = study.config("blocks", 1)
    assert config.data == tmp_path / "pictures"  # relative to the file
    assert (config.epochs, config.seed, config.apply) == (7, 1, "drop")
    assert config.global_scale == (0.3, 1.0)
    assert config.image_size == 64  # those of real data
    assert study.policy("ibot") == md.presets.ibot()
    assert study.recipe("ibot", 0)[0].apply == md.presets.ibot().apply
    assert study.baseline == "blocks"


def test_a_study_in_python(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        from dataclasses import dataclass
        import maskdistill as md
        from maskdistill.comparing import Study

        @dataclass(frozen=True, repr=False)
        class FirstMasker(md.RandomMasker):
            pass

        study = Study(
            {"mine": md.ViewPolicy(student_local=FirstMasker(0.2)), "none": {"policy": "none"}},
            seeds=range(2), baseline="none", settings={"epochs": 1},
        )
        """,
        "study.py",
    )
    study = read_study(path)
    assert study.seeds == (0, 1)
    assert type(study.policy("mine").student_local).__name__ == "FirstMasker"
    assert study.cells()[:2] == [Cell("mine", 0), Cell("none", 0)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("policies = 3", "policies must be a table"),
        ("seeds = [0]", "names no policies"),
        ("[policies]", "at least one policy"),
        (
            "[policies.a]\nmaskr = 'x'",
            "unknown setting in .policies.a.: 'maskr'. Did you mean mask",
        ),
        ("[policies.a]\npolicy = 'asymetric'", "Did you mean asymmetric"),
        ("[policies.a]\nmasker = 'RandomMaskr(0.3)'", "RandomMask"),
        ("[policies.a]\nmasker = 'RandomMasker(3)'", "policies.a"),
        ("[policies.a]\npreset = 'ibott'", "Did you mean ibot"),
        ("[policies.a]\nepochs = 3", "same for all policies"),
        ("[policies.a]\nseed = 3", "seeds"),
        ("[settings]\nepochs = 'many'\n[policies.a]", "epochs must be of type int"),
        ("[settings]\nout = 'x'\n[policies.a]", "use --out"),
        ("[settings]\ndevice = 'cpu'\n[policies.a]", "use --devices"),
        (
            "[settings]\nmodel = 'vit_tny_patch16_224'\n[policies.a]",
            "Did you mean vit_tiny_patch16",
        ),
        (
            "[policies.a]\napply = 'tokn'",
            "unknown apply in .policies.a.: 'tokn'. Did you mean token",
        ),
        ("[policies.a]\nmodel = 'vit_small_patch16_224'", "same for all policies"),
        ("[settings]\nglobal_scale = 0.4\n[policies.a]", "list of two numbers"),
        ("question = 5\n[policies.a]", "question must be a sentence"),
        ("baseline = 1\n[policies.1]", "name of a policy"),
        ("claims = ['jaccard_best_head']\n[settings]\ndata = 'x'\n[policies.a]", "object masks"),
        ("epochs = 3\n[policies.a]", "put it under .settings"),
        ("sedes = [1]\n[policies.a]", "unknown key: 'sedes'. Did you mean seeds"),
        ("seeds = [1, 1]\n[policies.a]", "twice"),
        ("seeds = ['1']\n[policies.a]", "list of int"),
        ("seeds = []\n[policies.a]", "must not be empty"),
        ("seeds = [-1]\n[policies.a]", ">= 0"),
        ("baseline = 'b'\n[policies.a]", "unknown baseline: 'b'"),
        ("claims = ['knn20']\n[policies.a]", "Did you mean knn_20"),
        ("claims = ['attention_entropy']\n[policies.a]", "neither better nor worse"),
        (
            "claims = ['jaccard_best_head']\nmeasures = ['knn']\n[policies.a]",
            "'attention', which is not in measures",
        ),
        ("measures = ['kn']\n[policies.a]", "Did you mean knn"),
        ("confidence = 95.0\n[policies.a]", "confidence"),
        ("[policies.'a/b']", "name of a folder"),
        ("[policy.a]", "Did you mean .policies.NAME"),
        ("[settings]\nmax_steps = 'forty'\n[policies.a]", "settings. max_steps must be"),
        ("[policies.a]\n[policies.b]\nmasker = 'RandomMasker(0.3)'", "'a' and 'b' are the same"),
        ("[policies.a", "not valid TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, wanted: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=wanted) as caught:
        read_study(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("study = 3", "must assign study"),
        ("x =", "line 1"),
        ("\nx = y", "line 2: NameError: name 'y'"),
        ("from maskdistill.comparing import Study\nstudy = Study({})", "at least one policy"),
    ],
)
def test_a_mistake_in_python_is_named(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        read_study(written(tmp_path, text, "study.py"))


def test_what_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--template"):
        read_study(tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"\.toml or \.py"):
        read_study(written(tmp_path, "", "study.yaml"))
    with pytest.raises(ValueError, match="folder as --out"):
        read_study(tmp_path)


def test_claims_follow_the_measures_and_the_data() -> None:
    assert Study(POLICIES).claims == ("knn_20", "jaccard_best_head", "occlusion_random")
    assert Study(POLICIES, measures=("knn",)).claims == ("knn_20",)
    # Labelled images from elsewhere have no object masks.
    assert Study(POLICIES, settings={"data": "x"}).claims == ("knn_20", "occlusion_random")


def test_policies_that_are_none() -> None:
    with pytest.raises(TypeError, match="ViewPolicy or a table"):
        Study({"a": None})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="1 global views"):
        Study({"a": md.ViewPolicy(global_crops=1)})


def test_a_study_in_python_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "my_own_maskers.py").write_text("import maskdistill as md\nmasker = md.NoMasker()")
    path = written(
        tmp_path,
        """
        import maskdistill as md
        from maskdistill.comparing import Study
        from my_own_maskers import masker
        study = Study({"mine": md.AsymmetricMaskPolicy(masker)})
        """,
        "study.py",
    )
    before = list(sys.path)
    try:
        assert read_study(path).policy("mine").student_global == md.NoMasker()
    finally:
        sys.path[:] = before
        sys.modules.pop("my_own_maskers", None)


@pytest.mark.parametrize(
    "options", [{"seeds": "012"}, {"seeds": (True,)}, {"claims": [3]}, {"measures": 3}]
)
def test_types(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be a list of"):
        Study(POLICIES, **options)


def test_a_published_recipe_brings_its_application() -> None:
    preset = md.presets.msn()
    assert preset.apply == "drop"  # not the default
    for own in (preset, {"preset": "msn"}):
        config, policy = Study({"msn": own}).recipe("msn", 0)  # type: ignore[dict-item]
        assert config.apply == "drop"
        assert policy == preset


def test_runs_come_seed_by_seed() -> None:
    # A study that is stopped half-way has pairs to compare.
    names = [cell.name for cell in Study(POLICIES, seeds=(3, 5)).cells()]
    assert names == ["none-seed3", "random-seed3", "none-seed5", "random-seed5"]
