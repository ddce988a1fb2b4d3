"""Who sees what."""

from __future__ import annotations

import pickle

import pytest
import torch

import maskdistill as md
from maskdistill.masking.parsing import parse_cell
from maskdistill.policies import POLICIES

RANDOM = md.RandomMasker(0.3)
CROPS = [torch.zeros(4, 3, 64, 64)] * 2 + [torch.zeros(4, 3, 32, 32)] * 3


def seen(policy: md.ViewPolicy) -> tuple[str, str]:
    """One letter per view: m where it is masked, c where it is clean."""
    masks = policy(CROPS, 8)
    return (
        "".join("c" if m is None else "m" for m in masks.student),
        "".join("c" if m is None else "m" for m in masks.teacher),
    )


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("none", ("ccccc", "cc")),
        ("asymmetric", ("mmccc", "cc")),
        ("symmetric", ("mmccc", "mm")),
        ("student-all-views", ("mmmmm", "cc")),
        ("local-only", ("ccmmm", "cc")),
        ("teacher-only", ("ccccc", "mm")),
    ],
)
def test_named_policies(name: str, views: tuple[str, str]) -> None:
    policy = POLICIES[name](RANDOM)
    assert seen(policy) == views
    assert policy.masks_student == ("m" in views[0])


def test_every_named_policy_is_tested() -> None:
    marks = test_named_policies.pytestmark  # type: ignore[attr-defined]
    assert set(POLICIES) == {case[0] for case in marks[0].args[1]}


def test_shapes_follow_each_crop() -> None:
    masks = md.ViewPolicy.student_all_views(RANDOM)(CROPS, 8)
    assert [tuple(m.shape) for m in masks.student if m is not None] == [(4, 64)] * 2 + [(4, 16)] * 3
    assert [m.count for m in masks.student_masks if m is not None] == [19, 19, 5, 5, 5]
    assert masks.teacher_masks == (None, None)


def test_views_are_drawn_independently() -> None:
    masks = md.ViewPolicy.symmetric(RANDOM)(CROPS, 8)
    drawn = [m for m in (*masks.student, *masks.teacher) if m is not None]
    assert len({tuple(m.flatten().tolist()) for m in drawn}) == 4


