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
COPIED = (
    ".ci/run",
    "pyproject.toml",
    "scripts/demo",
    "scripts/fuzz",
    "scripts/lib-venv.sh",
    "scripts/test",
    "vmm/__init__.py",
)
PROGRAMS = ("bash", "cat", "chmod", "cp", "cut", "dirname", "env", "flock", "mkdir", "rm", "sed", "sha256sum")
NO_KVM = "/dev/kvm does not exist; run `modprobe kvm_intel`"  # as tests.host says it
SETTING_UP = "scripts/demo: setting up .venv (once; needs the Python package index)"
OLD_PYTHON = "import sys; sys.version_info = (3, 9, 2, 'final', 0)"
BARE_PYTHON = "import sys; sys.modules['ensurepip'] = None"  # as Debian has it without python3-venv

# Stands in for an interpreter with pip, so that no test needs a package index: `-m venv` makes a folder with
# itself in it, `-m pip` writes down what it was asked, `-m pytest` says how it was called, `-m tests.host`
# what stands in the file no-kvm.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
*"-m venv"*) for folder; do :; done; rm -rf "$folder"; mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
    printf '#!/usr/bin/env bash\\nprintf "%%s\\\\n" "$@"\\n' >"$folder/bin/vmm"; chmod +x "$folder/bin/vmm" ;;
*"-m pip"*) echo "noise of pip"; printf '%s\\n' "$*" >>pip.log; [ ! -e no-index ] ;;
*"import atheris"*) ;;
*"-m tests.host"*) if [ -e no-kvm ]; then cat no-kvm >&2; exit 1; fi ;;
*"-m tests.fuzz"*) shift 2; echo "fuzz got: $*" ;;
*"-m pytest"*) shift 2; echo "CI: ${{CI:-no}}, KVM required: ${{VMM_REQUIRE_KVM:-no}}"
    echo "pytest got: $*" ;;
*) exec {sys.executable} "$@" ;;
esac
"""

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what the scripts look at, and `bin`, the only folder on PATH."""
    folder = tmp_path / "pro ject"  # with a space, as folders may have
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    for program in PROGRAMS:
        found = shutil.which(program)
        assert found, f"{program} is not installed"
        (folder / "bin" / program).symlink_to(found)
    return folder


@pytest.fixture
def script(folder: Path) -> Script:
    """`script("scripts/demo", "--json", **environment)` runs it, from elsewhere, with no standard input."""

    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [folder / name, *arguments],
            check=False,
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


def installed(folder: Path) -> list[str]:
    """What pip was asked to install, in order."""
    return [line.split("--editable ")[1] for line in (folder / "pip.log").read_text().splitlines()]


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
    def test_no_python(self, name: str, script: Script) -> None:
        assert refusal(script(name), name) == (
            "there is no python3; Python 3.11 or newer is needed: install it (on Debian and Ubuntu: "
            "apt install python3 python3-venv) or name one with PYTHON=/path/to/python3"
        )

    def test_old_python(self, name: str, script: Script, folder: Path) -> None:
        old = add_python(folder, "python3", OLD_PYTHON)
        said = refusal(script(name), name)
        assert said.startswith(f"{old} is Python 3.9 and 3.11 or newer is needed: install it")

    def test_no_venv_module(self, name: str, script: Script, folder: Path) -> None:
        bare = add_python(folder, "python3", BARE_PYTHON)
        said = refusal(script(name), name)
        assert said == (
            f"{bare} has no venv module: install it (on Debian and Ubuntu: apt install python3-venv) "
            "or name another Python with PYTHON=/path/to/python3"
        )

    def test_new_without_venv_is_nearer_than_old(self, name: str, script: Script, folder: Path) -> None:
        add_python(folder, "python3", OLD_PYTHON)
        bare = add_python(folder, "python3.12", BARE_PYTHON)
        assert refusal(script(name), name).startswith(f"{bare} has no venv module")

    def test_a_python_that_was_named_and_is_not_there(self, name: str, script: Script, folder: Path) -> None:
        add_fake_python(folder)  # it is PYTHON that counts
        said = refusal(script(name, PYTHON="/no/such/python"), name)
        assert said == "PYTHON=/no/such/python is no program that can be run; name a Python 3.11 or newer"

    def test_no_package_index(self, name: str, script: Script, folder: Path) -> None:
        add_fake_python(folder)
        (folder / "no-index").touch()
        done = script(name)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "noise of pip" in done.stderr
        assert "could not install" in done.stderr.splitlines()[-1]
        script(name)  # a failed set-up is not taken for done
        assert installed(folder) == [{"scripts/demo": ".", "scripts/test": ".[dev]"}[name]] * 2


