"""Carriers in processes of their own: dialled for receipts, reached through each other."""

import os
import signal
from pathlib import Path

import pytest
import trio

from tdmld.chain.crypto import public_key
from tdmld.node.errors import MachineError
from tdmld.node.machine import Machine, open_machine
from tdmld.p2p import PeerInfo
from tests.p2p.support import free_port, until

CHAIN = b"c" * 32


def of(machine: Machine) -> PeerInfo:
    return PeerInfo(machine.session, machine.addresses)


async def test_a_carrier_dials_another_anew_and_says_why_it_cannot(tmp_path: Path) -> None:
    async with (
        open_machine(tmp_path / "a", chain_id=CHAIN) as a,
        open_machine(tmp_path / "b", chain_id=CHAIN) as b,
    ):
        assert await a.reach.dial_back(b.session, b.addresses) == b.addresses[0]
        nobody = f"/ip4/127.0.0.1/tcp/{free_port()}"
        with pytest.raises(MachineError, match="refused"):
            await a.reach.dial_back(b.session, [nobody])
        with pytest.raises(MachineError, match="the peer there is"):
            await a.reach.dial_back(a.session, b.addresses)
        assert (await a.reach.network()).connected == 0
        assert await a.reach.connect_direct(b.session, b.addresses, 10)
        assert not await a.reach.connect_direct(a.session[:-1] + "X", [nobody], 0.5)
        found = await a.reach.network()
        assert (found.connected, found.relayed) == (1, 0)


async def test_a_carrier_is_reached_through_another_that_knows_it(tmp_path: Path) -> None:
    async with (
        open_machine(tmp_path / "a", chain_id=CHAIN) as a,
        open_machine(tmp_path / "relay", chain_id=CHAIN) as relay,
    ):
        direct = a.addresses
        await a.reach.set_relays([of(relay)])  # refused: the relay knows nobody yet
        assert a.addresses == direct
        await relay.reach.set_relaying([public_key(a.session)])
        await a.reach.set_relays([])
        await a.reach.set_relays([of(relay)])
        await until(lambda: len(a.addresses) == 2)
        assert a.addresses[1] == f"{relay.addresses[0]}/p2p/{relay.session}/p2p-circuit"
        assert (await relay.reach.network()).reservations == 1

        # Both carriers are told again what they need when they are restarted.
        changed = a.reach.changed
        assert a.carrier_pid is not None
        os.kill(a.carrier_pid, signal.SIGKILL)
        with trio.fail_after(20):
            await changed.wait()
        assert a.addresses == direct
        await until(lambda: len(a.addresses) == 2, 20)
