"""The handover: QEMU's cpr-transfer between two VMM processes of one host.

    protocol.py   the words: messages of both channels, their bounds and their versions
    channel.py    sockets: framing, SCM_RIGHTS, deadlines, cancellation, who the peer is
    token.py      the run token: which process may enter KVM_RUN
    outgoing.py   the old VMM's side, as one coroutine over a table of phases
    incoming.py   the new VMM's side, likewise
    live.py       what both coroutines stand on in a real process
    report.py     what a handover did, and how long each phase took

The coroutines know no socket, no ioctl and no clock: tests run them against a model of the world, with
crashes between any two steps.
"""
