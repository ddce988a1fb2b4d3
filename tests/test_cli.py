"""The command `maskdistill`: what it prints, its exit codes, and what it does not import."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from maskdistill import cli
from maskdistill.data import open_data
from tests.data.test_sources import damage, file_name, write_class_folders, write_pickles


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_pack_writes_a_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_class_folders(tmp_path / "data")
    out = tmp_path / "p.npz"
    code, printed, complaints = run(capsys, "pack", tmp_path / "data", out)
    assert (code, complaints) == (0, "")
    assert printed.startswith(
        f"{out}: 18 images of 3 classes, 0.0 MiB; 6 images each, re-split 5/1"
    )
    assert open_data(out).format == "pack"
    code, printed, complaints = run(capsys, "pack", tmp_path / "data", out)
    assert (code, printed) == (2, "")
    assert complaints == (
        f"error: {out} exists. Pass overwrite=True (--overwrite on the command line) to replace "
        "it.\n"
    )
    assert run(capsys, "pack", tmp_path / "data", out, "--overwrite", "--size", "4")[0] == 0
    assert open_data(out).train[0][0].size == (4, 4)


def test_pack_writes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from maskdistill.data.shards import open_shards

    write_class_folders(tmp_path / "data")
    code, printed, _ = run(capsys, "pack", tmp_path / "data", tmp_path / "out", "--shards", "3")
    assert code == 0
    assert printed.startswith(f"{tmp_path / 'out'}: 18 images of 3 classes")
    assert open_shards(tmp_path / "out").counts.tolist() == [5, 5, 5]


def test_damaged_images_are_warned_of_in_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_class_folders(tmp_path / "data")
    for n in range(2):
        damage(tmp_path / "data" / "n02" / file_name("n02", n))
    code, printed, complaints = run(capsys, "pack", tmp_path / "data", tmp_path / "p.npz")
    lines = complaints.splitlines()
    assert (code, len(lines)) == (0, 2)
    assert all(line.startswith(f"warning: Damaged image: {tmp_path}") for line in lines)
    assert printed.endswith("2 damaged images were left out.\n")
    code, printed, complaints = run(
        capsys, "pack", tmp_path / "data", tmp_path / "q.npz", "--max-damaged", "1"
    )
    assert (code, printed) == (1, "")
    assert "stopped: 2 images are damaged, more than max_damaged=1" in complaints


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nothing", "p.npz"), "error: nothing does not exist"),
        (("caches", "p.npz"), "--allow-pickle on the command line"),
        (("caches", "p.npz", "--allow-pickle", "--format", "pack"), "not of the format 'pack'"),
        (("caches", "p.npz", "--allow-pickle", "--quality", "101"), "quality must lie between"),
        (("caches", "p.tar"), "name ends in .npz"),
        (("caches", "out", "--allow-pickle", "--shards", "99"), "do not fill 99 shards"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pickles(tmp_path / "caches")
    code, printed, complaints = run(capsys, "pack", *arguments)
    assert (code, printed, complaints.count("\n")) == (2, "", 1)
    assert reason in complaints


def test_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskdistill.data.packing.gather", interrupted)
    write_class_folders(tmp_path / "data")
    code, _, complaints = run(capsys, "pack", tmp_path / "data", tmp_path / "p.npz")
    assert (code, complaints) == (130, "interrupted\n")
    assert not list(tmp_path.glob("p.npz*"))


def test_a_program_error_is_no_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("maskdistill.data.packing.gather", broken)
    write_class_folders(tmp_path / "data")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["pack", str(tmp_path / "data"), str(tmp_path / "p.npz")])


def test_without_tyro_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main([]) == 2
    assert 'pip install "maskdistill[train]"' in capsys.readouterr().err


def test_help_imports_no_more_than_the_library_does() -> None:
    code = """if True:
        import sys
        from maskdistill import cli
        try:
            cli.main(sys.argv[1:])
        except SystemExit as error:
            print(error.code, *sorted({name.split(".")[0] for name in sys.modules}))"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    exit_code, *modules = done.stdout.splitlines()[-1].split()
    assert exit_code == "0"
    assert "maskdistill" in modules
    assert not {"timm", "torchvision", "PIL", "webdataset", "pyarrow", "matplotlib"} & set(modules)
    assert "pack" in done.stdout


def test_python_m_maskdistill_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskdistill", "pack", "nothing", "p.npz"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("maskdistill", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: nothing does not exist")
