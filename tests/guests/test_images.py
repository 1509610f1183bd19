"""The prebuilt guests are what their sources give, and say of themselves what the VMM reads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.guests.conftest import Run
from vmm.boot.image import EntryMode, load_image
from vmm.report import results

ROOT = Path(__file__).resolve().parent.parent.parent
FIRMWARE = ROOT / "firmware"
IMAGES = FIRMWARE / "images"
BUILD = ROOT / "scripts" / "build-firmware"
NAMES = ["hello16", "hello32", "hello64", "sentinel", "ticker"]
RAM = [(0, 64 << 20)]


def build(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BUILD, *arguments], capture_output=True, text=True, timeout=50, check=False
    )


def cannot_be_told(reason: str) -> None:
    """Skips the test, or fails it if CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (CI=true)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def gcc() -> None:
    """What a test asks for that needs gcc."""
    if shutil.which("gcc") is None:
        cannot_be_told("gcc is not installed: the images cannot be rebuilt")


@pytest.fixture(scope="module")
def rebuilt(gcc: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rebuilt")
    result = build("--output", output)
    assert result.returncode == 0, result.stderr
    return output


def test_sums_are_of_these_files() -> None:
    sums = [f"{hashlib.sha256((IMAGES / f'{n}.elf').read_bytes()).hexdigest()}  {n}.elf" for n in NAMES]
    assert (IMAGES / "SHA256SUMS").read_text().splitlines() == sums
    assert sorted(path.stem for path in IMAGES.glob("*.elf")) == NAMES


def same_toolchain(rebuilt: Path) -> None:
    """Skips the test, or fails it if CI=true, where the committed images are another toolchain's."""
    here, recorded = (rebuilt / "TOOLCHAIN").read_text(), (IMAGES / "TOOLCHAIN").read_text()
    if here != recorded:
        cannot_be_told(f"the images are from {recorded.splitlines()}, here are {here.splitlines()}")


@pytest.mark.parametrize(
    ("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)], ids=["CI", "elsewhere"]
)
def test_another_toolchain_is_no_success_in_ci(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    (tmp_path / "TOOLCHAIN").write_text("gcc 1.0\n")
    with pytest.raises(outcome, match=r"here are \['gcc 1\.0'\]"):
        same_toolchain(tmp_path)
    shutil.copy(IMAGES / "TOOLCHAIN", tmp_path)
    same_toolchain(tmp_path)


def test_images_are_what_the_sources_give(rebuilt: Path) -> None:
    same_toolchain(rebuilt)
    differing = [
        n for n in NAMES if (rebuilt / f"{n}.elf").read_bytes() != (IMAGES / f"{n}.elf").read_bytes()
    ]
    assert differing == [], "run scripts/build-firmware"


def test_a_build_elsewhere_gives_the_same_bytes(rebuilt: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a copy" / "of the sources"
    shutil.copytree(FIRMWARE, copy / "firmware")
    (copy / "scripts").mkdir()
    shutil.copy(BUILD, copy / "scripts")
    subprocess.run(
        [sys.executable, copy / "scripts" / "build-firmware", "--output", tmp_path / "out"],
        check=True,
        capture_output=True,
        timeout=50,
    )
    assert (tmp_path / "out" / "SHA256SUMS").read_text() == (rebuilt / "SHA256SUMS").read_text()


def test_check_names_what_differs(gcc: None, tmp_path: Path) -> None:
    shutil.copytree(FIRMWARE, tmp_path / "firmware")
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(BUILD, tmp_path / "scripts")
    source = tmp_path / "firmware" / "ticker" / "ticker.c"
    source.write_text(source.read_text().replace('"tick "', '"tock "'))
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, timeout=50, check=False
    )
    assert result.returncode == 1
    assert "ticker.elf" in result.stderr
    source.write_text("not C")
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, timeout=50, check=False
    )
    assert result.returncode == 2
    assert "ticker/ticker.c" in result.stderr


@pytest.mark.parametrize("arguments", [("--toolchain", "zig"), ("--check", "--output", "x")])
def test_only_gcc_writes_the_images(arguments: tuple[str, ...]) -> None:
    result = build(*arguments)
    assert result.returncode == 2
    assert "error: " in result.stderr


@pytest.mark.kvm
@pytest.mark.skipif(find_spec("ziglang") is None, reason="the ziglang wheel is not installed")
def test_zig_builds_guests_that_work(run: Run, tmp_path: Path) -> None:
    result = build("--toolchain", "zig", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    guest = run(tmp_path / "sentinel.elf", "pattern=64K rounds=2", cpus=2)
    assert guest.exit_status() == 1


@pytest.mark.parametrize("name", NAMES)
def test_notes(name: str) -> None:
    image = load_image(IMAGES / f"{name}.elf", ram=RAM)
    modes = {"hello16": EntryMode.REAL16, "hello32": EntryMode.PROTECTED32}
    assert image.mode is modes.get(name, EntryMode.LONG64)
    assert image.results == (None if name.startswith("hello") else (0x200000, results.RESULTS_SIZE))


STRUCTS: dict[str, type[ctypes.LittleEndianStructure]] = {
    "violation": results.ViolationLayout,
    "check_results": results.CheckLayout,
    "gap": results.GapLayout,
    "cpu_results": results.CpuLayout,
    "results": results.HeaderLayout,
}


def test_results_layout_is_the_headers(gcc: None, tmp_path: Path) -> None:
    """Every field's offset and size, and every constant, as the compiler has them."""
    mine = {
        f"{struct}.{name}": (getattr(layout, name).offset, getattr(layout, name).size)
        for struct, layout in STRUCTS.items()
        for name, *_ in layout._fields_
    }
    mine["results.cpu"] = (results.HEADER_SIZE, results.MAX_CPUS * results.CPU_SIZE)
    constants = ["RESULTS_MAGIC", "RESULTS_VERSION", "CHECK_SLOTS", "GAP_SLOTS", "MAX_CPUS", "RESULTS_SIZE"]
    states = {
        **{f"GUEST_{state.name}": state.value for state in results.GuestState},
        **{f"CHECK_{state.name}": state.value for state in results.CheckState},
        **{f"CPU_{state.name}": state.value for state in results.CpuState},
    }
    lines = ["#include <stdio.h>", "#undef NULL", '#include "results.h"', "int main(void) {"]
    for key in mine:
        struct, name = key.split(".")
        field = f"((struct {struct} *)0)->{name}"
        lines.append(
            f'printf("{key} %zu %zu\\n", __builtin_offsetof(struct {struct}, {name}), sizeof {field});'
        )
    lines += [f'printf("{name} %llu 0\\n", (unsigned long long){name});' for name in [*constants, *states]]
    source = tmp_path / "layout.c"
    source.write_text("\n".join([*lines, "}"]))
    subprocess.run(
        ["gcc", "-Werror", "-I", FIRMWARE / "include", source, "-o", tmp_path / "layout"],
        check=True,
        timeout=50,
    )
    output = subprocess.run(
        [tmp_path / "layout"], capture_output=True, text=True, check=True, timeout=50
    ).stdout
    theirs = {
        key: (int(first), int(second))
        for key, first, second in (line.split() for line in output.splitlines())
    }
    expected = mine | {name: (getattr(results, name), 0) for name in constants}
    assert theirs == expected | {name: (value, 0) for name, value in states.items()}
