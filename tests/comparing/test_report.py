"""From runs to the report: what it says, that it needs nothing else, and that numbers agree."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maskdistill.cli import main
from maskdistill.comparing import Cell, Study, gather, read_study
from maskdistill.comparing.one_run import (
    RunRequest,
    carry_out,
    folder_of,
    is_done,
    write_identity,
)
from maskdistill.comparing.report import page, report, study_toml
from maskdistill.comparing.results import Results, sentences
from maskdistill.evaluation import knn_accuracies, load_backbone
from maskdistill.training.job import open_images

SETTINGS = """
question = "Does hiding <patches> help & whom?"
seeds = [0, 1]
claims = ["knn_20", "jaccard_best_head"]
measures = ["knn", "attention", "occlusion"]
[settings]
scenes = 128
max_steps = 6
depth = 1
local_crops = 2
hidden_dim = 32
batch_size = 16
knn_train = 60
knn_val = 25
evaluations = 0
workers = 0
[policies.none]
policy = "none"
[policies.random]
masker = "RandomMasker(0.3)"
[policies.guided]
masker = "AttentionGuidedMasker(0.3)"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of which all runs but the last are done."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(SETTINGS)
    study = read_study(folder / "study.toml")
    for cell in study.cells()[:-1]:
        carry_out(RunRequest(study, cell, folder_of(folder / "out", cell), "cpu"))
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return gather(read_study(folder / "study.toml"), folder / "out")


@pytest.fixture(scope="module")
def text(results: Results) -> str:
    return page(results)


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else(text: str) -> None:
    parsed = Page(text)
    assert not parsed.open  # every tag is closed, in order
    kinds = {tag for tag, _ in parsed.tags}
    assert not kinds & {"script", "link", "iframe", "object", "embed"}
    for tag, attributes in parsed.tags:
        for name in ("src", "srcset"):
            if name in attributes:
                assert attributes[name].startswith("data:image/"), (tag, attributes[name][:60])
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", parsed.text)


def test_sections_are_there_and_linked(text: str) -> None:
    parsed = Page(text)
    links = {a["href"][1:] for tag, a in parsed.tags if tag == "a" and a["href"].startswith("#")}
    ids = {a["id"] for tag, a in parsed.tags if tag == "section"}
    assert links == ids
    assert ids >= {"answer", "table", "differences", "curves", "robustness", "attention", "masks",
                   "costs", "configuration", "method"}  # fmt: skip


def test_words_of_the_study_are_text_and_never_markup(text: str) -> None:
    assert "Does hiding <patches> help & whom?" in Page(text).text
    assert "<patches>" not in text


def test_it_says_what_is_missing(text: str) -> None:
    words = Page(text).text
    assert "1 of 6 runs is not in it" in words
    assert "guided-seed1" in words


def test_claims_come_from_the_runs(results: Results, text: str) -> None:
    claims = {(claim.policy, claim.measure): claim for claim in results.claims}
    assert set(claims) == {(p, m) for p in ("random", "guided") for m in results.study.tested}
    claim = claims["random", "knn_20"]
    ours, theirs = results.values("random", "knn_20"), results.values("none", "knn_20")
    assert claim.values == tuple(ours[seed] - theirs[seed] for seed in (0, 1))
    assert claims["guided", "knn_20"].seeds == (0,)  # its second seed is not done
    assert claims["guided", "knn_20"].verdict == "cannot be said"
    said = Page(text).text
    assert len(sentences(results)) == results.tests == 4
    for words in sentences(results):
        assert all(part in said for part in words)
    assert "with one seed, which says nothing about chance" in said


def test_a_measure_is_what_the_instrument_says(results: Results, folder: Path) -> None:
    from maskdistill.evaluation import balanced_indices, extract_features

    run = results.of("random")[0]
    config = results.study.config("random", 0)
    images, _ = open_images(config, config.image_size)
    features = [
        extract_features(
            load_backbone(run.folder), data, 32,
            indices=balanced_indices(list(labels), limit),
        )
        for data, labels, limit in (
            (images.train, images.train_labels, 60), (images.val, images.val_labels, 25),
        )
    ]  # fmt: skip
    expected = knn_accuracies(*features[0], *features[1])
    assert run.measured is not None
    assert run.measured.values["knn_20"] == pytest.approx(expected[20])


