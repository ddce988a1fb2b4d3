"""What holds for every masker, over the table."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskdistill as md
from maskdistill.masking import base as algebra
from tests.masking.table import TABLE, signals

GRIDS = [(14, 14), (7, 7), (16, 10), (3, 5), (1, 8), (1, 1)]
every_masker = pytest.mark.parametrize("name", TABLE)
ONE_OF_EACH_KIND = list(
    {type(entry.masker): name for name, entry in reversed(TABLE.items())}.values()
)


def draw(name: str, batch: int, grid: tuple[int, int], seed: int = 0, **kwargs: float):
    masker = TABLE[name].masker
    generator = torch.Generator().manual_seed(seed)
    return masker(batch, grid, generator=generator, **kwargs, **signals(masker, batch, grid))


@every_masker
def test_shape_dtype_and_exact_count(name: str) -> None:
    for grid, batch in itertools.product(GRIDS, (0, 1, 6)):
        mask = draw(name, batch, grid)
        patches = grid[0] * grid[1]
        assert mask.shape == (batch, patches)
        assert mask.dtype == torch.bool
        ratio, fixed = TABLE[name].ratio, TABLE[name].masker.fixed_count(grid)
        if ratio is not None:
            wanted = math.floor(ratio * patches + 0.5)
            assert mask.sum(dim=1).tolist() == [wanted] * batch
            assert TABLE[name].masker.exact or name == "total"
        if fixed is not None:
            assert mask.sum(dim=1).tolist() == [fixed] * batch


@every_masker
def test_the_generator_decides_everything(name: str) -> None:
    torch.manual_seed(1)
    first = draw(name, 16, (14, 14), seed=3)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(draw(name, 16, (14, 14), seed=3), first)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was touched"
    assert torch.equal(draw(name, 16, (14, 14), seed=4), first) == TABLE[name].still
    # Without a generator the global one decides.
    masker, given_signals = TABLE[name].masker, signals(TABLE[name].masker, 8, (7, 7))
    torch.manual_seed(5)
    first = masker(8, (7, 7), **given_signals)
    torch.manual_seed(5)
    assert torch.equal(masker(8, (7, 7), **given_signals), first)


@every_masker
def test_repr_is_the_constructor_call(name: str) -> None:
    masker = TABLE[name].masker
    if not TABLE[name].text:
        assert repr(masker).startswith(type(masker).__name__)
        return
    names = {**vars(md), **vars(md.masking), "inf": math.inf}
    assert eval(repr(masker), names) == masker
    assert md.parse_masker(repr(masker)) == masker
    assert hash(md.parse_masker(repr(masker))) == hash(masker)


@every_masker
def test_pickles_and_is_immutable(name: str) -> None:
    masker = TABLE[name].masker
    copy = pickle.loads(pickle.dumps(masker))
    assert copy == masker or (not TABLE[name].text and repr(copy) == repr(masker))
    fields = dataclasses.fields(masker)  # type: ignore[arg-type]
    for field in fields:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(masker, field.name, None)


@every_masker
def test_the_algebra_is_closed(name: str) -> None:
    masker, other = TABLE[name].masker, md.RandomMasker(0.5)
    for combined in (masker | other, other & masker, masker - other, ~masker,
                     masker.exactly(0.5), masker.sometimes(0.5)):  # fmt: skip
        assert isinstance(combined, md.Masker)
        assert combined.needs == masker.needs
        mask = combined(3, (5, 4), **signals(combined, 3, (5, 4)))
        assert mask.shape == (3, 20)


@every_masker
def test_what_is_wrong_is_refused(name: str) -> None:
    masker = TABLE[name].masker
    right = signals(masker, 2, (4, 4))
    for signal in masker.needs:
        with pytest.raises(ValueError, match=f"needs the signal.*{signal}"):
            masker(2, (4, 4))
    for bad in ({"batch": -1}, {"batch": 2.0}, {"grid": (0, 4)}, {"grid": 16}, {"grid": (4, 4, 4)},
                {"progress": 1.5}, {"progress": math.nan}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            masker(**{"batch": 2, "grid": (4, 4), **bad}, **right)
    for wrong in (None, [1.0], 3):
        with pytest.raises(ValueError, match="no signal"):
            masker(2, (4, 4), **{**right, "seed": wrong})  # type: ignore[arg-type]
    for signal in masker.needs & {"attention", "loss"}:
        if name != "attention loose":  # follows nothing
            with pytest.raises(ValueError, match="NaN"):
                masker(2, (4, 4), **{**right, signal: torch.full((2, 16), torch.nan)})


# One for each way to draw; the complete profile compiles one of each class.
COMPILED = {"random", "block", "noise red", "cluster", "scene", "mixture", "total"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in COMPILED else pytest.param(name, marks=pytest.mark.long)
        for name in ONE_OF_EACH_KIND
    ],
)
def test_compiles_without_a_graph_break(name: str) -> None:
    masker = TABLE[name].masker
    if isinstance(masker, md.Mixture) and torch.__version__ < "2.7":
        pytest.skip("the compiler of torch 2.6 cannot read a dict whose keys are maskers")
    given_signals = signals(masker, 4, (6, 5))

    def drawn() -> torch.Tensor:
        return masker(4, (6, 5), **given_signals)

    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = drawn()
    torch.manual_seed(0)
    # The eager backend runs the traced graph with torch's own random numbers.
    compiled = torch.compile(drawn, fullgraph=True, backend="eager")()
    assert torch.equal(compiled, eager)


@every_masker
def test_autocast_and_the_default_dtype_change_nothing(name: str) -> None:
    """What is hidden must not depend on the precision of the network around it."""
    plain = draw(name, 8, (9, 7), progress=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw(name, 8, (9, 7), progress=0.5), plain)
    given_signals = signals(TABLE[name].masker, 8, (9, 7))
    try:
        torch.set_default_dtype(torch.float64)
        generator = torch.Generator().manual_seed(0)
        mask = TABLE[name].masker(8, (9, 7), generator=generator, progress=0.5, **given_signals)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(mask, plain)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given_signals.items()}
    assert TABLE[name].masker(8, (9, 7), **half).shape == (8, 63)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_masker
def test_cuda_draws_the_same_from_a_cpu_generator_and_never_waits(name: str) -> None:
    masker = TABLE[name].masker
    on_gpu = {k: v.cuda() for k, v in signals(masker, 4, (7, 7)).items()}
    cpu = torch.Generator().manual_seed(0)
    expected = masker(4, (7, 7), generator=cpu, **signals(masker, 4, (7, 7)))
    cpu.manual_seed(0)
    mask = masker(4, (7, 7), generator=cpu, device="cuda", **on_gpu)
    assert torch.equal(mask.cpu(), expected)
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert masker(4, (7, 7), generator=generator, device="cuda", **on_gpu).is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_table_is_complete() -> None:
    def kinds(cls: type) -> set[type]:
        return {cls}.union(*(kinds(child) for child in cls.__subclasses__()))

    def parts(masker: md.Masker) -> set[type]:
        children = [v for v in vars(masker).values() if isinstance(v, md.Masker)]
        if isinstance(masker, md.Mixture):
            children += list(masker.weights)
        return {type(masker)}.union(*(parts(child) for child in children))

    concrete = {
        kind
        for kind in kinds(md.Masker)
        if not inspect.isabstract(kind) and kind.__module__.startswith("maskdistill")
    }
    covered = set().union(*(parts(entry.masker) for entry in TABLE.values()))
    missing = {kind.__name__ for kind in concrete - covered}
    assert not missing, f"please add {missing} to tests/masking/table.py"


EXACT: dict[str, Callable[[float], md.Masker]] = {
    "random": md.RandomMasker,
    "block": md.BlockMasker,
    "block of ibot": lambda r: md.BlockMasker(r, min_patches=None),
    "block rolled": lambda r: md.BlockMasker(r).rolled(),
    "single block": md.masking.SingleBlockMasker,
    "single block long": lambda r: md.masking.SingleBlockMasker(r, aspect=(0.1, 0.2)),
    "single block around": lambda r: md.masking.SingleBlockMasker(r, inverse=True).rolled(),
    "squares": md.masking.SquaresMasker,
    "squares around": lambda r: md.masking.SquaresMasker(r, size=4, adjust=0.5, inverse=True),
    "noise": md.masking.ColorNoiseMasker,
    "most": md.AttentionGuidedMasker,
    "least": lambda r: md.AttentionGuidedMasker(r, hide="least"),
    "soft": lambda r: md.AttentionGuidedMasker(r, temperature=0.7, share=0.5),
    "hint": lambda r: md.masking.AttentionHintMasker(r, hint=0.7, pool=0.4),
    "signal": lambda r: md.SignalMasker(r, "loss", share=0.3),
    "parts": lambda r: md.masking.PartMasker(r, whole=0.5),
    "cluster": md.masking.ClusterMasker,
    "dpp": md.masking.DPPMasker,
    "learned": lambda r: md.masking.LearnedMasker(
        r, lambda images: images.mean(dim=1, keepdim=True)
    ),
    "exactly": lambda r: md.BlockMasker(0.5, exact=False).exactly(r),
    "shared": lambda r: md.BlockMasker(r).shared(),
    "same in views": lambda r: md.BlockMasker(r).same_in_views(),
}


def test_every_exact_kind_has_a_property() -> None:
    kinds = {type(entry.masker) for entry in TABLE.values() if entry.masker.exact}
    assert kinds - {md.NoMasker} <= {type(build(0.5)) for build in EXACT.values()}


def check_exact(kind: str, ratio: float, batch: int, grid: tuple[int, int], seed: int) -> None:
    masker = EXACT[kind](ratio)
    assert masker.exact
    generator = torch.Generator().manual_seed(seed)
    mask = masker(batch, grid, generator=generator, **signals(masker, batch, grid))
    wanted = math.floor(ratio * grid[0] * grid[1] + 0.5)
    assert mask.sum(dim=1).tolist() == [wanted] * batch
    assert masker.fixed_count(grid) == wanted


_cases = given(
    kind=st.sampled_from(sorted(EXACT)),
    ratio=st.floats(0, 1),
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    batch=st.integers(0, 4096),
    seed=st.integers(0, 2**31),
)


def _exact_case(kind: str, ratio: float, height: int, width: int, batch: int, seed: int) -> None:
    if kind == "dpp":  # one step for each visible patch
        height, width = 1 + height % 9, 1 + width % 9
    most = 2**15 if kind in ("dpp", "cluster", "learned") else 2**18
    check_exact(kind, ratio, min(batch, most // (height * width)), (height, width), seed)


@settings(max_examples=150, deadline=None)
@_cases
def test_exact_means_exact(
    kind: str, ratio: float, height: int, width: int, batch: int, seed: int
) -> None:
    _exact_case(kind, ratio, height, width, batch, seed)


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@_cases
def test_exact_means_exact_in_ten_thousand_cases(
    kind: str, ratio: float, height: int, width: int, batch: int, seed: int
) -> None:
    _exact_case(kind, ratio, height, width, batch, seed)


@pytest.mark.parametrize("kind", sorted(set(EXACT) - {"dpp", "cluster", "learned"}))
def test_exact_in_large_batches_and_grids(kind: str) -> None:
    check_exact(kind, 0.37, 1024, (14, 14), 0)
    check_exact(kind, 0.37, 4, (64, 64), 1)


def test_each_mention_is_a_fresh_draw() -> None:
    a = md.RandomMasker(0.5)
    assert (a & ~a)(8, (14, 14)).any()
    assert not torch.equal((a | a)(8, (14, 14)).sum(1), a(8, (14, 14)).sum(1))


def test_only_maskers_combine() -> None:
    with pytest.raises(TypeError):
        md.NoMasker() | 0.5  # type: ignore[operator]


GOLDEN = Path(__file__).parent / "golden_draws.json"


@every_masker
def test_golden_draws(name: str) -> None:
    """A changed draw is an API change: the CHANGELOG must say "Draws change".

    ``MASKDISTILL_WRITE_GOLDEN=1 pytest -k golden_draws`` writes the present draws.
    """
    rows = draw(name, 2, (4, 5), seed=0, progress=0.5).tolist()
    drawn = ["".join("#" if hidden else "." for hidden in row) for row in rows]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("MASKDISTILL_WRITE_GOLDEN"):
        golden = {key: golden.get(key) for key in TABLE} | {name: drawn}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert drawn == golden.get(name)


def test_only_public_maskers_are_read_by_name() -> None:
    assert issubclass(algebra.Union, md.Masker)
    with pytest.raises(ValueError, match="unknown masker"):
        md.parse_masker("Union(NoMasker(), NoMasker())")
