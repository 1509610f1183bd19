"""One client's conversation, without its socket: negotiation, ids, dispatch, and errors as QEMU words them.

Requests in, replies out, both as bytes; each `next_reply` runs at most one command. A session can be exported
at any point between two calls and go on in another process. It must never let an exception of a command out:
a client's request is answered, whatever happens.

        .-- any other command: CommandNotFound
        v  |
  NEGOTIATING --- qmp_capabilities ---> COMMANDS --- qmp_capabilities: CommandNotFound --.
                                           ^                                             |
                                           '---------------------------------------------'
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import msgspec

from vmm.errors import VmmError
from vmm.qmp.backend import Backend, QmpError
from vmm.qmp.commands import COMMANDS, Command, version
from vmm.qmp.framing import JsonStream, Limits, StreamState
from vmm.qmp.parser import JsonError
from vmm.qmp.schema import NoArguments, QmpCapabilitiesArguments, QmpCapability
from vmm.qmp.visitor import read_arguments

log = logging.getLogger(__name__)


class SessionState(msgspec.Struct, frozen=True, kw_only=True):
    """A session on its way to another process; msgspec can write it."""

    negotiated: bool = False
    oob: bool = False
    stream: StreamState = StreamState()


def encode(message: dict[str, Any]) -> bytes:
    """A message as it goes on the wire, ended as QEMU's are."""
    return msgspec.json.encode(message) + b"\r\n"


class Session:
    """Feed it what the client sends; call `next_reply` until that gives None."""

    def __init__(
        self,
        backend: Backend,
        commands: Iterable[Command] = COMMANDS,
        limits: Limits = Limits(),  # noqa: B008 — immutable
        state: SessionState = SessionState(),  # noqa: B008 — immutable
    ) -> None:
        self._backend = backend
        self._commands = {command.name: command for command in commands}
        self._negotiated = state.negotiated
        self._oob = state.oob
        self._stream = JsonStream(limits, state.stream)

    @property
    def negotiated(self) -> bool:
        """Whether the client has negotiated, and so is sent events."""
        return self._negotiated

    @property
    def has_input(self) -> bool:
        """Whether `next_reply` has something to look at."""
        return self._stream.has_input

    def greeting(self) -> bytes:
        """What a server says first."""
        return encode({"QMP": {"version": version(), "capabilities": list(QmpCapability)}})

    def feed(self, data: bytes) -> None:
        """Take what the client sent."""
        self._stream.feed(data)

    def next_reply(self) -> bytes | None:
        """Carry out the next request and give its reply; None where more input is needed."""
        for item in self._stream:
            return self._answer(item)
        return None

    def export(self) -> SessionState:
        """What `Session(state=…)` needs to go on from here."""
        return SessionState(negotiated=self._negotiated, oob=self._oob, stream=self._stream.export())

    def _answer(self, item: Any) -> bytes:
        ident = {"id": item["id"]} if isinstance(item, dict) and "id" in item else {}
        try:
            result = self._execute(item)
            return encode({"return": {} if result is None else result, **ident})
        except QmpError as error:
            klass, desc = error.klass, error.desc
        except VmmError as error:
            klass, desc = "GenericError", str(error)
        except Exception as error:
            log.exception("QMP: a command failed in a way it must not")
            klass, desc = "GenericError", f"internal error, see the log: {type(error).__name__}: {error}"
        return encode({**ident, "error": {"class": klass, "desc": desc}})

    def _execute(self, item: Any) -> object:
        name, arguments, oob = self._request(item)
        if name == "qmp_capabilities":
            self._negotiate(arguments)
            return None
        if not self._negotiated:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        if name == "query-commands":
            read_arguments(NoArguments, arguments)
            return [{"name": each} for each in ("qmp_capabilities", "query-commands", *self._commands)]
        command = self._commands.get(name)
        if command is None:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        if oob and not command.allow_oob:
            raise QmpError(f"The command {name} does not support OOB")
        return command.handler(self._backend, read_arguments(command.arguments, arguments))

    def _request(self, item: Any) -> tuple[str, dict[str, Any], bool]:
        """(command, arguments, out of band) of a request."""
        if isinstance(item, JsonError):
            raise QmpError(str(item))
        if not isinstance(item, dict):
            raise QmpError("QMP input must be a JSON object")
        verbs = ("execute", "exec-oob") if self._oob else ("execute",)
        for member, value in item.items():
            if member in verbs:
                if not isinstance(value, str):
                    raise QmpError(f"QMP input member '{member}' must be a string")
            elif member == "arguments":
                if not isinstance(value, dict):
                    raise QmpError("QMP input member 'arguments' must be an object")
            elif member != "id":
                raise QmpError(f"QMP input member '{member}' is unexpected")
        if all(verb in item for verb in ("execute", "exec-oob")):
            raise QmpError("QMP input member 'execute' clashes with 'exec-oob'")
        for verb in verbs:
            if verb in item:
                return item[verb], item.get("arguments", {}), verb == "exec-oob"
        raise QmpError("QMP input lacks member 'execute'")

    def _negotiate(self, arguments: dict[str, Any]) -> None:
        if self._negotiated:
            raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        wanted = read_arguments(QmpCapabilitiesArguments, arguments)
        self._oob = QmpCapability.OOB in (wanted.enable or [])
        self._negotiated = True
