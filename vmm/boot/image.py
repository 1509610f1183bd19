"""Guest images: which file, what of it goes where in guest memory, and where the first vCPU starts.

An image is refused here, before any VM exists, in one sentence; what `load_image` returns fits the RAM it was
given, leaves vmm's own low memory alone, and has its entry point in code. It never relocates, decompresses or
guesses: a file is ELF or it is flat.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

from vmm.boot.elf import Note, Segment, SegmentFlags, is_elf, read_elf
from vmm.boot.layout import HIGH_RAM_GPA, IMAGE_GPA, MMIO_GAP_START, REAL16_GPA, reserved_areas
from vmm.errors import ImageError
from vmm.units import GIB, format_size

__all__ = [
    "EntryMode",
    "Image",
    "Segment",
    "SegmentFlags",
    "find_image",
    "load_image",
    "open_image",
    "parse_image",
    "prebuilt_images",
    "resolve_kernel",
]

MAX_FILE_SIZE = 1 * GIB  # a file is read whole; RAM is sparse and may be larger than the host's


class EntryMode(Enum):
    """The CPU mode that the first vCPU starts in; the values are those of the ENTRY_MODE note."""

    REAL16 = 16
    PROTECTED32 = 32
    LONG64 = 64


# The types of the notes that vmm owns (section .note.vmm, name "VMM"), and their descriptors, little endian.
NOTE_ENTRY_MODE = 1  # u32: 16, 32 or 64
NOTE_RESULTS = 2  # u64 guest physical address, u64 size in bytes
_NOTE_LAYOUTS = {NOTE_ENTRY_MODE: struct.Struct("<I"), NOTE_RESULTS: struct.Struct("<QQ")}

# Width of the first instruction's address: 16-bit code starts with CS base 0.
_ENTRY_BITS = {EntryMode.REAL16: 16, EntryMode.PROTECTED32: 32, EntryMode.LONG64: 64}


@dataclass(frozen=True)
class Image:
    """A guest image that fits its machine; `results` is the (gpa, size in bytes) that the host may read."""

    path: Path
    entry: int
    mode: EntryMode
    segments: tuple[Segment, ...]
    results: tuple[int, int] | None
    sha256: str
    kind: Literal["elf64", "elf32", "flat"]


def load_image(
    path: str | os.PathLike[str],
    *,
    ram: Sequence[tuple[int, int]],
    entry_mode: EntryMode | None = None,
    load_address: int | None = None,
    fd: int | None = None,
) -> Image:
    """The image in the file `path`, for a machine whose RAM regions are `ram`: (gpa, size in bytes) each.
    With `fd`, of that open file, and `path` is only what it is called.

    `entry_mode` overrides what the file says (ELF: its note, else its class; flat: 16-bit). `load_address` is
    for flat files only and defaults to 0x7C00 for 16-bit ones and 1 MiB for others. Raises ImageError for
    anything that could not run.
    """
    source = open_image(path) if fd is None else fd
    try:
        data = _read(Path(path), source, sum(size for _, size in ram))
    finally:
        if fd is None:
            os.close(source)
    return parse_image(Path(path), data, ram=ram, entry_mode=entry_mode, load_address=load_address)


def open_image(path: str | os.PathLike[str]) -> int:
    """An fd of the file `path`, for `load_image`. Raises ImageError where there is no such regular file."""
    try:
        # without waiting: a FIFO would otherwise wait for a writer before it could be refused
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{path}: not a regular file; give the image as one")
    return fd


def parse_image(
    path: Path,
    data: bytes,
    *,
    ram: Sequence[tuple[int, int]],
    entry_mode: EntryMode | None = None,
    load_address: int | None = None,
) -> Image:
    """As `load_image`, of `data`, read from `path`. Whatever the bytes, only ImageError is raised."""
    if not data:
        raise ImageError(f"{path}: the file is empty; copy or build the image again")
    read = _elf if is_elf(data) else _flat
    image = read(path, data, entry_mode, load_address)
    _check_placement(image, ram)
    _check_entry(image)
    return image


def prebuilt_images() -> dict[str, Path]:
    """The guests that come with vmm, by name: package data of an installed wheel, firmware/ of a checkout."""
    found: dict[str, Path] = {}
    for directory in reversed(_prebuilt_directories()):
        found |= {path.stem: path for path in directory.glob("*.elf")}
    return dict(sorted(found.items()))


def find_image(name: str) -> Path:
    """The file of the prebuilt image `name`. Raises ImageError that lists the names there are."""
    images = prebuilt_images()
    if name in images:
        return images[name]
    if not images:
        places = " and ".join(str(directory) for directory in _prebuilt_directories())
        raise ImageError(
            f"{name}: no prebuilt images in {places}; run scripts/build-firmware or install vmm again"
        )
    raise ImageError(
        f"{name}: no such file, and no prebuilt image of that name;"
        f" choose a file or one of {', '.join(images)}"
    )


def resolve_kernel(text: str) -> Path:
    """What a user means by KERNEL: a path where it has a slash or such a file exists, else a prebuilt image.

    Raises ImageError for a name that is neither. Whether the file can be read and run, `load_image` says.
    """
    path = Path(text)
    return path if os.sep in text or path.is_file() else find_image(text)


def _prebuilt_directories() -> tuple[Path, Path]:
    package = Path(__file__).resolve().parents[1]
    return package / "images", package.parent / "firmware" / "images"


def _read(path: Path, fd: int, ram_size: int) -> bytes:
    limit = min(ram_size, MAX_FILE_SIZE)
    try:
        before = os.fstat(fd)
        if before.st_size > limit:
            whose = "guest RAM" if limit == ram_size else "what vmm loads"
            raise ImageError(
                f"{path}: {before.st_size} bytes, more than {whose} ({format_size(limit)});"
                " give the guest more memory or use a smaller image"
            )
        data = b""
        while part := os.pread(fd, before.st_size + 1 - len(data), len(data)):
            data = data + part if data else part
        after = os.fstat(fd)
    except OSError as error:
        raise _unreadable(path, error) from error
    sizes = {len(data), before.st_size, after.st_size}
    if len(sizes) > 1 or before.st_mtime_ns != after.st_mtime_ns:
        raise ImageError(f"{path}: the file changed while it was read; start again once its writer is done")
    return data


def _unreadable(path: str | os.PathLike[str], error: OSError | ValueError) -> ImageError:
    reason = (isinstance(error, OSError) and error.strerror) or error
    return ImageError(f"{path}: cannot be read ({reason}); check the path and its permissions")


def _elf(path: Path, data: bytes, entry_mode: EntryMode | None, load_address: int | None) -> Image:
    if load_address is not None:
        raise ImageError(
            f"{path}: an ELF file says itself where it goes; leave out the load address {load_address:#x}"
        )
    elf = read_elf(str(path), data)
    noted_mode, results = _contract(path, elf.notes)
    return Image(
        path=path,
        entry=elf.entry,
        mode=entry_mode or noted_mode or EntryMode(elf.bits),
        segments=elf.segments,
        results=results,
        sha256=hashlib.sha256(data).hexdigest(),
        kind="elf64" if elf.bits == 64 else "elf32",
    )


def _flat(path: Path, data: bytes, entry_mode: EntryMode | None, load_address: int | None) -> Image:
    mode = entry_mode or EntryMode.REAL16
    gpa = load_address
    if gpa is None:
        gpa = REAL16_GPA if mode is EntryMode.REAL16 else IMAGE_GPA
    return Image(
        path=path,
        entry=gpa,
        mode=mode,
        segments=(
            Segment(gpa, data, len(data), SegmentFlags.READ | SegmentFlags.WRITE | SegmentFlags.EXECUTE),
        ),
        results=None,
        sha256=hashlib.sha256(data).hexdigest(),
        kind="flat",
    )


def _contract(path: Path, notes: Sequence[Note]) -> tuple[EntryMode | None, tuple[int, int] | None]:
    """What vmm's notes say: the entry mode and the results area, each None where no note says it."""
    mode: EntryMode | None = None
    results: tuple[int, int] | None = None
    types = [note.type for note in notes]
    for note in notes:
        layout = _NOTE_LAYOUTS.get(note.type)
        if layout is None:
            raise ImageError(
                f"{path}: vmm note type {note.type} is unknown; use the vmm that the image was made for"
            )
        if len(note.desc) != layout.size or types.count(note.type) > 1:
            raise ImageError(
                f"{path}: vmm note type {note.type} must be there once with {layout.size} bytes, not"
                f" {types.count(note.type)} times with {len(note.desc)}; build the image again"
            )
        if note.type == NOTE_RESULTS:
            gpa, size = layout.unpack(note.desc)
            results = gpa, size
            continue
        (bits,) = layout.unpack(note.desc)
        if bits not in (known := [mode.value for mode in EntryMode]):
            raise ImageError(f"{path}: its entry mode note says {bits}; build the image with one of {known}")
        mode = EntryMode(bits)
    return mode, results


