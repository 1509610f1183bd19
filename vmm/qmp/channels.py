"""Migration channels: their addresses as QEMU writes them, and what `migrate` and `--incoming` may be told.

Words only: nothing here may open, connect or look at anything, or ask which mode is set. The mode comes in as
an argument, and what was decided by it is acted on with the same value (QEMU's Coverity report CID 1590980
came of validating by one idea of the mode and acting on another).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from vmm.qmp.backend import QmpError
from vmm.qmp.framing import decode
from vmm.qmp.parser import JsonError
from vmm.qmp.schema import (
    Address,
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
from vmm.qmp.visitor import read_arguments, read_keyval
from vmm.sockets import PATH_BYTES


class Channels(NamedTuple):
    """Where an accepted `migrate` goes."""

    main: UnixSocket
    cpr: UnixSocket


def select_channels(mode: MigrationMode, arguments: MigrateArguments) -> Channels:
    """The channels of a `migrate` in `mode`, everything about their words checked. Raises QmpError.

    Where QEMU dies (no main channel) or has died (`uri` in this mode), this is an error like the others.
    """
    given = _given(arguments.uri, arguments.channels)
    if mode is not MigrationMode.CPR_TRANSFER:
        raise QmpError(
            f"Migration mode '{mode}' is not supported by this VMM; set mode to cpr-transfer with "
            "migrate-set-parameters"
        )
    main, cpr = given.get(ChannelType.MAIN), given.get(ChannelType.CPR)
    if isinstance(main, FileTarget):
        raise QmpError("Migration requires streamable transport (eg unix)")
    if cpr is None:
        raise QmpError("missing 'cpr' migration channel")
    if main is None:
        raise QmpError("missing 'main' migration channel")
    cpr_socket = unix_socket(cpr, ChannelType.CPR)
    main_socket = unix_socket(main, ChannelType.MAIN)
    if arguments.resume:
        raise QmpError("Cannot resume if there is no paused migration")
    return Channels(main_socket, cpr_socket)


def select_incoming(arguments: MigrateIncomingArguments) -> UnixSocket:
    """The main channel that `migrate-incoming` names. Raises QmpError."""
    channels = arguments.channels or []
    if len(channels) > 1 or any(each.channel_type is not ChannelType.MAIN for each in channels):
        raise QmpError("Channel list must have only one entry, for type 'main'")
    return unix_socket(_given(arguments.uri, channels)[ChannelType.MAIN], ChannelType.MAIN)


def _given(uri: str | None, channels: list[MigrationChannel] | None) -> dict[ChannelType, Address]:
    """By type. An empty list counts as absent, as it does in QEMU."""
    if (uri is None) == (not channels):
        raise QmpError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return {ChannelType.MAIN: parse_uri(uri)}
    given: dict[ChannelType, Address] = {}
    for channel in channels or []:
        if channel.channel_type in given:
            raise QmpError(f"Channel list has more than one {channel.channel_type} entry")
        given[channel.channel_type] = channel.addr
    return given


def unix_socket(address: Address, channel: ChannelType) -> UnixSocket:
    """`address` if it is a UNIX socket with a path: both VMMs are on one host. Raises QmpError."""
    if not isinstance(address, UnixSocket):
        raise QmpError(f"bad {channel} channel address; must be unix")
    path = address.path
    if address.abstract or not path or "\0" in path:
        raise QmpError(f"bad {channel} channel address; must be the path of a UNIX socket")
    if len(path.encode()) >= PATH_BYTES:
        raise QmpError(f"UNIX socket path '{path}' is too long: it must be less than {PATH_BYTES} bytes")
    return address


def parse_uri(uri: str) -> Address:
    """A migration URI such as `unix:PATH` or `tcp:HOST:PORT`. Raises QmpError."""
    scheme, colon, rest = uri.partition(":")
    if not colon or scheme not in _SCHEMES:
        raise QmpError(f"unknown migration protocol: {uri}")
    return _SCHEMES[scheme](rest)


def _unix(rest: str) -> Address:
    if not rest:
        raise QmpError("invalid Unix socket address")
    return UnixSocket(path=rest)


def _host_and_port(rest: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\[[^\]]+\]|[^:]*):([^:,]+)", rest)
    if match is None:
        raise QmpError(f"error parsing address '{rest}'")
    return match[1].strip("[]"), match[2]


def _tcp(rest: str) -> Address:
    host, port = _host_and_port(rest)
    return InetSocket(host=host, port=port)


def _vsock(rest: str) -> Address:
    cid, port = _host_and_port(rest)
    return VsockSocket(cid=cid, port=port)


def _rdma(rest: str) -> Address:
    host, port = _host_and_port(rest)
    return RdmaAddress(host=host, port=port)


def _file(rest: str) -> Address:
    return FileTarget(filename=rest, offset=0)


def _fd(rest: str) -> Address:
    return FdSocket(name=rest)


def _exec(rest: str) -> Address:
    return ExecCommand(args=["/bin/sh", "-c", rest])


_SCHEMES: dict[str, Callable[[str], Address]] = {
    "unix": _unix,
    "tcp": _tcp,
    "vsock": _vsock,
    "fd": _fd,
    "exec": _exec,
    "rdma": _rdma,
    "file": _file,
}

_URI = re.compile(r"[a-z]+:")
_KEYVAL_PART = re.compile(r"((?:[^,]|,,)*)(?:,(?!,)|$)")


def parse_incoming(text: str) -> MigrationChannel | None:
    """An `--incoming` argument in any of QEMU's forms; None for `defer`. Raises QmpError.

    A URI such as `unix:PATH` stands for the main channel; either channel may be JSON, as in `channels` of
    `migrate`, or keys and values: `cpr,addr.transport=socket,addr.type=unix,addr.path=PATH`.
    """
    if text == "defer":
        return None
    if _URI.match(text):
        return MigrationChannel(channel_type=ChannelType.MAIN, addr=parse_uri(text))
    if not text.startswith("{"):
        return read_keyval(MigrationChannel, _keyval(text))
    try:
        value = decode(text.encode())
    except JsonError as error:
        raise QmpError(str(error)) from None
    return read_arguments(MigrationChannel, value)


def _keyval(text: str) -> dict[str, Any]:
    """`a,b.c=d` as `{"channel-type": "a", "b": {"c": "d"}}`; two commas in a value are one."""
    tree: dict[str, Any] = {}
    position = 0
    while position < len(text):
        match = _KEYVAL_PART.match(text, position)
        assert match is not None
        key, equals, value = match[1].replace(",,", ",").partition("=")
        if not equals:
            if position:
                raise QmpError(f"Expected '=' after parameter '{key}'")
            key, value = "channel-type", key
        position = match.end()
        *branches, leaf = key.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise QmpError(f"Parameters '{branch}.*' used inconsistently")
        if isinstance(node.get(leaf), dict):
            raise QmpError(f"Parameters '{leaf}.*' used inconsistently")
        node[leaf] = value
    return tree
