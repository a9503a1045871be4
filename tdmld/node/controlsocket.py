"""The socket between the daemon and its carrier: messages with their borders, and descriptors."""

import array
import contextlib
import socket

import trio

from tdmld.node.control import MAX_DESCRIPTORS, MESSAGE_BYTES
from tdmld.node.errors import ControlError


class ControlSocket:
    """One end of a SOCK_SEQPACKET pair, under trio.

    `send` and `receive` may be cancelled: a packet is sent whole or not at all.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = trio.socket.from_stdlib_socket(end)
        self._sending = trio.Lock()

    async def send(self, raw: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Send one packet; ControlError when the other end is closed."""
        ancillary = []
        if descriptors:
            rights = array.array("i", descriptors).tobytes()
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        async with self._sending:
            try:
                await self._socket.sendmsg([raw], ancillary)
            except OSError as error:
                raise ControlError(f"the other process is gone: {error}") from error

    async def receive(self) -> tuple[bytes, tuple[int, ...]]:
        """The next packet and its descriptors (the caller closes them); b"" at the end."""
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        try:
            raw, ancillary, flags, _ = await self._socket.recvmsg(MESSAGE_BYTES, space)
        except ConnectionError:
            return b"", ()
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(data) - len(data) % descriptors.itemsize
                descriptors.frombytes(data[:whole])
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ControlError("a packet was cut: more bytes or descriptors than agreed")
        return raw, tuple(descriptors)

    def shutdown(self) -> None:
        """Send nothing any more: the other end reads the end of file; we still receive."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end; the other one reads the end of file."""
        self._socket.close()
