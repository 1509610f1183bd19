"""scripts/demo, scripts/test and .ci/run: what is missing is said in one sentence, and nothing is done twice.

Each test runs a copy of the scripts in a folder of its own, with a PATH that holds only what they need.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("bash", "cat", "cut", "dirname", "flock", "rm", "sed", "sha256sum")
OLD_PYTHON = "import sys; sys.version_info = (3, 9, 2, 'final', 0)"
BARE_PYTHON = "import sys; sys.modules['ensurepip'] = None"  # as Debian has it without python3-venv

# Stands in for an interpreter with pip, so that no test needs a package index: `-m venv` makes a folder with itself
# in it, `-m pip` writes down what it was asked and fails on request.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
*"-m venv"*) for folder; do :; done; rm -rf "$folder"; mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
    printf '#!/usr/bin/env bash\\nprintf "%%s\\\\n" "$@"\\n' >"$folder/bin/vmm"; chmod +x "$folder/bin/vmm" ;;
*"-m pip"*) echo "noise of pip"; printf '%s\\n' "$*" >>pip.log; [ ! -e no-index ] ;;
*"-m pytest"*) shift 2; echo "KVM required: ${{VMM_REQUIRE_KVM:-no}}, CI: ${{CI:-no}}"; echo "pytest got: $*" ;;
*) exec {sys.executable} "$@" ;;
esac
"""

