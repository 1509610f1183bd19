"""The words of a handover: what goes over the cpr and the main channel, in which order, and how it is
bounded.

    old VMM                         cpr channel                          new VMM
                                                                         listens
    connects          ──  Offer (configuration, fd table) + fds  ──▶     maps RAM, builds the machine
                      ◀──  Refuse (reason)   or   Ready, hang-up ──      listens on main
                                    main channel
    connects, pauses  ──  State (epoch, was it running?)         ──▶     loads the state
                      ◀──  Prepared   or   Refuse                ──
    releases token    ──  Commit                                 ──▶     takes the token, runs the guest
                      ◀──  Running (its part of the report)      ──      serves
    postmigrate       ──  Farewell (clients that move)           ──▶     serves them, too

Until Commit the old VMM can take everything back, and does on any error, hang-up, timeout or cancel (it says
Cancel where it still can). After Commit the token says who runs the guest, whatever else gets lost.

A message is a header (be32 magic, be32 protocol version, be32 length of the body, be32 number of fds) and a
JSON body; its fds come right behind it, in batches of one byte with SCM_RIGHTS. Magic, version, length and
count are checked before anything is allocated, and every number in a body has its bounds.

The offer is in the old VMM's newest version. From the first message that a side receives it speaks the lower
of both versions; a new VMM that knows no version as high as the offer's refuses it, in its own newest.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from vmm.errors import StateError
from vmm.trace import KEPT_EVENTS

MAGIC = 0x56435052  # "VCPR"
VERSION = 1
OLDEST_VERSION = 1
HEADER = struct.Struct(">IIII")
LARGEST_BODY = 1 << 20
MOST_FDS = 1024
FDS_PER_BATCH = 250  # below the kernel's SCM_MAX_FD, 253
LARGEST_FAREWELL = LARGEST_BODY - 4096  # of what a Farewell may carry; the rest is the message's own
LARGEST_REASON = 4096  # characters
LONGEST_NAME = 64  # characters: an fd's, an event's, a release's
MOST_CLIENTS = 256

Method = Literal["adopt", "rebuild"]
Mode = Literal["cpr-transfer"]
_Name = Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
_Reason = Annotated[str, msgspec.Meta(max_length=LARGEST_REASON)]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=MOST_FDS)]
_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Pid = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class FdEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of the fd table; the fds travel in the order of the table."""

    name: _Name
    id: _Id


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""


class Offer(Message, frozen=True, tag="offer"):
    """Old to new, on cpr: the machine and its fds. The guest runs on."""

    release: _Name
    mode: Mode
    machine: msgspec.Raw
    fds: Annotated[list[FdEntry], msgspec.Meta(max_length=MOST_FDS)]


class Refuse(Message, frozen=True, tag="refuse"):
    """New to old: this will not work, and why. The old VMM keeps the guest."""

    reason: str


class Ready(Message, frozen=True, tag="ready"):
    """New to old, on cpr, before it hangs up: built and listening. `method` is `adopt` or `rebuild`; `probe`
    is the kernel's answer on the VM fd that came, `why` how the one follows from the other.
    """

    method: Method
    why: _Reason
    received: bool
    probe: _Reason


class State(Message, frozen=True, tag="state"):
    """Old to new, on main: the guest is stopped, its state is in the state memfd. `epoch` is the token's."""

    epoch: _Count
    running: bool


class Prepared(Message, frozen=True, tag="prepared"):
    """New to old: everything is loaded; nothing can fail any more but dying."""


class Commit(Message, frozen=True, tag="commit"):
    """Old to new: the token is released; take it and run."""


class Cancel(Message, frozen=True, tag="cancel"):
    """Old to new: the handover is off."""

    reason: str


class TraceEvent(msgspec.Struct, frozen=True, array_like=True):
    """One trace event of the new VMM: name and CLOCK_MONOTONIC nanoseconds."""

    name: _Name
    ns: _Nanoseconds


class Running(Message, frozen=True, tag="running"):
    """New to old: the guest is mine. With its part of the report."""

    pid: _Pid
    events: Annotated[list[TraceEvent], msgspec.Meta(max_length=KEPT_EVENTS)]


class Farewell(Message, frozen=True, tag="farewell"):
    """Old to new: the clients of the monitor that come with the guest, `(id of fd qmp, state)`. The last
    word.
    """

    clients: Annotated[list[tuple[_Id, bytes]], msgspec.Meta(max_length=MOST_CLIENTS)]


AnyMessage = Offer | Refuse | Ready | State | Prepared | Commit | Cancel | Running | Farewell
_decoder = msgspec.json.Decoder(AnyMessage)
_encoder = msgspec.json.Encoder()
M = TypeVar("M", bound=Message)


def encode(message: Message, fds: int = 0, version: int | None = None) -> bytes:
    """Header and body of `message`, announcing `fds` file descriptors, as `version` has them: by default the
    newest. Raises StateError for what no peer could read.
    """
    spoken = VERSION if version is None else version
    if not OLDEST_VERSION <= spoken <= VERSION:
        raise StateError(f"protocol version {spoken} cannot be spoken; {_known()}")
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError as error:
        raise StateError(f"{type(message).__name__}: a text in it is not UTF-8: {error}") from error
    if len(body) > LARGEST_BODY or fds > MOST_FDS:
        raise StateError(
            f"{type(message).__name__}: {len(body)} bytes and {fds} fds are more than the channel takes"
        )
    return HEADER.pack(MAGIC, spoken, len(body), fds) + body


class Announced(NamedTuple):
    """What a header says of its message."""

    version: int
    length: int
    fds: int


def _known() -> str:
    return f"this VMM speaks {OLDEST_VERSION} to {VERSION}"


def decode_header(header: bytes) -> Announced:
    """What comes behind `header`. Raises StateError for what is no message of ours."""
    magic, version, length, fds = HEADER.unpack(header)
    if magic != MAGIC:
        raise StateError(f"the peer speaks another protocol (magic {magic:#x}, expected {MAGIC:#x})")
    if not OLDEST_VERSION <= version <= VERSION:
        raise StateError(
            f"the peer speaks protocol version {version}, {_known()}; update the one that is older"
        )
    if length > LARGEST_BODY or fds > MOST_FDS:
        raise StateError(
            f"the peer announces {length} bytes and {fds} fds; at most {LARGEST_BODY} and {MOST_FDS} go"
        )
    return Announced(version, length, fds)


def decode_body(body: bytes) -> AnyMessage:
    """The message in `body`. Raises StateError."""
    try:
        message: AnyMessage = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StateError(f"the peer sent a message that cannot be read: {error}") from error
    return message


def as_reason(text: str) -> str:
    """`text` as a Refuse or a Cancel can carry it."""
    return text.encode("utf-8", "backslashreplace").decode()[:LARGEST_REASON]


def unexpected(message: Any, wanted: str) -> StateError:
    """The error that `message` stands for where `wanted` should have come: a Refuse or Cancel carries its own
    reason.
    """
    if isinstance(message, Refuse):
        return StateError(f"the new VMM refuses: {message.reason[:LARGEST_REASON]}")
    if isinstance(message, Cancel):
        return StateError(f"the old VMM cancelled: {message.reason[:LARGEST_REASON]}")
    return StateError(f"the peer sent {type(message).__name__} where {wanted} was expected")


def expect(message: Any, wanted: type[M]) -> M:
    """`message` where it is a `wanted`; raises `unexpected` otherwise."""
    if isinstance(message, wanted):
        return message
    raise unexpected(message, wanted.__name__)