def test_teacher_first_then_student_is_the_whole_call() -> None:
    policy = md.ViewPolicy.symmetric(RANDOM)
    whole = policy(CROPS, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    draw = policy.begin(CROPS, 8, generator=generator)
    teacher, student = draw.teacher(), draw.student()
    for a, b in zip((*teacher, *student), (*whole.teacher, *whole.student), strict=True):
        assert (a is None and b is None) or torch.equal(a.mask, b)  # type: ignore[union-attr,arg-type]


def test_attention_reaches_its_own_view() -> None:
    first, second = torch.zeros(4, 2, 64), torch.zeros(4, 2, 64)
    first[..., :32], second[..., 32:] = 1.0, 1.0
    policy = md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.5))
    masks = policy(CROPS, 8, attention=[first, second]).student
    assert masks[0] is not None
    assert masks[1] is not None
    assert masks[0][:, :32].all()
    assert masks[1][:, 32:].all()
    joined = policy(CROPS, 8, attention=torch.cat([first, second])).student
    for one, other in zip(joined[:2], masks[:2], strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one tensor per global crop"):
        policy(CROPS, 8, attention=first)
    with pytest.raises(ValueError, match="needs the signal"):
        policy(CROPS, 8)


def test_progress_and_generator_reach_the_masker() -> None:
    policy = md.AsymmetricMaskPolicy(md.RandomMasker(md.Linear(0, 1)))
    mask = policy(CROPS, 8, progress=0.5).student_masks[0]
    assert mask is not None
    assert mask.count == 32 == int(mask.mask[0].sum())


def test_refused_when_built() -> None:
    guided = md.AttentionGuidedMasker(0.5)
    md.ViewPolicy(student_global=guided)
    for build in (md.ViewPolicy.symmetric, md.ViewPolicy.teacher_only):
        with pytest.raises(ValueError, match="before the teacher has run"):
            build(guided)
    assert md.ViewPolicy.local_only(guided | RANDOM).needs == {"attention"}  # carried by place
    with pytest.raises(TypeError, match="must be a masker"):
        md.ViewPolicy(student_global=0.3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ViewPolicy.none"):
        md.AsymmetricMaskPolicy(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="global_crops"):
        md.ViewPolicy(global_crops=0)


def test_bad_crops() -> None:
    policy = md.AsymmetricMaskPolicy(RANDOM)
    with pytest.raises(ValueError, match="at least 2 tensors"):
        policy(CROPS[:1], 8)
    with pytest.raises(ValueError, match="a single tensor"):
        policy(CROPS[0], 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="64x64 pixels does not divide"):
        policy(CROPS, 7)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        policy([torch.zeros(3, 64, 64)] * 2, 8)


def test_values() -> None:
    policy = md.AsymmetricMaskPolicy(RANDOM)
    assert policy == md.ViewPolicy(student_global=RANDOM) == md.ViewPolicy.asymmetric(RANDOM)
    assert hash(policy) == hash(md.ViewPolicy(student_global=RANDOM))
    assert policy != md.ViewPolicy.none()
    assert eval(repr(policy), {**vars(md), **vars(md.masking)}) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_the_table_says_who_sees_what() -> None:
    text = str(md.ViewPolicy(student_local=RANDOM, teacher_global=md.NoMasker()))
    student, teacher = text.splitlines()[1:]
    assert student.split() == ["student", "clean", "RandomMasker(0.3)"]
    assert teacher.split() == ["teacher", "NoMasker()", "not", "seen"]


def test_what_is_no_signal_is_refused() -> None:
    policy = md.AsymmetricMaskPolicy(md.AttentionGuidedMasker(0.5))
    attention = torch.rand(8, 64)
    with pytest.raises(ValueError, match=r"only \['atention'\] came"):
        policy(CROPS, 8, atention=attention)
    with pytest.raises(ValueError, match="no argument of a policy"):
        policy(CROPS, 8, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are the crops themselves"):
        policy(CROPS, 8, attention=attention, images=CROPS)
    with pytest.raises(ValueError, match=r"batches of \[4, 3\]"):
        policy([CROPS[0], CROPS[1][:3]], 8, attention=attention)


def test_bool_signals_are_carried_as_well() -> None:
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(4, 5, 1)
    flipped = torch.zeros(4, 5, dtype=torch.bool)
    policy = md.ViewPolicy.student_all_views(md.SignalMasker(0.5, "saliency"))
    saliency = torch.zeros(8, 64, dtype=torch.bool)
    saliency[:, :32] = True
    masks = policy(CROPS, 8, saliency=saliency, boxes=boxes, flipped=flipped)
    assert masks.student[2] is not None
    assert masks.student[2][:, :8].all()


# --- A masker for each view

EACH = [md.RandomMasker(0.5), None]


def test_each_view_can_have_its_own_masker() -> None:
    local = [None, md.BlockMasker(0.25), RANDOM]
    policy = md.ViewPolicy(student_global=EACH, student_local=local, teacher_global=EACH[::-1])
    assert seen(policy) == ("mccmm", "cm")
    masks = policy(CROPS, 8).student_masks
    assert [m and m.count for m in masks] == [32, None, None, 4, 5]
    assert policy.maskers == (md.RandomMasker(0.5), md.BlockMasker(0.25), RANDOM)
    assert policy.by_view("teacher", 2) == [None, md.RandomMasker(0.5)]
    assert md.ViewPolicy(EACH).masks_student


def test_a_masker_for_each_view_is_a_value() -> None:
    policy = md.AsymmetricMaskPolicy(EACH)
    assert policy == md.ViewPolicy(student_global=tuple(EACH)) != md.AsymmetricMaskPolicy(EACH[0])
    assert (
        eval(repr(policy), {**vars(md), **vars(md.masking)})
        == policy
        == pickle.loads(pickle.dumps(policy))
    )
    assert "[RandomMasker(0.5), None]" in str(policy)
    assert POLICIES["asymmetric"](parse_cell("[RandomMasker(0.5), None]")) == policy
    assert hash(policy) == hash(md.ViewPolicy(student_global=EACH))


def test_equal_maskers_are_one_draw_of_all_views() -> None:
    one, each = md.AsymmetricMaskPolicy(RANDOM), md.AsymmetricMaskPolicy([RANDOM, RANDOM])
    assert one == each
    drawn = [p(CROPS, 8, generator=torch.Generator().manual_seed(0)).student for p in (one, each)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0][:2], drawn[1][:2], strict=True))
    assert md.ViewPolicy([None, None]) == md.ViewPolicy.none()


def test_one_signal_serves_the_views_that_need_it() -> None:
    attention = torch.zeros(8, 64)
    attention[4:, 32:] = 1
    policy = md.AsymmetricMaskPolicy([RANDOM, md.AttentionGuidedMasker(0.5)])
    assert policy(CROPS, 8, attention=attention).student[1][:, 32:].all()


def test_cells_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="one masker or None for each of the 2 global crops; got 3"
    ):
        md.ViewPolicy(student_global=[RANDOM, None, RANDOM])
    with pytest.raises(ValueError, match="each of the 3 local crops; got 2"):
        md.ViewPolicy(student_local=[RANDOM, None])(CROPS, 8)
    for bad in ([RANDOM, 0.3], [], "RandomMasker(0.3)"):
        with pytest.raises(TypeError, match="a list with one of these per view"):
            md.ViewPolicy(student_global=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NoSuchMasker"):
        parse_cell("[RandomMasker(0.5), NoSuchMasker(1)]")
