"""What a VM may be called."""

from __future__ import annotations

from vmm.errors import ConfigError


def check_name(name: str) -> str:
    """A name that can be a directory: letters, digits, `-`, `_`, `.`, at most 40, not starting with a dot or
    dash.
    """
    plain = name.replace("-", "a").replace("_", "a").replace(".", "a")
    if not (0 < len(name) <= 40 and plain.isascii() and plain.isalnum() and name[0] not in ".-"):
        raise ConfigError(f"name: {name!r} is not a VM name; use up to 40 letters, digits, '-', '_' and '.'")
    return name