def _check_placement(image: Image, ram: Sequence[tuple[int, int]]) -> None:
    """Everything lies in RAM, and the segments overlap neither each other nor what vmm itself puts there."""
    what = "the flat binary (no ELF header) at" if image.kind == "flat" else "the segment at"
    for segment in image.segments:
        _check_in_ram(f"{image.path}: {what}", segment.gpa, segment.end, ram)
    if image.results is not None:
        gpa, size = image.results
        _check_in_ram(f"{image.path}: the results area at", gpa, gpa + size, ram)
    above_4g = sum(size for gpa, size in ram if gpa >= HIGH_RAM_GPA)
    areas = reserved_areas(above_4g, paging=image.mode is EntryMode.LONG64)
    for segment, area in product(image.segments, areas):
        if segment.gpa < area.end and area.start < segment.end:
            raise ImageError(
                f"{image.path}: {what} {_span(segment.gpa, segment.end)} overlaps {area.what} that vmm puts"
                f" at {_span(area.start, area.end)}; link it at {IMAGE_GPA:#x} or above"
                f" (16-bit code at {REAL16_GPA:#x})"
            )
    for lower, upper in pairwise(sorted(image.segments, key=lambda segment: segment.gpa)):
        if upper.gpa < lower.end:
            raise ImageError(
                f"{image.path}: {what} {_span(lower.gpa, lower.end)} overlaps the one at"
                f" {_span(upper.gpa, upper.end)} by physical address; correct the linker script"
            )


