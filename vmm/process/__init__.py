"""One VMM process: its event loop, the guest it has, its monitor, and the handover it may be in.

The main thread runs the loop: monitor, console input, signals. vCPU threads run the guest. One more thread
carries a handover while there is one.
"""

from vmm.process.options import Incoming, Options
from vmm.process.process import VmmProcess

__all__ = ["Incoming", "Options", "VmmProcess"]
