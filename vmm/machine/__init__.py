"""The machine: configuration, run state, vCPU threads, KVM state, and the one place where a machine is put
together.
"""
