"""From a file to a machine that can start: guest images, the x86 boot state, the guest's CPUID.

Pure computation. This room never issues an ioctl, opens a socket or keeps an fd; what it computes, `machine`
applies.
"""
