"""What the RPC answers about whether this node can be reached."""

from collections.abc import Callable

import trio

from tdmld.chain.crypto import address, public_key
from tdmld.chain.transactions import DIAL_OPEN
from tdmld.node import control
from tdmld.node.errors import MachineError
from tdmld.node.reach import Reachability
from tdmld.node.reachask import Finding, Trial
from tdmld.node.reachbook import is_relayed
from tdmld.node.reachcarrier import ReachCarrier
from tdmld.p2p import Host
from tdmld.p2p.interfaces import interface_addresses
from tdmld.rpc.reachtypes import (
    NetReachability,
    ProcessReach,
    ReachState,
    RelayingInfo,
    RouterInfo,
    TrialInfo,
    WitnessInfo,
)

REFRESH_SECONDS = 20.0


class ReachApi:
    """The net_reachability method of one daemon."""

    def __init__(
        self,
        reach: Reachability,
        host: Host,
        carrier: ReachCarrier,
        owner_of: Callable[[bytes], bytes | None],
    ) -> None:
        self._reach = reach
        self._host = host
        self._carrier = carrier
        self._owner_of = owner_of

    async def reachability(self, *, refresh: bool) -> NetReachability:
        """The present view; with `refresh` after asking everybody again, REFRESH_SECONDS at
        most."""
        reach = self._reach
        if refresh:
            await reach.refresh(REFRESH_SECONDS)
        network = await self._network()
        peers = [peer for peer in self._host.peers() if peer.connected]
        receipts = reach.receipts()
        opened = sum(receipt.kind == DIAL_OPEN for receipt in receipts)
        return NetReachability(
            daemon=_process(reach.daemon_state, self._host.addresses, reach.daemon_addresses),
            carrier=_process(reach.carrier_state, self._carrier.addresses, reach.carrier_addresses),
            settled=reach.settled,
            witnesses=tuple(map(self._witness, reach.findings.values())),
            own=interface_addresses(),
            router=self._router(),
            local=None if reach.lan is None else reach.lan.interfaces,
            relaying=RelayingInfo(
                on=bool(reach.relaying),
                members=len(reach.relaying) // 2,
                reservations=network.reservations,
                circuits=network.circuits,
                carried=network.carried,
            ),
            daemons=len(peers),
            daemons_relayed=sum(peer.path == "relayed" for peer in peers),
            carriers=network.connected,
            carriers_relayed=network.relayed,
            punched=self._host.holes_punched + network.punched,
            open_receipts=opened,
            pair_receipts=len(receipts) - opened,
            wanted_receipts=reach.policy.receipts,
        )

    async def _network(self) -> control.Network:
        try:
            return await self._carrier.network()
        except MachineError:  # it is being restarted
            return control.Network(0, 0, 0, 0, 0, 0, 0)

    def _witness(self, finding: Finding) -> WitnessInfo:
        owner = self._owner_of(public_key(finding.witness))
        return WitnessInfo(
            node=finding.witness,
            owner=address(owner) if owner is not None else "",
            seconds_ago=trio.current_time() - finding.at,
            seen_at=finding.seen_at,
            clock_ms=finding.clock_ms,
            daemon=_trial(finding.daemon),
            carrier=_trial(finding.carrier),
            failure=finding.failure,
        )

    def _router(self) -> RouterInfo:
        mapper = self._reach.mapper
        if mapper is None:
            return RouterInfo(state="off")
        mappings = mapper.state.mappings.values()
        if mapper.state.failure:
            return RouterInfo(state="failed", why=mapper.state.failure)
        if not mapper.tried.is_set():
            return RouterInfo(state="asking")
        return RouterInfo(
            state="forwards",
            addresses=tuple(mapping.address for mapping in mappings),
            public=all(mapping.public for mapping in mappings),
        )


def _process(
    state: ReachState, present: tuple[str, ...], announced: tuple[str, ...]
) -> ProcessReach:
    return ProcessReach(
        state=state,
        listening=tuple(text for text in present if not is_relayed(text)),
        announced=announced,
        relayed=tuple(filter(is_relayed, present)),
    )


def _trial(trial: Trial) -> TrialInfo:
    return TrialInfo(reached=trial.reached, address=trial.address, why=trial.why)
