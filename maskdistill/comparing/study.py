"""A study: which policies, with which seeds, on what budget, and which claims are tested."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskdistill import presets
from maskdistill.job import recipe
from maskdistill.job_config import MINI_IMAGENET, SCENES, JobConfig
from maskdistill.measures import DEFAULT_GROUPS, GROUPS, MEASURES
from maskdistill.views import ViewPolicy

DEFAULT_CLAIMS = ("knn_20", "jaccard_best_head", "occlusion_random")

# The comparison says these itself, of each run.
_OWN = {
    "seed": "seeds, above the tables", "out": "--out, of the command", "device": "--devices",
    "resume": "the same command again", "auto_resume": "the same command again",
}  # fmt: skip
# Were these another from policy to policy, the policies would not be what differs.
_SHARED = (
    "data", "data_format", "shards", "val_shards", "scenes", "epochs", "max_steps", "batch_size",
    "knn_train", "knn_val", "image_size", "patch_size", "model", "depth", "precision",
)  # fmt: skip
# Only the built-in scenes have object masks among labelled images.
_NEED_MASKS = ("jaccard_", "pointing_", "corloc_", "occlusion_salient", "occlusion_background")


@dataclass(frozen=True)
class Study:
    """Policies x seeds on one data set and budget, and the claims that are tested.

    >>> from maskdistill import AsymmetricMaskPolicy, BlockMasker, ViewPolicy
    >>> study = Study(
    ...     {"none": {"policy": "none"}, "blocks": AsymmetricMaskPolicy(BlockMasker(0.4))},
    ...     seeds=(0, 1), settings={"epochs": 1, "scenes": 256},
    ... )
    >>> study.config("blocks", seed=1).epochs
    1
    >>> [cell.name for cell in study.cells()]
    ['none-seed0', 'blocks-seed0', 'none-seed1', 'blocks-seed1']

    Runs of one seed share initial weights, the order of images and their crops, so differences are
    taken pair by pair. The claims are named before the runs, since a test that was chosen after
    looking at its result says nothing.

    Args:
        policies: name to a `ViewPolicy`, or to settings of the main job (`JobConfig`) that this
            policy has of its own, such as ``{"masker": "BlockMasker(0.4)"}``.
        question: what the study is to answer, for the report.
        seeds: of the runs of each policy.
        baseline: name of the policy that the others are compared with; None is the first.
        settings: of all runs, as in `JobConfig`; without ``data`` or ``shards`` the images are the
            built-in scenes.
        claims: measures (`maskdistill.measures.MEASURES`) whose differences are tested, together;
            None is 20-NN accuracy, and where they are measured the best head's Jaccard and the
            accuracy under random occlusion.
        measures: groups of measures (`maskdistill.measures.GROUPS`) that are taken of every run.
        confidence: of intervals, and 1 - the level of the tests.

    Raises:
        ValueError: names that do not exist, settings that cannot work.
        TypeError: settings of another type.
    """

    policies: Mapping[str, Mapping[str, Any] | ViewPolicy]
    question: str = "Which policy of masks trains the better backbone?"
    seeds: Sequence[int] = (0, 1, 2)
    baseline: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    claims: Sequence[str] | None = None
    measures: Sequence[str] = DEFAULT_GROUPS
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not isinstance(self.policies, Mapping) or not self.policies:
            raise ValueError(
                "policies must be a table of at least one policy by name, such as [policies.none] "
                f'with policy = "none"; got {self.policies!r}.'
            )
        for name in self.policies:
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
                raise ValueError(
                    f"a policy's name becomes the name of a folder, so it must consist of letters, "
                    f"digits and . _ + -; got {name!r}."
                )
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError(f"question must be a sentence; got {self.question!r}.")
        object.__setattr__(self, "seeds", tuple(self._sequence("seeds", int)))
        object.__setattr__(self, "measures", tuple(self._sequence("measures", str)))
        for group in self.measures:
            known(group, GROUPS, "group in measures")
        if self.claims is None:
            object.__setattr__(self, "claims", tuple(filter(self._can_claim, DEFAULT_CLAIMS)))
        object.__setattr__(self, "claims", tuple(self._sequence("claims", str)))
        for seed in self.seeds:
            if seed < 0:
                raise ValueError(f"seeds must be ints >= 0; got {seed}.")
        if self.baseline is None:
            object.__setattr__(self, "baseline", next(iter(self.policies)))
        if not isinstance(self.baseline, str):
            raise TypeError(f"baseline must be the name of a policy; got {self.baseline!r}.")
        known(self.baseline, self.policies, "baseline")
        self._check_claims()
        if not isinstance(self.confidence, float) or not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must lie in [0.5, 1); got {self.confidence!r}.")
        for name, own in self.policies.items():
            if not isinstance(own, (ViewPolicy, Mapping)):
                raise TypeError(
                    f"the policy {name!r} must be a ViewPolicy or a table of settings; got {own!r}."
                )
            if isinstance(own, ViewPolicy) and own.global_crops != 2:
                raise ValueError(
                    f"the policy {name!r} is for {own.global_crops} global views of an image, and "
                    "DINO has two."
                )
        same: dict[str, str] = {}
        for name in self.policies:
            config, drawn = self.recipe(name, self.seeds[0])
            nameless = dataclasses.replace(config, policy="none", masker="", preset=None)
            twin = same.setdefault(repr((nameless, drawn)), name)
            if twin != name:
                raise ValueError(
                    f"the policies {twin!r} and {name!r} are the same, and so would their runs be."
                )

    @property
    def real(self) -> bool:
        """Whether the images are given, and not built-in scenes."""
        return any(self.settings.get(name) is not None for name in ("data", "shards"))

    @property
    def tested(self) -> tuple[str, ...]:
        """The measures that are claimed."""
        return tuple(self.claims or ())

    def _can_claim(self, claim: str) -> bool:
        measured = MEASURES[claim].group in self.measures
        return measured and not (self.real and claim.startswith(_NEED_MASKS))

    def _check_claims(self) -> None:
        for claim in self.claims or ():
            known(claim, MEASURES, "measure in claims")
            if MEASURES[claim].better is None:
                raise ValueError(
                    f"claims: {claim} is neither better nor worse when it is higher, so no claim "
                    "can be tested with it. Leave it out; the report shows it all the same."
                )
            if MEASURES[claim].group not in self.measures:
                raise ValueError(
                    f"claims: {claim} belongs to the group {MEASURES[claim].group!r}, which is not "
                    f"in measures ({', '.join(self.measures)}). Add it there."
                )
            if self.real and claim.startswith(_NEED_MASKS):
                raise ValueError(
                    f"claims: {claim} needs object masks, which data and shards do not have. Leave "
                    "it out, and compare the runs' attention by maskdistill attention --data MASKS."
                )

    def _sequence(self, name: str, kind: type) -> Sequence[Any]:
        values = getattr(self, name)
        right = isinstance(values, Sequence) and not isinstance(values, str)
        if not right or any(type(value) is not kind for value in values):
            raise TypeError(f"{name} must be a list of {kind.__name__}; got {values!r}.")
        if not values and name != "claims":
            raise ValueError(f"{name} must not be empty.")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} has an entry twice: {list(values)}.")
        found: Sequence[Any] = values
        return found

    def config(self, policy: str, seed: int) -> JobConfig:
        """Return the settings of one run, but for its folder."""
        # Those of all runs alone first, so that a mistake among them is told as theirs.
        plain = _with_settings(MINI_IMAGENET if self.real else SCENES, "settings", self.settings)
        own = self.policies[policy]
        table = {} if isinstance(own, ViewPolicy) else own
        config = _with_settings(plain, f"policies.{policy}", table)
        return dataclasses.replace(config, seed=seed)

    def recipe(self, policy: str, seed: int) -> tuple[JobConfig, ViewPolicy]:
        """Return the settings of one run, and its policy.

        A published recipe brings its own application of the mask with it, as `JobConfig.preset`
        does.
        """
        config, own = self.config(policy, seed), self.policies[policy]
        if isinstance(own, presets.Preset):
            return dataclasses.replace(config, apply=own.apply), own
        if isinstance(own, ViewPolicy):
            return config, own
        try:
            return recipe(config)
        except ValueError as error:
            raise ValueError(f"[policies.{policy}] {error}") from None

    def policy(self, name: str) -> ViewPolicy:
        """Return a policy by its name in the study."""
        return self.recipe(name, self.seeds[0])[1]

    def cells(self) -> list[Cell]:
        """Return the runs, in their order: all policies with a seed, then with the next.

        A study that is stopped has pairs to compare that way.
        """
        return [Cell(policy, seed) for seed in self.seeds for policy in self.policies]

    def plain(self) -> dict[str, Any]:
        """Return the study as JSON knows it."""
        return {
            "question": self.question,
            "baseline": self.baseline,
            "seeds": list(self.seeds),
            "claims": list(self.tested),
            "measures": list(self.measures),
            "confidence": self.confidence,
            "settings": _json(self.settings),
            "policies": {
                name: repr(own) if isinstance(own, ViewPolicy) else _json(own)
                for name, own in self.policies.items()
            },
        }


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        policy: its name in the study.
        seed: of the run.
    """

    policy: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.policy}-seed{self.seed}"


