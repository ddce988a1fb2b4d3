"""A study's file: TOML, or Python for policies that TOML cannot say."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskdistill.comparing.study import Study, known, settings_of_runs

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

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
    with _named(path):
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
        values["settings"] = _placed(values.get("settings", {}), path.parent)
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
    return dataclasses.replace(study, settings=_placed(study.settings, path.parent))


def _placed(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings whose paths to data are relative to a folder."""
    placed = dict(settings)
    for name in ("data", "shards", "val_shards"):
        value = placed.get(name)
        if isinstance(value, (str, Path)) and "://" not in str(value):
            placed[name] = str(folder / Path(value).expanduser())
    return placed


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
