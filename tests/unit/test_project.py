"""What the project promises about itself: its packages, its documents and its names agree with its code."""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from argparse import Namespace
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest

import vmm
from vmm import errors

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "vmm").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "firmware").rglob("*.md")])
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EMPTY_WORDS = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}
IOCTL_OF_ITS_OWN = {"vmm/devices/chardev/pty.py"}  # a terminal's, not KVM's


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- packages ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, as pip builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        "-m",
        "pip",
        "wheel",
        "-qq",
        "--disable-pip-version-check",
        "--no-build-isolation",
        "--no-deps",
    ]
    subprocess.run([sys.executable, *command, "-w", folder, ROOT], check=True, timeout=50)
    [wheel] = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [path] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(path).decode())


def test_version_is_the_package_s(wheel: Path, metadata: Message) -> None:
    assert metadata["Version"] == vmm.__version__
    assert wheel.name == f"vmm_cpr-{vmm.__version__}-py3-none-any.whl"
    assert re.fullmatch(r"\d+\.\d+\.\d+", vmm.__version__)  # query-version takes it apart


def test_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    images = {f"vmm/images/{path.name}" for path in (ROOT / "firmware/images").iterdir()}
    assert names == {relative(path) for path in MODULES} | {"vmm/py.typed"} | images


def test_wheel_s_images_are_those_of_the_checksums(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        rows = archive.read("vmm/images/SHA256SUMS").decode().splitlines()
        expected = {name: checksum for checksum, name in (row.split() for row in rows)}
        images = [PurePosixPath(name).name for name in archive.namelist() if name.endswith(".elf")]
        actual = {name: hashlib.sha256(archive.read(f"vmm/images/{name}")).hexdigest() for name in images}
    assert expected == actual
    assert {"hello16.elf", "hello32.elf", "hello64.elf", "sentinel.elf", "ticker.elf"} <= actual.keys()


def test_needs_at_run_time_only_what_was_agreed(metadata: Message) -> None:
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(re.split(r"[<>=!~]", need)[0] for need in needs) == ["msgspec", "pyelftools"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "LICENSE" in metadata.get_all("License-File", [])


def test_source_distribution_can_be_tested(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT, timeout=50, capture_output=True)
    [path] = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    here = Path(__file__)
    for wanted in (here, ROOT / "scripts/test", ROOT / ".ci/run", ROOT / "LICENSE", *MODULES, *DOCUMENTS):
        assert relative(wanted) in names
    assert "firmware/images/SHA256SUMS" in names
    assert not {name for name in names if name.startswith((".git/", ".venv/")) or name.endswith(".pyc")}


# --- documents ---


def console_lines(document: Path) -> list[str]:
    """The command lines in the document's `console` blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


COMMANDS = sorted({line for document in DOCUMENTS for line in console_lines(document)})


@pytest.mark.parametrize("line", COMMANDS)
def test_documented_commands_exist(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line)
    if program != "vmm":
        assert (ROOT / program).is_file(), f"{line}: no such script"
        return
    parsed = []
    main = importlib.import_module("vmm.cli.main")
    monkeypatch.setattr(main, "_guarded", lambda module, namespace: parsed.append((module, namespace)) or 0)
    assert main.main(arguments) == 0  # argparse ends what it does not know with SystemExit
    [(module, namespace)] = parsed
    assert isinstance(namespace, Namespace)
    assert callable(importlib.import_module(module).run)


def anchors(document: Path) -> set[str]:
    """The anchors of the document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{relative(document)}: {target} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{relative(document)}: {target} has no such heading"


def test_paths_named_in_the_readme_s_table_exist() -> None:
    section = (ROOT / "README.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    folders = re.findall(r"^\| `([^`]+)/`", section, re.MULTILINE)
    assert {"vmm", "firmware", "tests", "scripts", "docs"} == set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)


def module_names() -> list[str]:
    """Every module of the package but those that are programs."""
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in MODULES]
    return [".".join(part for part in name if part != "__init__") for name in parts if name[-1] != "__main__"]


def error_classes(base: type[errors.VmmError] = errors.VmmError) -> set[type[errors.VmmError]]:
    return {base}.union(*(error_classes(child) for child in base.__subclasses__()))


ENDED, INTERRUPTED = 0, 130  # no error's


def test_exit_statuses_are_documented_and_never_look_like_a_guest_s() -> None:
    section = (ROOT / "README.md").read_text().partition("## Exit status")[2].partition("\n## ")[0]
    documented = {int(status) for status in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    for name in module_names():
        importlib.import_module(name)
    raised = {error.exit_code for error in error_classes()}
    assert raised | {ENDED, INTERRUPTED} == documented
    assert all(status % 2 == 0 for status in documented)


def test_every_decision_is_listed_and_numbered_once() -> None:
    records = sorted(path.name for path in (ROOT / "docs/adr").glob("[0-9]*.md"))
    assert [int(name[:4]) for name in records] == list(range(1, len(records) + 1))
    listed = re.findall(r"\((\d{4}-[a-z0-9-]+\.md)\)", (ROOT / "docs/adr/README.md").read_text())
    assert listed == records


def test_changelog_has_a_section_for_what_comes() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", heading) for heading in headings[1:])


# --- names and imports ---


def test_no_module_or_folder_has_an_empty_word_for_a_name() -> None:
    named = [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").iterdir()]
    empty = {
        relative(path)
        for path in named
        for part in path.relative_to(ROOT).parts
        if set(re.split(r"[_.\-]", part)) & EMPTY_WORDS
    }
    assert empty == set()


def test_only_vmm_kvm_issues_ioctls() -> None:
    callers = {
        relative(path)
        for path in MODULES
        if path.parent != ROOT / "vmm/kvm"
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "fcntl.ioctl")
        or (isinstance(node, ast.ImportFrom) and node.module == "fcntl")
    }
    assert callers == IOCTL_OF_ITS_OWN


def test_no_import_does_work() -> None:
    program = (
        "import importlib, os, sys, threading\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "assert len(os.listdir('/proc/self/fd')) == before, 'an import opened an fd'\n"
        "assert threading.active_count() == 1, 'an import started a thread'\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, *module_names()]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_the_command_line_is_loaded_without_the_vmm() -> None:
    program = (
        "import sys; from vmm.cli import main\n"
        "heavy = {'asyncio', 'ctypes', 'elftools', 'msgspec', 'vmm.kvm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=50)
