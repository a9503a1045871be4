"""A small UPnP Internet Gateway Device on loopback: search (SSDP) and control (SOAP)."""

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

GROUP, PORT = "239.255.255.250", 1900
TYPE = "urn:schemas-upnp-org:service:WANIPConnection:1"
DEVICE = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"

DESCRIPTION = f"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><specVersion><major>1</major><minor>0</minor>
</specVersion><device><deviceType>{DEVICE}</deviceType><friendlyName>fake</friendlyName>
<deviceList><device><deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType>
<serviceList><service>
<serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
<serviceId>urn:upnp-org:serviceId:WANCommonIFC1</serviceId><controlURL>/common</controlURL>
<eventSubURL>/e</eventSubURL><SCPDURL>/common.xml</SCPDURL></service></serviceList>
<deviceList><device><deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType>
<serviceList><service><serviceType>{TYPE}</serviceType>
<serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId><controlURL>/control</controlURL>
<eventSubURL>/e</eventSubURL><SCPDURL>/ip.xml</SCPDURL></service></serviceList>
</device></deviceList></device></deviceList></device></root>"""


@dataclass
class FakeRouter:
    """What the router does; `open_router` runs it."""

    external_ip: str = "198.41.0.4"
    taken: set[int] = field(default_factory=set)
    """External ports that another machine has."""
    permanent_only: bool = False
    mapped: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    """External port -> (inside address, inside port, lease seconds)."""
    silent: bool = False
    """Takes connections and never answers."""
    huge: bool = False
    """Answers without end."""
    port: int = 0

    def act(self, action: str, body: str) -> tuple[int, dict[str, object]]:
        def given(name: str) -> str:
            found = re.search(rf"<{name}>([^<]*)</{name}>", body)
            return found[1] if found else ""

        if action == "GetStatusInfo":
            return 0, {
                "NewConnectionStatus": "Connected",
                "NewLastConnectionError": "",
                "NewUptime": 9,
            }
        if action == "GetExternalIPAddress":
            return 0, {"NewExternalIPAddress": self.external_ip}
        external = int(given("NewExternalPort") or 0)
        if action == "GetSpecificPortMappingEntry":
            if external in self.taken:
                return 0, _entry("192.168.1.99", external, 0)
            if external in self.mapped:
                return 0, _entry(*self.mapped[external])
            return 714, {}
        if action == "AddPortMapping":
            lease = int(given("NewLeaseDuration"))
            if external in self.taken:
                return 718, {}
            if self.permanent_only and lease:
                return 725, {}
            inside = (given("NewInternalClient"), int(given("NewInternalPort")), lease)
            self.mapped[external] = inside
            return 0, {}
        if action == "DeletePortMapping":
            return (0, {}) if self.mapped.pop(external, None) else (714, {})
        return 401, {}


def _entry(client: str, port: int, lease: int) -> dict[str, object]:
    return {
        "NewInternalPort": port,
        "NewInternalClient": client,
        "NewEnabled": 1,
        "NewPortMappingDescription": "x",
        "NewLeaseDuration": lease,
    }


def _soap(action: str, code: int, values: dict[str, object]) -> tuple[str, str]:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    body = f'<u:{action}Response xmlns:u="{TYPE}">{inner}</u:{action}Response>'
    if code:
        body = (
            "<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>"
            '<UPnPError xmlns="urn:schemas-upnp-org:control-1-0">'
            f"<errorCode>{code}</errorCode><errorDescription>no</errorDescription></UPnPError>"
            "</detail></s:Fault>"
        )
    envelope = (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/">'
        f"<s:Body>{body}</s:Body></s:Envelope>"
    )
    return ("500 Internal Server Error" if code else "200 OK"), envelope


@asynccontextmanager
async def open_router(router: FakeRouter) -> AsyncIterator[FakeRouter]:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        router.port = listeners[0].socket.getsockname()[1]

        async def handle(stream: trio.SocketStream) -> None:
            await _serve(router, stream)

        nursery.start_soon(trio.serve_listeners, handle, listeners)
        search = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        search.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        search.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        search.bind((GROUP, PORT))
        membership = socket.inet_aton(GROUP) + socket.inet_aton("127.0.0.1")
        search.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        with trio.socket.from_stdlib_socket(search) as opened:
            nursery.start_soon(_answer_searches, router, opened)
            yield router
            nursery.cancel_scope.cancel()


async def _answer_searches(router: FakeRouter, opened: trio.socket.SocketType) -> None:
    while True:
        raw, sender = await opened.recvfrom(2000)
        if raw.startswith(b"M-SEARCH") and DEVICE.encode() in raw:
            lines = (
                "HTTP/1.1 200 OK",
                "CACHE-CONTROL: max-age=120",
                f"ST: {DEVICE}",
                f"USN: uuid:1::{DEVICE}",
                "EXT:",
                "SERVER: fake",
                f"LOCATION: http://127.0.0.1:{router.port}/root.xml",
                "",
                "",
            )
            await opened.sendto("\r\n".join(lines).encode(), sender)


async def _serve(router: FakeRouter, stream: trio.SocketStream) -> None:
    try:
        await _one_request(router, stream)
    except trio.BrokenResourceError:
        pass
    finally:
        await trio.aclose_forcefully(stream)


async def _one_request(router: FakeRouter, stream: trio.SocketStream) -> None:
    raw = b""
    while b"\r\n\r\n" not in raw:
        if not (more := await stream.receive_some(65536)):
            return
        raw += more
    if router.silent:
        await trio.sleep_forever()
    head, _, body = raw.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while length and len(body) < int(length[1]):
        body += await stream.receive_some(65536)
    status, text = "200 OK", DESCRIPTION
    if head.startswith(b"POST"):
        found = re.search(rb'(?i)soapaction: *"[^#]*#(\w+)"', head)
        assert found
        action = found[1].decode()
        code, values = router.act(action, body.decode())
        status, text = _soap(action, code, values)
    elif router.huge:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\n\r\n<root>")
        while True:
            await stream.send_all(b"<a>" * 100_000)
    answer = f"HTTP/1.1 {status}\r\nContent-Type: text/xml\r\nContent-Length: {len(text)}\r\n\r\n"
    await stream.send_all((answer + text).encode())
