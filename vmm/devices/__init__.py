"""The machine's devices. Each offers `read(offset, size)` and `write(offset, data)` and knows no address.

All that a guest can observe of a device lives in one structure in the state memfd; what else a device needs
(an interrupt line, fds, what to do on power-off) it gets by its constructor. Devices never import kvm, cpr or
machine.
"""
