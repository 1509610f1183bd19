"""Bad input to every verb, each by its sentence and exit status, before any VM exists; and how words
become arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import vmm.process
from vmm.cli import main
from vmm.cli.ctl import command_arguments
from vmm.errors import UsageError
from vmm.machine.config import MachineConfig, differences
from vmm.process import Options
from vmm.units import MIB

LONG = "x" * 120


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_socket_dir: Path) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_socket_dir))
    return tmp_socket_dir


def fails(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """The one sentence of a command line that must not work."""
    assert main(list(words)) == status
    said = capsys.readouterr()
    assert said.out == ""
    (sentence,) = said.err.splitlines()
    assert sentence.startswith("vmm: ")
    return sentence


CONFIG = {
    "a value of the wrong type": ('cpus = "two"', "expected `int`, got `str`"),
    "a name of the wrong type": ("name = 5", "expected `str | null`, got `int` - at `$.name`"),
    "a serial line of the wrong type": ("serial = 5", "expected `str`, got `int` - at `$.serial`"),
    "a serial line of a VM with a name": ('name = "a"\nserial = 5', "expected `str`, got `int`"),
    "a key that is none": ("colour = 3", "unknown field `colour`"),
    "no TOML": ("cpus = = 2", "not a TOML file"),
    "no UTF-8": (b"\xff\xfe", "not a TOML file"),
    "a bad size": ('memory = "12X"', "'12X' is not a size"),
    "too little memory": ('memory = "4K"', "memory"),
    "too many vCPUs": ("cpus = 1000", "cpus: 1000 is outside"),
    "a bad name": ('name = "a/b"', "'a/b' is not a VM name"),
    "a bad serial line": ('serial = "telephone"', "'telephone' is not a character device"),
    "a bad page size": ('hugepages = "3M"', "hugepages: '3M' is not a page size"),
    "a bad interrupt controller": ('irqchip = "none"\ncpus = 2', "irqchip: 'none'"),
    "an orphan timeout that no poll can wait for": ("orphan_timeout = 1209600", "orphan timeout: 1.2096e"),
    "a negative orphan timeout": ("orphan_timeout = -1", "orphan timeout: -1 s"),
    "an orphan timeout that is no number": ("orphan_timeout = nan", "orphan timeout: nan s"),
    "an orphan timeout of nearly nothing": ("orphan_timeout = 0.0001", "orphan timeout: 0.0001 s"),
    "a long command line": (f'append = "{"a" * 5000}"', "append"),
}


INCOMING = (
    "--incoming=unix:/no/main",
    "--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path=/no/cpr",
)


@pytest.mark.parametrize("more", [("ticker",), INCOMING], ids=["a new guest", "one that is handed over"])
@pytest.mark.parametrize("case", CONFIG)
def test_configuration_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str, more: tuple[str, ...]
) -> None:
    content, expected = CONFIG[case]
    path = tmp_path / "vm.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in fails(capsys, 4, "run", str(path), *more)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """What VMM processes would be started with."""
    seen: list[Options] = []

    class NoProcess:
        def __init__(self, options: Options) -> None:
            seen.append(options)

        def run(self) -> int:
            return 0

    monkeypatch.setattr(vmm.process, "VmmProcess", NoProcess)
    return seen


def test_a_configuration_file_is_compared_with_the_machine_that_comes(
    options: list[Options], tmp_path: Path, runtime: Path
) -> None:
    path = tmp_path / "vm.toml"
    path.write_text('name = "one"\nkernel = "ticker"\nmemory = "64M"\nserial = "unix"\nkeeper = false\n')
    assert main(["run", str(path), *INCOMING]) == 0
    [started] = options
    assert started.keeper is False
    console = f"unix:{runtime}/vmm/one/console.sock"
    machine = MachineConfig(name="one", kernel="ticker", memory=64 * MIB, serial=console, cpus=2)
    assert differences(started.given, machine) == []
    assert differences(started.given, msgspec.structs.replace(machine, memory=32 * MIB)) == [
        f"memory: {64 * MIB} was given here, the running machine has {32 * MIB}"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["CONFIG", "hello64", "--cpus=3"],
        ["CONFIG", "--cpus=3", "hello64"],
        ["CONFIG", "--cpus", "3", "hello64"],
        ["--cpus=3", "CONFIG", "--serial=null", "hello64"],
    ],
)
def test_options_may_stand_between_file_and_kernel(
    options: list[Options], tmp_path: Path, words: list[str]
) -> None:
    path = tmp_path / "vm.toml"
    path.write_text('kernel = "ticker"\nmemory = "64M"\ncpus = 2\n')
    assert main(["run", *(str(path) if word == "CONFIG" else word for word in words)]) == 0
    [started] = options
    assert started.given["kernel"] == "hello64"
    assert (started.given["cpus"], started.given["memory"]) == (3, 64 * MIB)


def test_a_configuration_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/no/such.toml: cannot read the configuration" in fails(capsys, 4, "run", "/no/such.toml")


OPTIONS: dict[str, tuple[list[str], int, str]] = {
    "memory in words": (["ticker", "--memory=much"], 4, "--memory: 'much' is not a size"),
    "no memory": (["ticker", "--memory=0"], 4, "memory"),
    "memory that is too much": (["ticker", "--memory=900000G"], 4, "memory"),
    "negative vCPUs": (["ticker", "--cpus=-1"], 4, "cpus: -1 is outside"),
    "a name with a slash": (["ticker", "--name=../x"], 4, "'../x' is not a VM name"),
    "an empty name": (["ticker", "--name="], 4, "'' is not a VM name"),
    "a TCP monitor": (["ticker", "--qmp=tcp:1234"], 2, "only unix:PATH"),
    "a long monitor path": (
        ["ticker", "--serial=null", f"--qmp=unix:/tmp/{LONG}"],
        4,
        "a socket address holds 1 to 107",
    ),
    "two kernels": (["ticker", "hello64"], 2, "one kernel at most"),
    "two kernels with an option between": (["ticker", "--cpus=1", "hello64"], 2, "one kernel at most"),
    "only one channel": (["--incoming=unix:/tmp/m"], 4, "missing 'cpr' channel"),
    "only the other": (
        ["--incoming=cpr,addr.transport=socket,addr.type=unix,addr.path=/tmp/c"],
        4,
        "missing 'main' channel",
    ),
    "a channel twice": (
        ["--incoming=unix:/tmp/m", "--incoming=unix:/tmp/n"],
        2,
        "more than one main channel",
    ),
    "a TCP channel": (["--incoming=tcp:localhost:1"], 2, "must be unix"),
    "an unknown protocol": (["--incoming=pigeon:1"], 2, "unknown migration protocol"),
    "deferred": (["--incoming=defer"], 2, "defer"),
    "bad JSON": (['--incoming={"channel-type":'], 2, "--incoming"),
    "a channel without an address": (['--incoming={"channel-type": "main"}'], 2, "addr"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_run(capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, status, expected = OPTIONS[case]
    sentence = fails(capsys, status, "run", *words)
    assert expected in sentence


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "ticker", "--cpus=two"], "invalid int value"),
        (["run", "ticker", "--irqchip=abacus"], "invalid choice"),
        (["run", "ticker", "--entry-mode=sideways"], "invalid choice"),
        (["run", "ticker", "--cpsu", "2"], "unrecognized arguments: --cpsu 2"),
        (["list", "one"], "unrecognized arguments: one"),
        (["fly"], "invalid choice"),
        ([], "required"),
        (["demo", "--guest=windows"], "invalid choice"),
        (["handover", "one", "--timeout=soon"], "invalid float value"),
        (["demo", "--timeout=soon"], "invalid float value"),
    ],
)
def test_what_argparse_refuses(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert expected in said.err


@pytest.mark.parametrize("verb", ["handover", "ctl"])
def test_a_vm_is_meant_in_one_way(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    command = ["query-status"] if verb == "ctl" else []
    assert "no VM named 'one' runs (running: none)" in fails(capsys, 2, verb, "one", *command)
    assert "is the VMM running?" in fails(capsys, 10, verb, "--qmp=/no/such.sock", *command)


def test_handover_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "say which VM is meant" in fails(capsys, 2, "handover")
    assert "say which VM is meant" in fails(capsys, 2, "handover", "one", "--qmp=/tmp/q")


def test_no_vms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert main(["list", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_a_runtime_directory_that_others_can_enter(capsys: pytest.CaptureFixture[str], runtime: Path) -> None:
    (runtime / "vmm").mkdir(mode=0o755)
    (runtime / "vmm").chmod(0o755)
    assert "is not a private directory" in fails(capsys, 6, "list")


def test_help_imports_little(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "handover" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["mode=cpr-transfer"], {"mode": "cpr-transfer"}),
        (["a=1", "b=true", "c=null", "d=1.5"], {"a": 1, "b": True, "c": None, "d": 1.5}),
        (["gpa=0x200000", "size=16"], {"gpa": 0x200000, "size": 16}),
        (["path=a=b"], {"path": "a=b"}),
        (["text="], {"text": ""}),
        (['list=[1, {"a": 2}]'], {"list": [1, {"a": 2}]}),
        (['text="1"'], {"text": "1"}),
        (['{"a": 1,', '"b": 2}'], {"a": 1, "b": 2}),
    ],
)
def test_command_arguments(words: list[str], expected: dict[str, Any] | None) -> None:
    assert command_arguments(words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cpr-transfer"], "'cpr-transfer' is not KEY=VALUE"),
        (["=1"], "'=1' is not KEY=VALUE"),
        (["a=1", "a=2"], "'a' was given twice"),
        (["{'a': 1}"], "not a JSON object"),
        (["{} x=1"], "not a JSON object"),
    ],
)
def test_bad_command_arguments(words: list[str], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        command_arguments(words)