def _check_in_ram(what: str, start: int, end: int, ram: Sequence[tuple[int, int]]) -> None:
    if start >= end:
        raise ImageError(f"{what} {start:#x} has no bytes; build the image again")
    if any(gpa <= start and end <= gpa + size for gpa, size in ram):
        return
    if start < HIGH_RAM_GPA and end > MMIO_GAP_START:
        raise ImageError(
            f"{what} {_span(start, end)} reaches into the 32-bit MMIO gap at"
            f" {_span(MMIO_GAP_START, HIGH_RAM_GPA)}, where there is never RAM; link it elsewhere"
        )
    regions = ", ".join(_span(gpa, gpa + size) for gpa, size in ram)
    raise ImageError(
        f"{what} {_span(start, end)} is outside guest RAM ({regions});"
        " give the guest more memory or link it lower"
    )


def _check_entry(image: Image) -> None:
    """The first instruction is in the file, in an executable segment, and within reach of the entry mode."""
    where = f"{image.path}: the entry point {image.entry:#x}"
    bits = _ENTRY_BITS[image.mode]
    if image.entry >> bits:
        raise ImageError(
            f"{where} is beyond the first {format_size(1 << bits)}, where {image.mode.value}-bit code starts;"
            " link it lower or choose another entry mode"
        )
    for segment in image.segments:
        if SegmentFlags.EXECUTE in segment.flags and 0 <= image.entry - segment.gpa < len(segment.data):
            return
    raise ImageError(
        f"{where} is in no executable segment's contents (by physical address); correct ENTRY or the"
        " segments' flags in the linker script"
    )


def _span(start: int, end: int) -> str:
    """The addresses from `start` up to, not including, `end`, as memory maps are written: first to last."""
    return f"{start:#x}-{end - 1:#x}"
