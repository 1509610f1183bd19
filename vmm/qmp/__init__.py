"""The control socket: QEMU's Machine Protocol, with QEMU's names and error texts.

  bytes -> framing (lexer, parser) -> session (negotiation, ids) -> schema (arguments) -> commands -> Backend

`server` puts sessions on sockets, `client` is the other end. Nothing here may know the machine: it is reached
through `backend.Backend` alone. Protocol: QEMU's docs/interop/qmp-spec.rst.
"""
