"""A minimal VMM for Linux/KVM whose guest outlives the VMM process that runs it."""

__version__ = "0.2.0"