def _with_settings(config: JobConfig, where: str, table: Mapping[str, Any]) -> JobConfig:
    _check_settings(where, table)
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in table.items()}
    if values.get("data") is not None:
        values["data"] = Path(values["data"])
    try:
        return dataclasses.replace(config, **values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"[{where}] {error}") from None


def _check_settings(where: str, table: Mapping[str, Any]) -> None:
    if not isinstance(table, Mapping):
        raise TypeError(f"{where} must be a table of settings; got {table!r}.")
    for name, value in table.items():
        if name in _OWN:
            raise ValueError(f"[{where}] {name} is not for a table to set: use {_OWN[name]}.")
        if where != "settings" and name in _SHARED:
            raise ValueError(
                f"[{where}] {name} must be the same for all policies, or they would not be what "
                "differs: put it under [settings]."
            )
        known(name, settings_of_runs(), f"setting in [{where}]")
        kind = settings_of_runs()[name]
        if typing.get_origin(kind) is typing.Literal:
            known(str(value), typing.get_args(kind), f"{name} in [{where}]")
        elif typing.get_origin(kind) is tuple and not isinstance(value, (list, tuple)):
            raise TypeError(f"[{where}] {name} must be a list of two numbers; got {value!r}.")
        elif name == "model":
            _check_model(where, value)


def _check_model(where: str, name: Any) -> None:
    import timm

    if not timm.is_model(str(name)):
        close = difflib.get_close_matches(str(name), timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"[{where}] timm has no model {name!r}.{hint}")


@functools.cache
def settings_of_runs() -> dict[str, Any]:
    """Return the settings of a run by name, with their types."""
    hints = typing.get_type_hints(JobConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(JobConfig)}


def known(name: str, names: Mapping[str, Any] | Sequence[str], what: str) -> None:
    """Refuse a name that is none of those known, and say which one was meant."""
    if name in names:
        return
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(sorted(names))}."
    raise ValueError(f"unknown {what}: {name!r}. {hint}")


def _json(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in table.items()}
