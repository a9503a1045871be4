"""Real daemons and the real command line: a node begins to validate, stops, and changes its key."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tdmld import devnet, processes
from tdmld.rpc.access import URL_FILE, read_access
from tdmld.rpc.client import Client
from tdmld.rpc.staketypes import StakeInfo
from tdmld.rpc.types import Head, NodeStatus

pytestmark = pytest.mark.e2e

PROGRAM = (sys.executable, "-m", "tdmld")
SECONDS = 55.0
PARAMETERS = {
    "interval_ms": 50,
    "heartbeat_ms": 50,  # blocks come by themselves
    "epoch_blocks": 10,
    "unbonding": [5, 1],
}
FIRST, SECOND = 0, 1
STAKE, MORE = 100, 60
"""When all of it votes, no block is final without the second node: 100 of 160 decide nothing."""


class Shell:
    """`tdmld` at the directories of a network."""

    def __init__(self, network: devnet.Devnet) -> None:
        self.network = network

    def __call__(self, index: int, *arguments: object) -> Any:
        """A command's JSON."""
        password = {"TDMLD_PASSWORD_FILE": str(self.network.password_file(index))}
        place = ("--data-dir", self.network.data_dir(index), "--json")
        return json.loads(tdmld(*arguments, *place, **password))

    def until(
        self,
        index: int,
        true: Callable[[NodeStatus, StakeInfo], object],
        directory: Path | None = None,
    ) -> StakeInfo:
        """Wait until something is true of a node (or of that in `directory`) and the owner's stake,
        block after block."""
        access = read_access(directory or self.network.data_dir(index))
        address = self.network.nodes[index].owner

        async def wait() -> StakeInfo:
            async with (
                Client(access) as client,
                client.subscribe("chain_subscribeHeads", {}, Head) as heads,
            ):
                async for _ in heads:
                    status = await client.call("node_status", {}, NodeStatus)
                    stake = await client.call("chain_stake", {"address": address}, StakeInfo)
                    if true(status, stake):
                        return stake
            raise AssertionError("the node ended")

        async def bounded() -> StakeInfo:
            with trio.fail_after(SECONDS):
                return await wait()

        return trio.run(bounded)


def tdmld(*arguments: object, **environment: str) -> str:
    command = [*PROGRAM, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(path: Path, nodes: int = 2) -> Iterator[Shell]:
    """One validator, and nodes that are registered and do not validate."""
    network = devnet.make_network(
        path / "network",
        nodes=nodes,
        validators=1,
        asks=[],
        vote_stake=STAKE,
        parameters=PARAMETERS,
    )
    with network:
        network.start_all()
        network.wait_ready()
        yield Shell(network)


def seats(stake: StakeInfo, epoch: int) -> dict[str, int]:
    return {seat.node: int(seat.weight) for seat in stake.seats if seat.epoch == epoch}


def test_a_node_begins_to_validate_and_gets_its_stake_back(tmp_path: Path) -> None:
    with running(tmp_path) as shell:
        mine = shell.network.nodes[SECOND].node
        before = int(shell(SECOND, "wallet", "balance")["balance"])
        shell(SECOND, "stake", "bond", "vote", MORE)
        nominated = shell(SECOND, "stake", "nominate")
        assert nominated["node"] == mine

        stake = shell.until(SECOND, lambda node, stake: int(node.weight) == MORE)
        assert stake.epoch >= (nominated["block"] - 1) // 10 + 2
        assert seats(stake, stake.epoch) == {mine: MORE}
        assert stake.seats[0].total == str(STAKE + MORE)
        # From here on no block is final without its vote.
        shell.until(SECOND, lambda node, later: later.height > stake.height + 10)

        shell(SECOND, "stake", "unbond", "vote", MORE)
        left = shell.until(SECOND, lambda node, stake: not node.validator)
        assert left.vote_stake == "0"
        assert shell(SECOND, "wallet", "balance")["unbonding"] == str(MORE)
        shell.until(SECOND, lambda node, stake: all(entry.ready for entry in stake.unbonding))
        assert shell(SECOND, "stake", "withdraw")["amount"] == str(MORE)
        after = shell(SECOND, "wallet", "balance")
        assert int(after["balance"]) == before - 4 * 10  # as many fees
        assert (after["vote_stake"], after["unbonding"]) == ("0", "0")
        shell.network.down()
        for index in (FIRST, SECOND):
            conserved(shell, index, tmp_path / f"export{index}")


def conserved(shell: Shell, index: int, out: Path) -> None:
    """What an auditor of the node's chain finds; the command fails where sums do not agree."""
    place = ("--data-dir", shell.network.data_dir(index), "--out", out, "--json")
    assert json.loads(tdmld("chain", "export", *place))["supply_conserved"] is True


@contextmanager
def machine(network: devnet.Devnet, directory: Path) -> Iterator[str]:
    """Another machine with a key of its own and no owner's; its node key."""
    genesis = network.data_dir(FIRST) / "genesis.json"
    made = tdmld("init", "--no-owner", "--data-dir", directory, "--genesis", genesis, "--json")
    peers = [f"/ip4/127.0.0.1/tcp/{node.port}/p2p/{node.node}" for node in network.nodes]
    process, child = processes.start(
        [*PROGRAM, "run", "--data-dir", str(directory), "--rpc-listen", "127.0.0.1:0"],
        record=directory / devnet.RECORD_FILE,
        output=directory / devnet.OUTPUT_FILE,
        environment=os.environ | {"TDMLD_PEERS": ",".join(peers), "TDMLD_ASK_ENABLED": "false"},
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not (directory / URL_FILE).exists():
            assert time.monotonic() < deadline, (directory / devnet.OUTPUT_FILE).read_text()
            time.sleep(0.05)  # another process's readiness has no event to wait for
        yield json.loads(made)["node"]
    finally:
        processes.stop(process, 15.0)
        child.wait(15.0)


def test_a_key_is_replaced_by_that_of_another_machine(tmp_path: Path) -> None:
    with running(tmp_path) as shell, machine(shell.network, tmp_path / "other") as new:
        me, proof = shell.network.nodes[SECOND], tmp_path / "proof"
        shell(SECOND, "stake", "bond", "vote", MORE)
        shell(SECOND, "stake", "nominate")
        shell.until(SECOND, lambda node, stake: node.validator)

        tdmld("keys", "prove", me.owner, "--data-dir", tmp_path / "other", "--out", proof)
        shell(SECOND, "keys", "register", "--proof", proof)
        shell(SECOND, "stake", "nominate", new)
        shell(SECOND, "keys", "revoke", me.node, "--yes")
        one, two = shell(SECOND, "keys", "list")["keys"]
        assert (one["node"], one["nominated"]) == (new, True)
        assert (two["node"], two["nominated"]) == (me.node, False)
        assert two["revoked"] > 0

        def taken_over(node: NodeStatus, stake: StakeInfo) -> bool:
            return node.validator and seats(stake, stake.epoch) == {new: MORE}

        there = tmp_path / "other"
        seated = shell.until(SECOND, taken_over, there)
        shell.network.stop(SECOND)
        # The old machine is gone, and without the new one's votes no block is final.
        shell.until(SECOND, lambda node, stake: stake.height > seated.height + 10, there)
