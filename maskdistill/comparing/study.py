"""A study: which policies, with which seeds, on what budget, and which claims are tested."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import os
import re
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskdistill import presets
from maskdistill.evaluation.measures import DEFAULT_GROUPS, GROUPS, MEASURES
from maskdistill.policies import ViewPolicy
from maskdistill.training.job import MINI_IMAGENET, SCENES, JobConfig, recipe

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

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
        claims: measures (`evaluation.measures.MEASURES`) whose differences are tested, together;
            None is 20-NN accuracy, and where they are measured the best head's Jaccard and the
            accuracy under random occlusion.
        measures: groups of measures (`evaluation.measures.GROUPS`) that are taken of every run.
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
        self._make_tuple("seeds", int)
        self._make_tuple("measures", str)
        for group in self.measures:
            known(group, GROUPS, "group in measures")
        if self.claims is None:
            possible = [c for c in DEFAULT_CLAIMS if self._why_no_claim(c) is None]
            object.__setattr__(self, "claims", possible)
        self._make_tuple("claims", str)
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be ints >= 0; got {min(self.seeds)}.")
        if self.baseline is None:
            object.__setattr__(self, "baseline", next(iter(self.policies)))
        if not isinstance(self.baseline, str):
            raise TypeError(f"baseline must be the name of a policy; got {self.baseline!r}.")
        known(self.baseline, self.policies, "baseline")
        for claim in self.tested:
            known(claim, MEASURES, "measure in claims")
            if why := self._why_no_claim(claim):
                raise ValueError(f"claims: {claim} {why}")
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

    def _why_no_claim(self, claim: str) -> str | None:
        """Return why a measure cannot be claimed, if so."""
        of = MEASURES[claim]
        if of.better is None:
            return (
                "is neither better nor worse when it is higher, so no claim can be tested with it. "
                "Leave it out; the report shows it all the same."
            )
        if of.group not in self.measures:
            return (
                f"belongs to the group {of.group!r}, which is not in measures "
                f"({', '.join(self.measures)}). Add it there."
            )
        if self.real and claim.startswith(_NEED_MASKS):
            return (
                "needs object masks, which data and shards do not have. Leave it out, and compare "
                "the runs' attention by maskdistill attention --data MASKS."
            )
        return None

    def _make_tuple(self, name: str, kind: type) -> None:
        """Refuse a field that is no list of one type without repetition, and make it a tuple."""
        values = getattr(self, name)
        right = isinstance(values, Sequence) and not isinstance(values, str)
        if not right or any(type(value) is not kind for value in values):
            raise TypeError(f"{name} must be a list of {kind.__name__}; got {values!r}.")
        if not values and name != "claims":
            raise ValueError(f"{name} must not be empty.")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} has an entry twice: {list(values)}.")
        object.__setattr__(self, name, tuple(values))

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
            "settings": _jsonable(self.settings),
            "policies": {
                name: repr(own) if isinstance(own, ViewPolicy) else _jsonable(own)
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


def _jsonable(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in table.items()}


# --- Studies in files

TEMPLATE = Path(__file__).with_name("scenes.toml")
"""The study on the built-in scenes, which ``maskdistill compare`` runs without a file."""

_MODULE = "maskdistill_study"


def read_study(path: str | os.PathLike[str]) -> Study:
    """Read a study from a TOML file, or from a Python file that assigns ``study``.

    >>> read_study(TEMPLATE).baseline
    'none'

    Paths to data are relative to the file. A Python file is run, so open none that you do not
    trust.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or the study cannot work; the sentence says where.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and a study is a file .toml or .py. Give the file, and the "
            "study's folder as --out."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no study {path}. maskdistill compare --template prints one to start from."
        )
    if path.suffix == ".py":
        return _python_study(path)
    if path.suffix != ".toml":
        raise ValueError(f"a study is a file .toml or .py; got {path}.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from None
    with _told_of(path):
        fields = {f.name: None for f in dataclasses.fields(Study)}
        for name in values:
            if name == "policy" and isinstance(values[name], dict):
                raise ValueError("unknown key: 'policy'. Did you mean [policies.NAME]?")
            if name in settings_of_runs() and name not in fields:
                raise ValueError(f"{name} is a setting of the runs: put it under [settings].")
            known(name, fields, "key")
        for name in ("settings", "policies"):
            if not isinstance(values.get(name, {}), dict):
                raise ValueError(f"{name} must be a table; got {values[name]!r}.")
        for name, own in values.get("policies", {}).items():
            if not isinstance(own, dict):
                raise ValueError(f"[policies.{name}] must be a table of settings; got {own!r}.")
        if "policies" not in values:
            raise ValueError("it names no policies. Add [policies.NAME] for each.")
        values["settings"] = _beside(values.get("settings", {}), path.parent)
        return Study(**values)


def load_study_module(path: Path) -> Any:
    """Run a study's Python file as the module that its classes are found in, and return that.

    Modules beside it can be imported, as by a script.
    """
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec.loader.exec_module(module)
    return module


def _python_study(path: Path) -> Study:
    try:
        module = load_study_module(path)
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}.") from None
    except Exception as error:  # it is the user's own code, with whatever that raises
        own = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        line = f", line {own[-1]}" if own else ""
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}{line}: {kind}{error}") from error
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise ValueError(
            f"{path} must assign study = Study(...), from maskdistill.comparing; got {study!r}."
        )
    return dataclasses.replace(study, settings=_beside(study.settings, path.parent))


def _beside(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings whose paths to data are relative to a folder."""
    placed = dict(settings)
    for name in ("data", "shards", "val_shards"):
        value = placed.get(name)
        if isinstance(value, (str, Path)) and "://" not in str(value):
            placed[name] = str(folder / Path(value).expanduser())
    return placed


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
