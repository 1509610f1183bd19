from __future__ import annotations

from tests.golden import FOLDER, write
from vmm import __version__

write(FOLDER / __version__)
