"""The daemon's end of its carrier: start, requests, events, restart with back-off."""

import contextlib
import itertools
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import trio

from tdmld.node import control, errors
from tdmld.node.control import CarrierEvent, Configure, Reply, Request
from tdmld.node.controlsocket import ControlSocket
from tdmld.node.errors import CarrierUnavailable, ControlError, MachineError
from tdmld.node.supervise import Child, minimal_environment

log = logging.getLogger(__name__)

START_SECONDS = 60.0
STOP_SECONDS = 3.0
CANCEL_SECONDS = 1.0
BACKOFF_FIRST_SECONDS = 0.2
BACKOFF_LAST_SECONDS = 10.0

R = TypeVar("R", bound=control.Reply)
_KINDS: dict[str, type[MachineError]] = {
    name: made
    for name, made in vars(errors).items()
    if isinstance(made, type) and issubclass(made, MachineError)
}


class Started(Protocol):
    """What `nursery.start` gives to `run` (a trio.TaskStatus)."""

    def started(self, value: control.Ready) -> None:
        """The carrier is ready."""


class _Pending:
    __slots__ = ("answered", "reply")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.reply: Reply | None = None


class CarrierClient:
    """Keeps one carrier process running.

    `on_event(event)`, `on_down(reason)` and `on_up(ready)` are plain functions, called in the order
    of things; they must not block. `restore` gives the requests that a fresh carrier gets before it
    is announced.
    """

    def __init__(
        self,
        config: Configure,
        log_path: Path,
        *,
        on_event: Callable[[CarrierEvent], None],
        on_down: Callable[[str], None],
        on_up: Callable[[control.Ready], None],
        restore: Callable[[], Sequence[Callable[[int], Request]]],
    ) -> None:
        self._config = config
        self._log_path = log_path
        self._on_event = on_event
        self._on_down = on_down
        self._on_up = on_up
        self._restore = restore
        self._socket: ControlSocket | None = None
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._stopping = False
        self.ended = trio.Event()
        """`run` returned after `stop`."""
        self.pid: int | None = None

    def stop(self) -> None:
        """Let the carrier end by itself; `run` returns then."""
        self._stopping = True
        if self._socket is not None:
            self._socket.shutdown()

    async def run(self, *, task_status: Started = trio.TASK_STATUS_IGNORED) -> None:
        """Start the carrier and keep it running until cancelled. MachineError when the first start
        fails; later ones are tried again for ever."""
        pause = BACKOFF_FIRST_SECONDS
        first = True
        while True:
            started = trio.current_time()
            ready_seen: list[control.Ready] = []

            def ready(message: control.Ready, seen: list[control.Ready] = ready_seen) -> None:
                seen.append(message)

            reason = await self._one_life(ready, task_status if first else None)
            if self._stopping:
                self.ended.set()
                return
            if first and not ready_seen:
                raise MachineError(f"the carrier process did not start: {reason}")
            first = False
            if ready_seen:
                self._on_down(reason)
            if trio.current_time() - started > BACKOFF_LAST_SECONDS:
                pause = BACKOFF_FIRST_SECONDS
            log.warning("carrier: %s; again in %.1f s", reason, pause)
            await trio.sleep(pause)
            pause = min(pause * 2, BACKOFF_LAST_SECONDS)

    async def call(
        self,
        make: Callable[[int], Request],
        kind: type[R],
        descriptors: tuple[int, ...] = (),
    ) -> R:
        """Send a request, give its reply. The errors of `tdmld.node.errors` that the carrier
        raised; CarrierUnavailable. Cancelled, a fetch stops; the carrier carries out the rest."""
        if self._socket is None:
            raise CarrierUnavailable("the carrier process is being restarted; try again soon")
        number = next(self._ids)
        raw = control.encode_message(make(number))
        # A wrong argument is an error of the caller here and must not end the carrier there.
        control.decode_to_carrier(raw)
        pending = self._pending[number] = _Pending()
        try:
            await self._socket.send(raw, descriptors)
            await pending.answered.wait()
        except trio.Cancelled:
            await self._abandon(number)
            raise
        except ControlError as error:
            raise CarrierUnavailable(f"the carrier process is gone: {error}") from error
        finally:
            self._pending.pop(number, None)
        match pending.reply:
            case None:
                raise CarrierUnavailable("the carrier process ended while it served a request")
            case control.Failed(_, name, text):
                raise _KINDS.get(name, MachineError)(text)
            case reply if isinstance(reply, kind):
                return reply
            case reply:
                raise ControlError(f"the carrier answered with a {type(reply).__name__}")

    async def _abandon(self, number: int) -> None:
        """Nobody waits for request `number` any more."""
        raw = control.encode_message(control.Cancel(number))
        with (
            trio.CancelScope(shield=True, deadline=trio.current_time() + CANCEL_SECONDS),
            contextlib.suppress(ControlError),
        ):
            if self._socket is not None:
                await self._socket.send(raw)

    async def _one_life(
        self,
        ready: Callable[[control.Ready], None],
        task_status: Started | None,
    ) -> str:
        """Run one carrier process to its end; gives the reason."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock = ControlSocket(ours)
        argv = (sys.executable, "-m", "tdmld.node.carrier", "--control", str(theirs.fileno()))
        try:
            child = Child(argv, (theirs.fileno(),), minimal_environment(), self._log_path)
        except OSError as error:
            sock.close()
            return f"cannot be started: {error}"
        finally:
            theirs.close()
        self.pid = child.pid
        complaint = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.watch)
                try:
                    await self._serve(sock, ready, task_status)
                except ControlError as error:
                    complaint = f"{error}; "
                    child.kill()
                await child.stop(STOP_SECONDS)
        finally:
            self._socket = None
            self.pid = None
            sock.close()
            for pending in self._pending.values():
                pending.answered.set()
        return complaint + child.epitaph()

    async def _serve(
        self,
        sock: ControlSocket,
        ready: Callable[[control.Ready], None],
        task_status: Started | None,
    ) -> None:
        await sock.send(control.encode_message(self._config))
        with trio.move_on_after(START_SECONDS) as scope:
            raw, _ = await sock.receive()
        if scope.cancelled_caught:
            raise ControlError(f"it was not ready after {START_SECONDS:.0f} s")
        if not raw:
            return
        message = control.decode_from_carrier(raw)
        if not isinstance(message, control.Ready):
            raise ControlError("its first message was not Ready")
        # A restarted carrier listens where its peers know it.
        self._config = msgspec.structs.replace(self._config, listen=message.addresses)
        self._socket = sock
        for make in self._restore():
            await sock.send(control.encode_message(make(next(self._ids))))
        ready(message)
        self._on_up(message)
        if task_status is not None:
            task_status.started(message)
        while True:
            raw, descriptors = await sock.receive()
            if not raw:
                return
            if descriptors:
                raise ControlError("it sent descriptors")
            self._received(control.decode_from_carrier(raw))

    def _received(self, message: control.FromCarrier) -> None:
        match message:
            case control.Ready():
                raise ControlError("a second Ready")
            case (
                control.Done()
                | control.Failed()
                | control.Imported()
                | control.Stored()
                | control.Listing()
                | control.Probed()
                | control.Dialled()
                | control.Direct()
                | control.Network()
            ):
                pending = self._pending.get(message.id)
                if pending is not None:
                    pending.reply = message
                    pending.answered.set()
            case event:
                self._on_event(event)
