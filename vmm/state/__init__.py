"""Where the machine's state lives: a memfd with a directory, not this process."""

from vmm.state.arena import Arena, Section

__all__ = ["Arena", "Section"]