def test_the_first_python_that_will_do_is_taken(script: Script, folder: Path) -> None:
    add_python(folder, "python3", OLD_PYTHON)
    add_fake_python(folder, "python3.12")
    assert script("scripts/demo", "--json").stdout == "demo\n--json\n"


def test_demo_writes_nothing_of_its_own_to_stdout(script: Script, folder: Path) -> None:
    add_fake_python(folder)
    assert script("scripts/demo", "--json", "two words").stdout == "demo\n--json\ntwo words\n"


def test_installed_once_until_the_metadata_changes(script: Script, folder: Path) -> None:
    add_fake_python(folder)
    assert script("scripts/demo").stderr.splitlines() == [SETTING_UP, "noise of pip"]
    assert script("scripts/demo").stderr == ""
    assert installed(folder) == ["."]
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n")
    script("scripts/demo")
    assert installed(folder) == [".", "."]
    assert script("scripts/demo").stderr == ""


def test_either_script_first(script: Script, folder: Path) -> None:
    add_fake_python(folder)
    for name in ("demo", "test", "demo", "test"):
        script(f"scripts/{name}")
    assert installed(folder) == [".", ".[dev]"]
    (folder / "vmm/__init__.py").write_text("__version__ = '9'\n")
    script("scripts/demo")
    assert installed(folder) == [".", ".[dev]", ".[dev]"]  # a dev environment stays one


def test_a_folder_that_was_moved_gets_a_new_environment(script: Script, folder: Path) -> None:
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


def test_all_failing_checks_are_named_and_the_tests_do_not_start(script: Script, folder: Path) -> None:
    add_fake_python(folder)
    script("scripts/demo")
    script("scripts/test")
    fake_checks(folder, failing=("ruff", "lint-imports"))
    done = script("scripts/test")
    assert done.returncode == 1
    assert "mypy ran" in done.stdout
    assert "pytest" not in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "scripts/test: failed: ruff check, ruff format --check, lint-imports; see above. "
        "The tests were not run."
    )


def test_pytest_comes_last_and_gets_the_arguments(script: Script, folder: Path) -> None:
    add_fake_python(folder)
    script("scripts/test")
    fake_checks(folder)
    done = script("scripts/test", "-k", "two words")
    assert done.stdout.splitlines()[-1] == "pytest got: -k two words"
    assert done.returncode == 0
    done = script("scripts/test")
    assert done.stdout.splitlines()[-1] == "pytest got: -n auto --maxprocesses 4 --dist worksteal"


def test_a_kvm_that_is_required_and_lacks_something(script: Script, folder: Path) -> None:
    add_fake_python(folder)
    script("scripts/test")
    (folder / "no-kvm").write_text(f"{NO_KVM}\n")
    assert refusal(script("scripts/test", VMM_REQUIRE_KVM="1"), "scripts/test") == NO_KVM


@pytest.mark.parametrize("required", ["", "0"])
def test_without_kvm_the_others_are_tested(script: Script, folder: Path, required: str) -> None:
    add_fake_python(folder)
    script("scripts/test")
    fake_checks(folder)
    (folder / "no-kvm").write_text(f"{NO_KVM}\n")
    done = script("scripts/test", "-k", "token", VMM_REQUIRE_KVM=required)
    assert done.stderr == f"scripts/test: {NO_KVM}\n"
    assert done.stdout.splitlines()[-1] == "pytest got: -k token"
    assert done.returncode == 0


def test_ci_requires_kvm_where_there_is_one(script: Script, folder: Path) -> None:
    add_fake_python(folder)
    script("scripts/test")
    fake_checks(folder)
    done = script(".ci/run")
    if os.path.exists("/dev/kvm"):
        assert "CI: true, KVM required: 1" in done.stdout
        assert done.stderr == ""
    else:
        assert "CI: true, KVM required: no" in done.stdout
        assert "EVERY TEST THAT NEEDS KVM IS SKIPPED" in done.stderr
    assert done.stdout.splitlines()[0] == "fuzz got: all --seconds 60"
    fake_checks(folder, failing=("mypy",))
    assert script(".ci/run").returncode == 1
