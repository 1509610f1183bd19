"""What released VMMs have written is still understood; see tests/golden."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import pytest

from tests.golden import KINDS, WORDS, plain, releases, state_memfd
from vmm.cpr import protocol
from vmm.machine.config import kept_config
from vmm.state import Arena

RELEASES = list(releases())


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def release(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_are_some() -> None:
    assert RELEASES


def test_a_state_memfd(release: Path) -> None:
    """Each section is of a version that is known; one that has not changed has what it had."""
    fields = json.loads((release / "state.json").read_text())
    fd = state_memfd(release)
    try:
        arena = Arena(fd, create=False)
        for section in arena:
            kind = KINDS.get(section.name)
            if kind is None:
                assert section.name.startswith(("vcpu/", "vm/")), section  # the kernel's own structures
                continue
            found = arena.peek(section.name, section.instance, kind)
            known = fields[section.label]
            if known["version"] == kind.VERSION:
                assert plain(found) == known["fields"]
        assert {section.label for section in arena if section.name in KINDS} == fields.keys()
        config = kept_config(arena)
        assert (config.kernel, config.cpus, config.name) == ("sentinel", 2, "golden")
    finally:
        os.close(fd)


def test_words(release: Path) -> None:
    """Every message, as it went over the wire."""
    content = (release / "words.bin").read_bytes()
    understood = []
    while content:
        *_, length, fds = protocol.decode_header(content[: protocol.HEADER.size])
        body = content[protocol.HEADER.size :][:length]
        assert fds == 0
        understood.append(protocol.decode_body(body))
        content = content[protocol.HEADER.size + length :]
    assert understood == list(WORDS)


def test_a_later_one_is_refused_with_both_versions(release: Path) -> None:
    content = bytearray(lzma.decompress((release / "state.xz").read_bytes()))
    content[8] += 1  # the layout's version, as the module's docstring has it
    fd = os.memfd_create("later", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        with pytest.raises(protocol.StateError, match=r"layout version 2, this VMM knows 1; hand over to"):
            Arena(fd, create=False)
    finally:
        os.close(fd)
