"""What `migrate`, `migrate-incoming` and `--incoming` may be told, in QEMU 10.0.2's sentences."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.qmp.backend import QmpError
from vmm.qmp.channels import Channels, parse_incoming, parse_uri, select_channels, select_incoming
from vmm.qmp.schema import (
    ChannelType,
    ExecCommand,
    FdSocket,
    FileTarget,
    InetSocket,
    MigrateArguments,
    MigrateIncomingArguments,
    MigrationChannel,
    MigrationMode,
    RdmaAddress,
    UnixSocket,
    VsockSocket,
)
from vmm.qmp.visitor import read_arguments

CPR_TRANSFER = MigrationMode.CPR_TRANSFER


def channel(kind: Any, **addr: Any) -> dict[str, Any]:
    return {"channel-type": kind, "addr": addr}


def unix(kind: str, path: str) -> dict[str, Any]:
    return channel(kind, transport="socket", type="unix", path=path)


MAIN = unix("main", "main.sock")
CPR = unix("cpr", "cpr.sock")
EITHER = "need either 'uri' or 'channels' argument"


def select(arguments: dict[str, Any], mode: MigrationMode = CPR_TRANSFER) -> Channels:
    return select_channels(mode, read_arguments(MigrateArguments, arguments))


@pytest.mark.parametrize("channels", [[MAIN, CPR], [CPR, MAIN]])
def test_main_and_cpr_in_any_order(channels: list[Any]) -> None:
    expected = Channels(main=UnixSocket(path="main.sock"), cpr=UnixSocket(path="cpr.sock"))
    assert select({"channels": channels}) == expected
    assert select({"channels": channels, "detach": True, "resume": False}) == expected


def with_main(**addr: Any) -> dict[str, Any]:
    return {"channels": [channel("main", **addr), CPR]}


def with_cpr(**addr: Any) -> dict[str, Any]:
    return {"channels": [MAIN, channel("cpr", **addr)]}


REFUSED = [
    ({}, EITHER),
    ({"channels": []}, EITHER),
    ({"uri": "unix:main.sock", "channels": [MAIN, CPR]}, EITHER),
    ({"uri": "unix:main.sock", "channels": []}, "missing 'cpr' migration channel"),
    ({"uri": "unix:main.sock"}, "missing 'cpr' migration channel"),
    ({"channels": [MAIN]}, "missing 'cpr' migration channel"),
    ({"channels": [CPR]}, "missing 'main' migration channel"),  # QEMU: SIGSEGV
    ({"channels": [MAIN, MAIN]}, "Channel list has more than one main entry"),
    ({"channels": [MAIN, CPR, CPR]}, "Channel list has more than one cpr entry"),
    ({"channels": [CPR, CPR]}, "Channel list has more than one cpr entry"),
    ({"channels": [MAIN, CPR], "resume": True}, "Cannot resume if there is no paused migration"),
    ({"uri": "bogus"}, "unknown migration protocol: bogus"),
    ({"uri": "bogus:x"}, "unknown migration protocol: bogus:x"),
    ({"uri": "defer"}, "unknown migration protocol: defer"),
    ({"uri": ""}, "unknown migration protocol: "),
    ({"uri": "unix:"}, "invalid Unix socket address"),
    ({"uri": "tcp:foo"}, "error parsing address 'foo'"),
    ({"uri": "vsock:1"}, "error parsing address '1'"),
    (
        with_cpr(transport="socket", type="inet", host="127.0.0.1", port="1"),
        "bad cpr channel address; must be unix",
    ),
    (with_cpr(transport="exec", args=["/bin/cat"]), "bad cpr channel address; must be unix"),
    (with_cpr(transport="file", filename="x", offset=0), "bad cpr channel address; must be unix"),
    (
        with_main(transport="file", filename="x", offset=0),
        "Migration requires streamable transport (eg unix)",
    ),
    # The rest QEMU takes: its main channel may go anywhere, ours stays on the host.
    (
        with_main(transport="socket", type="inet", host="h", port="1"),
        "bad main channel address; must be unix",
    ),
    (with_main(transport="rdma", host="h", port="1"), "bad main channel address; must be unix"),
    (
        with_main(transport="socket", type="unix", path="x", abstract=True),
        "bad main channel address; must be the path of a UNIX socket",
    ),
    (
        with_cpr(transport="socket", type="unix", path=""),
        "bad cpr channel address; must be the path of a UNIX socket",
    ),
    (
        with_cpr(transport="socket", type="unix", path="a\0b"),
        "bad cpr channel address; must be the path of a UNIX socket",
    ),
    (
        with_cpr(transport="socket", type="unix", path="é" * 54),
        f"UNIX socket path '{'é' * 54}' is too long: it must be less than 108 bytes",
    ),
]

SHAPES = [
    ({"channels": 1}, "Invalid parameter type for 'channels', expected: array"),
    ({"channels": {}}, "Invalid parameter type for 'channels', expected: array"),
    ({"channels": [1]}, "Invalid parameter type for 'channels[0]', expected: object"),
    ({"channels": [{}]}, "Parameter 'channels[0].channel-type' is missing"),
    ({"channels": [{"channel-type": "main"}]}, "Parameter 'channels[0].addr' is missing"),
    ({"channels": [MAIN, {"channel-type": "cpr"}]}, "Parameter 'channels[1].addr' is missing"),
    (
        {"channels": [{"channel-type": "main", "addr": 5}]},
        "Invalid parameter type for 'channels[0].addr', expected: object",
    ),
    (with_main(), "Parameter 'channels[0].addr.transport' is missing"),
    (with_main(transport="socket"), "Parameter 'channels[0].addr.type' is missing"),
    (with_main(transport="socket", type="unix"), "Parameter 'channels[0].addr.path' is missing"),
    (
        with_main(transport="socket", type="unix", path=5),
        "Invalid parameter type for 'channels[0].addr.path', expected: string",
    ),
    (
        with_main(transport="socket", type="unix", path="m", bogus=1),
        "Parameter 'channels[0].addr.bogus' is unexpected",
    ),
    (
        with_main(transport="socket", type="unix", path="m", abstract=1),
        "Invalid parameter type for 'channels[0].addr.abstract', expected: boolean",
    ),
    (with_main(transport="bogus"), "Parameter 'transport' does not accept value 'bogus'"),
    (with_main(transport=5), "Invalid parameter type for 'channels[0].addr.transport', expected: string"),
    (with_main(transport="socket", type="bogus"), "Parameter 'type' does not accept value 'bogus'"),
    (with_main(transport="socket", type="inet", host="x"), "Parameter 'channels[0].addr.port' is missing"),
    (
        with_main(transport="socket", type="inet", host="x", port=1),
        "Invalid parameter type for 'channels[0].addr.port', expected: string",
    ),
    (
        with_main(transport="socket", type="inet", host="x", port="1", to=70000),
        "Parameter 'to' expects uint16_t",
    ),
    (with_main(transport="socket", type="fd"), "Parameter 'channels[0].addr.str' is missing"),
    (with_main(transport="socket", type="vsock", cid="1"), "Parameter 'channels[0].addr.port' is missing"),
    (with_main(transport="exec"), "Parameter 'channels[0].addr.args' is missing"),
    (
        with_main(transport="exec", args=[5]),
        "Invalid parameter type for 'channels[0].addr.args[0]', expected: string",
    ),
    (with_main(transport="file", filename="x"), "Parameter 'channels[0].addr.offset' is missing"),
    (with_main(transport="unix", path="x"), "Parameter 'transport' does not accept value 'unix'"),
    (
        {"channels": [channel("bogus", transport="socket")]},
        "Parameter 'channel-type' does not accept value 'bogus'",
    ),
    ({"channels": [channel(5)]}, "Invalid parameter type for 'channels[0].channel-type', expected: string"),
    ({"channels": [{**MAIN, "bogus": 1}]}, "Parameter 'channels[0].bogus' is unexpected"),
    ({"uri": 5}, "Invalid parameter type for 'uri', expected: string"),
    ({"bogus": 1}, "Parameter 'bogus' is unexpected"),
    ({"uri": "unix:x", "resume": "yes"}, "Invalid parameter type for 'resume', expected: boolean"),
    ({"channels": [MAIN, CPR], "detach": "x"}, "Invalid parameter type for 'detach', expected: boolean"),
]


@pytest.mark.parametrize(("arguments", "desc"), REFUSED + SHAPES)
def test_migrate_refuses(arguments: dict[str, Any], desc: str) -> None:
    with pytest.raises(QmpError) as refusal:
        select(arguments)
    assert (refusal.value.desc, refusal.value.klass) == (desc, "GenericError")


def test_mode_normal_is_refused_with_the_way_out() -> None:
    with pytest.raises(QmpError) as refusal:
        select({"channels": [MAIN, CPR]}, MigrationMode.NORMAL)
    assert refusal.value.desc == (
        "Migration mode 'normal' is not supported by this VMM; "
        "set mode to cpr-transfer with migrate-set-parameters"
    )


@pytest.mark.parametrize("arguments", [{"uri": "unix:main.sock"}, {"channels": [MAIN]}])
def test_incoming_main(arguments: dict[str, Any]) -> None:
    assert select_incoming(read_arguments(MigrateIncomingArguments, arguments)) == UnixSocket(
        path="main.sock"
    )


ONE_MAIN = "Channel list must have only one entry, for type 'main'"


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({}, EITHER),
        ({"uri": "unix:x", "channels": [MAIN]}, EITHER),
        ({"channels": [MAIN, CPR]}, ONE_MAIN),
        ({"channels": [CPR]}, ONE_MAIN),
        ({"uri": "bogus"}, "unknown migration protocol: bogus"),
        ({"uri": "tcp:h:1"}, "bad main channel address; must be unix"),
        (
            {"uri": "unix:x", "exit-on-error": 1},
            "Invalid parameter type for 'exit-on-error', expected: boolean",
        ),
    ],
)
def test_migrate_incoming_refuses(arguments: dict[str, Any], desc: str) -> None:
    with pytest.raises(QmpError) as refusal:
        select_incoming(read_arguments(MigrateIncomingArguments, arguments))
    assert refusal.value.desc == desc


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("unix:/run/a:b", UnixSocket(path="/run/a:b")),
        ("tcp:host:4444", InetSocket(host="host", port="4444")),
        ("tcp::4444", InetSocket(host="", port="4444")),
        ("tcp:[::1]:4444", InetSocket(host="::1", port="4444")),
        ("vsock:3:4444", VsockSocket(cid="3", port="4444")),
        ("rdma:host:1", RdmaAddress(host="host", port="1")),
        ("fd:7", FdSocket(name="7")),
        ("exec:cat >x", ExecCommand(args=["/bin/sh", "-c", "cat >x"])),
        ("file:x.mig", FileTarget(filename="x.mig", offset=0)),
    ],
)
def test_uris(uri: str, address: object) -> None:
    assert parse_uri(uri) == address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defer", None),
        (
            "unix:main.sock",
            MigrationChannel(channel_type=ChannelType.MAIN, addr=UnixSocket(path="main.sock")),
        ),
        (
            "cpr,addr.transport=socket,addr.type=unix,addr.path=/run/a=b,,c",
            MigrationChannel(channel_type=ChannelType.CPR, addr=UnixSocket(path="/run/a=b,c")),
        ),
        (
            "channel-type=main,addr.transport=socket,addr.type=unix,addr.path=x,addr.abstract=on,addr.tight=off",
            MigrationChannel(
                channel_type=ChannelType.MAIN, addr=UnixSocket(path="x", abstract=True, tight=False)
            ),
        ),
        (
            "main,addr.transport=file,addr.filename=x,addr.offset=4096",
            MigrationChannel(channel_type=ChannelType.MAIN, addr=FileTarget(filename="x", offset=4096)),
        ),
        (
            '{"channel-type":"cpr","addr":{"transport":"socket","type":"unix","path":"cpr.sock"}}',
            MigrationChannel(channel_type=ChannelType.CPR, addr=UnixSocket(path="cpr.sock")),
        ),
    ],
)
def test_incoming_forms(text: str, expected: MigrationChannel | None) -> None:
    assert parse_incoming(text) == expected


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ('{"channel-type":"cpr"', "JSON parse error, premature EOI"),
        ('{"channel-type":"cpr"}', "Parameter 'addr' is missing"),
        ('{"channel-type":"bogus","addr":{}}', "Parameter 'channel-type' does not accept value 'bogus'"),
        ("{}", "Parameter 'channel-type' is missing"),
        ("bogus:1", "unknown migration protocol: bogus:1"),
        ("bogus", "Parameter 'channel-type' does not accept value 'bogus'"),
        ("", "Parameter 'channel-type' is missing"),
        ("cpr", "Parameter 'addr' is missing"),
        ("cpr,foo", "Expected '=' after parameter 'foo'"),
        ("cpr,addr.transport=socket,addr=x", "Parameters 'addr.*' used inconsistently"),
        ("cpr,addr=x,addr.transport=socket", "Parameters 'addr.*' used inconsistently"),
        (
            "main,addr.transport=socket,addr.type=unix,addr.path=x,addr.tight=perhaps",
            "Parameter 'addr.tight' expects 'on' or 'off'",
        ),
        (
            "main,addr.transport=file,addr.filename=x,addr.offset=" + "9" * 5000,
            "Parameter 'offset' expects uint64",
        ),
        ("main,addr.transport=file,addr.filename=x,addr.offset=x", "Parameter 'addr.offset' expects uint64"),
    ],
)
def test_incoming_refuses(text: str, desc: str) -> None:
    with pytest.raises(QmpError) as refusal:
        parse_incoming(text)
    assert refusal.value.desc == desc