Project = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what the scripts look at, and `bin`, the only folder on PATH."""
    folder = tmp_path / "pro ject"  # with a space, as folders may have
    for name in (
        "scripts/demo",
        "scripts/test",
        "scripts/lib-venv.sh",
        ".ci/run",
        "pyproject.toml",
        "vmm/__init__.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    for program in (*PROGRAMS, "cp", "mkdir", "chmod", "env"):
        found = shutil.which(program)
        assert found, f"{program} is not installed"
        (folder / "bin" / program).symlink_to(found)
    return folder


@pytest.fixture
def script(folder: Path) -> Project:
    """`script("scripts/demo", "--json", **environment)` runs it, from another folder, without any standard input."""

    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [folder / name, *arguments],
            cwd=folder.parent,
            env={"PATH": str(folder / "bin"), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=50,
        )

    return run


def add_python(folder: Path, name: str, site: str = "") -> Path:
    """A `name` on PATH that is this interpreter, after it ran `site`."""
    customised = folder / f"site-{name}"
    customised.mkdir()
    (customised / "sitecustomize.py").write_text(site)
    program = folder / "bin" / name
    program.write_text(f'#!/usr/bin/env bash\nPYTHONPATH="{customised}" exec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    return program


def add_fake_python(folder: Path, name: str = "python3") -> None:
    program = folder / "bin" / name
    program.write_text(FAKE_PYTHON)
    program.chmod(0o755)


def refusal(done: subprocess.CompletedProcess[str], name: str) -> str:
    """What the script said after its own name, once it has been seen to refuse properly."""
    assert done.returncode == 1
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if "setting up" not in line]
    assert len(said) == 1
    assert said[0].startswith(f"{name}: ")
    return said[0].removeprefix(f"{name}: ")


@pytest.mark.parametrize("name", ["scripts/demo", "scripts/test"])
class TestRefusals:
    def test_no_python(self, name: str, script: Project) -> None:
        assert refusal(script(name), name) == (
            "there is no python3; Python 3.11 or newer is needed: install it (on Debian and Ubuntu: "
            "apt install python3 python3-venv) or name one with PYTHON=/path/to/python3"
        )

    def test_old_python(self, name: str, script: Project, folder: Path) -> None:
        old = add_python(folder, "python3", OLD_PYTHON)
        said = refusal(script(name), name)
        assert said.startswith(f"{old} is Python 3.9 and 3.11 or newer is needed: install it")

    def test_no_venv_module(self, name: str, script: Project, folder: Path) -> None:
        bare = add_python(folder, "python3", BARE_PYTHON)
        said = refusal(script(name), name)
        assert said.startswith(
            f"{bare} has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)"
        )

    def test_a_newer_python_without_venv_is_the_nearer_miss(
        self, name: str, script: Project, folder: Path
    ) -> None:
        add_python(folder, "python3", OLD_PYTHON)
        bare = add_python(folder, "python3.12", BARE_PYTHON)
        assert refusal(script(name), name).startswith(f"{bare} has no venv module")

    def test_a_python_that_was_named_and_is_not_there(self, name: str, script: Project, folder: Path) -> None:
        add_fake_python(folder)  # it is PYTHON that counts
        said = refusal(script(name, PYTHON="/no/such/python"), name)
        assert said == "PYTHON=/no/such/python is no program that can be run; name a Python 3.11 or newer"

    def test_no_package_index(self, name: str, script: Project, folder: Path) -> None:
        add_fake_python(folder)
        (folder / "no-index").touch()
        done = script(name)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "noise of pip" in done.stderr
        assert "could not install" in done.stderr.splitlines()[-1]
        (folder / "no-index").unlink()  # and the next try is not taken for done
        assert "pytest" in script(name, "pytest").stdout or name == "scripts/test"
        assert len((folder / "pip.log").read_text().splitlines()) == 2


def test_the_first_python_that_will_do_is_taken(script: Project, folder: Path) -> None:
    add_python(folder, "python3", OLD_PYTHON)
    add_fake_python(folder, "python3.12")
    assert script("scripts/demo", "--json").stdout == "demo\n--json\n"


def test_demo_writes_nothing_of_its_own_to_stdout(script: Project, folder: Path) -> None:
    add_fake_python(folder)
    assert script("scripts/demo", "--json", "two words").stdout == "demo\n--json\ntwo words\n"


def test_installed_once_until_the_metadata_changes(script: Project, folder: Path) -> None:
    add_fake_python(folder)
    log = folder / "pip.log"
    for _ in range(2):
        assert script("scripts/demo").stderr in (
            "",
            "scripts/demo: setting up .venv (once; needs the Python package index)\nnoise of pip\n",
        )
    assert [line.split("--editable ")[1] for line in log.read_text().splitlines()] == ["."]
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n")
    script("scripts/demo")
    assert len(log.read_text().splitlines()) == 2
    assert script("scripts/demo").stderr == ""


def test_either_script_first(script: Project, folder: Path) -> None:
    add_fake_python(folder)
    for name in ("demo", "test", "demo", "test"):
        script(f"scripts/{name}")
    installed = [line.split("--editable ")[1] for line in (folder / "pip.log").read_text().splitlines()]
    assert installed == [".", ".[dev]"]
    (folder / "vmm/__init__.py").write_text("__version__ = '9'\n")
    script("scripts/demo")  # renews a dev environment as one
    assert (folder / "pip.log").read_text().splitlines()[-1].endswith("--editable .[dev]")


def test_a_folder_that_was_moved_gets_a_new_environment(script: Project, folder: Path) -> None:
    add_fake_python(folder)
    script("scripts/demo")
    (folder / ".venv/old").touch()
    (folder / ".venv/made-in").write_text("/elsewhere\n")
    (folder / ".venv/installed-run").write_text("of elsewhere\n")
    assert script("scripts/demo").returncode == 0
    assert not (folder / ".venv/old").exists()


def fake_checks(folder: Path, failing: tuple[str, ...] = ()) -> None:
    """The static checks as programs that pass or fail in the fake environment."""
    for tool in ("ruff", "mypy", "lint-imports"):
        program = folder / ".venv/bin" / tool
        program.write_text(f"#!/usr/bin/env bash\necho {tool} ran\nexit {int(tool in failing)}\n")
        program.chmod(0o755)


def test_all_failing_checks_are_named_and_the_tests_do_not_start(script: Project, folder: Path) -> None:
    add_fake_python(folder)
    script("scripts/demo")
    script("scripts/test")
    fake_checks(folder, failing=("ruff", "lint-imports"))
    done = script("scripts/test")
    assert done.returncode == 1
    assert "mypy ran" in done.stdout
    assert "pytest" not in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "scripts/test: failed: ruff check, ruff format --check, lint-imports; see above. The tests were not run."
    )


def test_pytest_comes_last_and_gets_the_arguments(script: Project, folder: Path) -> None:
    add_fake_python(folder)
    script("scripts/test")
    fake_checks(folder)
    done = script("scripts/test", "-k", "two words")
    assert done.stdout.splitlines()[-1] == "pytest got: -k two words"
    assert done.returncode == 0


def test_ci_requires_kvm_where_there_is_one(script: Project, folder: Path) -> None:
    add_fake_python(folder)
    script("scripts/test")
    fake_checks(folder)
    done = script(".ci/run")
    if os.path.exists("/dev/kvm"):
        assert "KVM required: 1, CI: true" in done.stdout
        assert done.stderr == ""
    else:
        assert "KVM required: no, CI: true" in done.stdout
        assert "EVERY TEST THAT NEEDS KVM IS SKIPPED" in done.stderr
    fake_checks(folder, failing=("mypy",))
    assert script(".ci/run").returncode == 1
