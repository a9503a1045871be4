"""Looking for planted bytes: in files, databases, captured packets and the memory of processes."""

import base64
import ctypes
import os
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from tdmld.node.rocks import open_database

PIECE_BYTES = 8 << 20
"""Files and memory are searched in pieces of this size, which overlap by one needle."""
_ETHERNET_BYTES = 14
_IPV4, _TCP = 0x0800, 6
_RECEIVE_BYTES = 64 << 20
_RCVBUFFORCE, _ATTACH_FILTER, _PACKET, _STATISTICS = 33, 26, 263, 6
"""Of asm-generic/socket.h and linux/if_packet.h; Python has no names for them."""


def forms(canary: str) -> dict[str, bytes]:
    """The canary as bytes and in the other ways in which it could lie about."""
    raw = canary.encode()
    found = {
        "text": raw,
        "int64 tokens": b"".join(struct.pack("<q", byte) for byte in raw),
        "int32 tokens": b"".join(struct.pack("<i", byte) for byte in raw),
        "hex": raw.hex().encode(),
        "HEX": raw.hex().upper().encode(),
        "UTF-16": canary.encode("utf-16-le"),
        "numbers": ", ".join(map(str, raw)).encode(),
    }
    for shift in range(3):
        # Where it begins within the groups of three decides how base64 spells it; without its ends.
        spelled = base64.b64encode(b"?" * shift + raw)
        found[f"base64 at {shift}"] = spelled[4:-4]
    return found


class Needles:
    """What is searched for."""

    def __init__(self, canary: str) -> None:
        self._forms = forms(canary)
        self._overlap = max(map(len, self._forms.values())) - 1

    def in_bytes(self, data: bytes | bytearray) -> list[str]:
        """Names of the forms that `data` holds."""
        return [name for name, form in self._forms.items() if form in data]

    def in_pieces(self, pieces: Iterable[bytes]) -> list[str]:
        """As `in_bytes`, of adjacent pieces."""
        found, tail = set[str](), b""
        for piece in pieces:
            found.update(self.in_bytes(tail + piece))
            tail = piece[-self._overlap :]
        return sorted(found)

    def in_files(self, directory: Path) -> list[str]:
        """ "path: form" of each file below a directory that holds one; files may come and go."""
        found = []
        for path in directory.rglob("*"):
            try:
                if path.is_file() and not path.is_symlink():
                    found += [f"{path}: {name}" for name in self.in_pieces(_file_pieces(path))]
            except FileNotFoundError:
                continue
        return found

    def in_database(self, path: Path) -> list[str]:
        """Of a stopped node's database, through its interface: its files may be compressed."""
        database = open_database(path)
        try:
            found = [
                name
                for key, value in database.items()
                for name in self.in_bytes(bytes(key) + b"\0" + bytes(value))
            ]
        finally:
            database.close()
        return [f"{path} (records): {name}" for name in found]

    def in_process(self, pid: int) -> list[str]:
        """Forms in the memory of a process; none when it has ended. PermissionError where the
        system forbids to look at other processes."""
        found = set[str]()
        try:
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                for start, end in _regions(pid):
                    found.update(self.in_pieces(_memory_pieces(memory.fileno(), start, end)))
        except (FileNotFoundError, ProcessLookupError):
            return []
        return sorted(found)


def _file_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _memory_pieces(fd: int, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        try:
            piece = os.pread(fd, min(PIECE_BYTES, end - start), start)
        except OSError:
            return  # guard pages and device memory cannot be read
        if not piece:
            return
        yield piece
        start += len(piece)


def _regions(pid: int) -> Iterator[tuple[int, int]]:
    """Readable memory, but for the unchanged parts of programs and libraries."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        span, rights, place = fields[0], fields[1], "".join(fields[5:])
        library = place.startswith("/") and not place.startswith(("/memfd:", "/dev/shm"))
        if "r" not in rights or place.startswith(("[v", "/dev/")):
            continue
        if library and "w" not in rights:
            continue
        first, last = (int(text, 16) for text in span.split("-"))
        yield first, last


class Capture:
    """Everything that goes over the loopback interface from or to some TCP ports (IPv4).

    PermissionError where the system forbids to listen (Linux wants CAP_NET_RAW).
    """

    def __init__(self, ports: set[int]) -> None:
        self._ports = ports
        self.flows: dict[tuple[int, int], bytearray] = defaultdict(bytearray)
        """(source port, destination port) -> the bytes in the order in which they went."""
        self.lost_share = 0.0
        """Of the packets: what came faster than it could be taken."""
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        with suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _RECEIVE_BYTES)
        program = _filter(sorted(ports))
        held = ctypes.create_string_buffer(program)
        attached = struct.pack("HL", len(program) // 8, ctypes.addressof(held))
        self._socket.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, attached)
        self._socket.settimeout(0.2)
        self._socket.bind(("lo", 0))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; `flows` and `lost_share` are final."""
        self._ending.set()
        self._thread.join()
        packets, lost = struct.unpack("II", self._socket.getsockopt(_PACKET, _STATISTICS, 8))
        self.lost_share = lost / max(packets, 1)
        self._socket.close()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                packet = self._socket.recv(1 << 17)
            except TimeoutError:
                continue
            self._take(packet)

    def _take(self, packet: bytes) -> None:
        ip = packet[_ETHERNET_BYTES:]
        header, length = (ip[0] & 15) * 4, struct.unpack_from("!H", ip, 2)[0]
        tcp = ip[header : length or None]  # a length of zero: larger than the field can say
        source, destination = struct.unpack_from("!HH", tcp)
        self.flows[source, destination] += tcp[(tcp[12] >> 4) * 4 :]


def _filter(ports: list[int]) -> bytes:
    """A classic BPF program (linux/filter.h) that takes packets from or to these TCP ports, each
    once: on the loopback interface it is seen going and coming."""
    count = len(ports)
    load_half, load_byte, load_at_x, header_of = 0x28, 0x30, 0x48, 0xB1
    equal, give = 0x15, 0x06
    # (code, jump if true, jump if false, value); the last but one takes, the last one drops.
    steps = [
        (load_half, 0, 0, 12),
        (equal, 0, 2 * count + 7, _IPV4),
        (load_byte, 0, 0, 23),
        (equal, 0, 2 * count + 5, _TCP),
        (load_byte, 0, 0, 0xFFFFF000 + 4),  # the kind of packet
        (equal, 0, 2 * count + 3, socket.PACKET_OUTGOING),
        (header_of, 0, 0, _ETHERNET_BYTES),
        (load_at_x, 0, 0, _ETHERNET_BYTES),
        *((equal, 2 * count + 1 - number, 0, port) for number, port in enumerate(ports)),
        (load_at_x, 0, 0, _ETHERNET_BYTES + 2),
        *((equal, count - number, 0, port) for number, port in enumerate(ports)),
        (give, 0, 0, 0),
        (give, 0, 0, 1 << 18),
    ]
    # Nothing matched: the step after the last comparison drops, the one behind it takes.
    return b"".join(struct.pack("HBBI", *step) for step in steps)