def test_json_and_csv_say_the_same(results: Results, folder: Path) -> None:
    report(results)
    out = folder / "out"
    found = json.loads((out / "results.json").read_text())
    with (out / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done"] * 5 + ["missing"]
    for row, run in zip(rows, found["runs"], strict=True):
        if run["measured"]:
            assert float(row["knn_20"]) == run["measured"]["values"]["knn_20"]
    with (out / "differences.csv").open(newline="") as file:
        by_name = {(row["policy"], row["measure"]): row for row in csv.DictReader(file)}
    for difference in found["differences"]:
        row = by_name[difference["policy"], difference["measure"]]
        assert float(row["mean"]) == difference["interval"]["mean"]
        assert (row["verdict"] or None) == difference["verdict"]
    # Nothing beyond the claims is tested.
    assert {d["measure"] for d in found["differences"] if d["verdict"]} == {
        "knn_20", "jaccard_best_head",
    }  # fmt: skip


def test_the_study_in_the_report_is_the_study(results: Results, tmp_path: Path) -> None:
    (tmp_path / "again.toml").write_text(study_toml(results))
    assert read_study(tmp_path / "again.toml").plain() == results.study.plain()


def test_no_machines_paths(text: str, folder: Path) -> None:
    assert str(folder) not in text


def test_the_same_results_give_the_same_page(results: Results, text: str) -> None:
    assert page(results) == text


def test_random_weights_stand_beside(results: Results) -> None:
    assert set(results.random_values("knn_20")) == {0, 1}
    assert results.of("random")[0].random is None  # once per seed is enough
    # They are the weights that the runs began with.
    for run in results.of("none"):
        assert results.random_values("knn_20")[run.cell.seed] == pytest.approx(
            run.summary["knn_random_init"]
        )


def test_all_planned_tests_count(results: Results) -> None:
    """A policy that failed must not make it easier for the others to be better."""
    planned = {claim.policy: claim.corrected for claim in results.claims}
    without = dataclasses.replace(
        results, runs=tuple(run for run in results.runs if run.cell.policy != "guided")
    )
    assert {c.policy for c in without.claims} == {"random"}
    assert without.tests == 4
    for claim in without.claims:
        if claim.p is not None:
            assert claim.corrected is not None
            assert claim.corrected >= min(1.0, 3 * claim.p)  # of four tests, at most one rank up
    assert planned["random"] is not None
    assert [words[2] for words in sentences(without)][-1] == "No run of guided is done."


def test_what_was_not_measured_is_said(results: Results) -> None:
    blind = [
        dataclasses.replace(
            run,
            measured=dataclasses.replace(
                run.measured,
                values={n: v for n, v in run.measured.values.items() if "jaccard" not in n},
                skipped={"attention": "the images have no object masks."},
            ),
        )
        for run in results.done
        if run.measured
    ]
    found = sentences(dataclasses.replace(results, runs=tuple(blind)))
    assert found[-1] == (
        "Cannot be said:", "guided against none in Jaccard, best head.",
        "The images have no object masks.",
    )  # fmt: skip


def test_numbers_that_are_not_finite_are_null(results: Results) -> None:
    run = results.runs[0]
    assert run.measured is not None
    odd = dataclasses.replace(run.measured, values={**run.measured.values, "knn_20": math.nan})
    changed = dataclasses.replace(
        results, runs=(dataclasses.replace(run, measured=odd), *results.runs[1:])
    )
    text = json.dumps(changed.plain(), allow_nan=False)
    assert json.loads(text)["runs"][0]["measured"]["values"]["knn_20"] is None
    assert "knn_20" in changed.measures


def test_runs_of_other_settings_are_not_reported(results: Results, tmp_path: Path) -> None:
    shutil.copytree(results.out, tmp_path / "out")
    for cell in results.study.cells():
        folder = folder_of(tmp_path / "out", cell)
        if folder.is_dir():
            write_identity(results.study, cell, "", folder)
    gather(results.study, tmp_path / "out")
    other = {**results.study.policies, "random": {"masker": "RandomMasker(0.7)"}}
    with pytest.raises(ValueError, match=r"random-seed0 was begun with other settings: policy was"):
        gather(dataclasses.replace(results.study, policies=other), tmp_path / "out")


def test_runs_measured_otherwise_are_not_mixed(results: Results) -> None:
    fewer = dataclasses.replace(results.study, settings={**results.study.settings, "knn_val": 10})
    assert not gather(fewer, results.out).done


def test_a_cut_summary_is_no_end(results: Results, tmp_path: Path) -> None:
    cell, run = Cell("random", 0), tmp_path / "run"
    shutil.copytree(folder_of(results.out, cell), run)
    assert is_done(results.study, cell, run)
    (run / "summary.json").write_text("{")
    assert not is_done(results.study, cell, run)


def test_a_study_in_python_says_so(results: Results) -> None:
    policies = {**results.study.policies, "random": results.study.policy("random")}
    python = dataclasses.replace(results.study, policies=policies)
    text = Page(page(gather(python, results.out))).text
    assert "it was a Python file" in text
    assert "# an object of Python: ViewPolicy(student_global=RandomMasker(0.3)" in text


def test_without_the_images_there_is_a_report_without_pictures(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise FileNotFoundError("pictures/ does not exist.")

    monkeypatch.setattr("maskdistill.comparing.report.open_images", gone)
    text = Page(page(results)).text
    assert "Pictures of images are missing. The images could not be opened" in text
    assert "20-NN accuracy" in text


def test_nothing_done_is_nothing_to_report(results: Results, tmp_path: Path) -> None:
    empty = gather(results.study, tmp_path)
    with pytest.raises(ValueError, match="no run"):
        page(empty)
    report(empty)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_damaged_measures_are_taken_again(results: Results, tmp_path: Path, damage: str) -> None:
    cell = Cell("none", 0)
    run = tmp_path / "run"
    shutil.copytree(folder_of(results.out, cell), run)
    path = run / "measured.json"
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text()[:40] if damage == "cut" else '{"protocol": 3}')
    assert not is_done(results.study, cell, run)
    # It trains nothing: the run is there.
    carry_out(RunRequest(results.study, cell, run, "cpu"))
    assert is_done(results.study, cell, run)
    again = json.loads(path.read_text())
    before = json.loads((folder_of(results.out, cell) / "measured.json").read_text())
    for name, value in before["policy"]["values"].items():
        assert again["policy"]["values"][name] == pytest.approx(value, abs=1e-6), name


def test_fewer_measures_need_no_run_and_more_do(results: Results) -> None:
    cell = Cell("none", 0)
    run = folder_of(results.out, cell)
    more = dataclasses.replace(results.study, measures=("knn", "health"), claims=("knn_20",))
    assert not is_done(more, cell, run)
    fewer = dataclasses.replace(results.study, measures=("knn",), claims=("knn_20",))
    assert is_done(fewer, cell, run)
    assert set(gather(fewer, results.out).measures) == {"knn_10", "knn_20", "knn_100", "knn_200"}


def test_one_policy_alone_and_no_claims(results: Results) -> None:
    alone = dataclasses.replace(results.study, policies={"none": {"policy": "none"}}, claims=())
    text = Page(page(gather(alone, results.out))).text
    assert "nothing to compare it with" in text
    unclaimed = dataclasses.replace(results.study, claims=())
    assert "names no claims" in Page(page(gather(unclaimed, results.out))).text


def test_the_command_does_what_is_left(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", str(folder / "study.toml"), "--out", str(folder / "out")]
    assert main([*arguments, "--report-only"]) == 1  # one run is missing
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in planned[-6:]] == ["done"] * 5 + ["to"]
    assert "student   RandomMasker(0.3)   clean" in planned
    for name in ("cell.json", "log.txt"):  # runs made by hand have none
        assert not (folder / "out/runs/guided-seed1" / name).exists()
    assert main([*arguments, "--jobs", "1", "--json"]) == 0
    found = capsys.readouterr()
    assert "guided-seed1: done in" in found.err
    values = json.loads(found.out)["runs"][-1]["measured"]["values"]
    assert math.isfinite(values["knn_20"])
    text = (folder / "out/report.html").read_text()
    assert "is not in it" not in text


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.toml").write_text("[policies.a]\nmaskr = 'x'")
    out = tmp_path / "out"
    assert main(["compare", str(tmp_path / "study.toml"), "--out", str(out)]) == 2
    assert "Did you mean mask" in capsys.readouterr().err
    assert not out.exists()
    assert main(["compare", "--report-only", "--out", str(out)]) == 2
    assert "no run of the study is done" in capsys.readouterr().err
    assert main(["compare", "--template"]) == 0
    (tmp_path / "own.toml").write_text(capsys.readouterr().out)
    assert read_study(tmp_path / "own.toml").baseline == "none"


def test_a_study_goes_before_the_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--dry-run", "--devices", "cpu", "study.toml"]) == 2
    assert "study.toml is no device" in capsys.readouterr().err


def test_torchrun_is_not_for_studies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--out", str(tmp_path / "out")]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_start_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_text(
        "seeds = [0]\n[settings]\ndata = 'pictures'\n[policies.none]\npolicy = 'none'\n"
    )
    arguments = ["compare", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "the study's data are not in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "pictures").mkdir()
    assert main(arguments) == 2  # it is no data set, which shows before anything is run
    assert str(tmp_path / "pictures") in capsys.readouterr().err
    assert not (tmp_path / "out/runs").exists()


@pytest.mark.long
def test_an_interrupted_study_goes_on(tmp_path: Path) -> None:
    text = SETTINGS.replace("max_steps = 6", "max_steps = 60").replace("[0, 1]", "[0]")
    (tmp_path / "study.toml").write_text(text)
    command = [sys.executable, "-m", "maskdistill", "compare", str(tmp_path / "study.toml")]
    command += ["--out", str(tmp_path / "out"), "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/runs/none-seed0/metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Go on with the same command" in said
    assert subprocess.run(command, check=False).returncode == 0
    log = (tmp_path / "out/runs/none-seed0/log.txt").read_text()
    assert "resuming from step" in log
    results = gather(Study(**_fields(read_study(tmp_path / "study.toml"))), tmp_path / "out")
    assert len(results.done) == 3


def _fields(study: Study) -> dict[str, Any]:
    return {field.name: getattr(study, field.name) for field in dataclasses.fields(study)}
