"""The boundary of a duty: what the network or a stranger's offer makes fail ends no node."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tdmld.chain.crypto import KeyPair
from tdmld.chain.errors import InvalidTransaction
from tdmld.chain.records import JobStatus
from tdmld.chain.transactions import Decline, decode_transaction
from tdmld.node import duties
from tdmld.node.agent import RETRY_BLOCKS, Agent
from tdmld.node.chainerrors import ServiceBusy, SpecUnavailable, StoreError
from tdmld.node.duty import TakePlace
from tdmld.train.specfields import GivenInit
from tests.node.chainkit import make_genesis
from tests.node.fake_chain import FakeWitnesses


def make_agent(height: int = 7) -> Agent:
    return Agent(
        key=KeyPair(bytes(32)),
        chain_id=bytes(32),
        chain=cast(Any, SimpleNamespace(height=height, genesis=make_genesis())),
        machine=cast(Any, None),
        book=cast(Any, None),
        data_dir=Path(),
        ask=None,
        ask_blocks=10,
        witnessed=FakeWitnesses(),
    )


@pytest.mark.parametrize(
    "error",
    [
        SpecUnavailable("an offer may name a spec that nobody has"),
        ServiceBusy("too many transactions wait"),
        InvalidTransaction("the job is over"),
        OSError("no space left"),
    ],
)
async def test_a_duty_that_fails_is_tried_again_later(error: Exception) -> None:
    agent = make_agent()

    async def fail() -> None:
        raise error

    await agent._perform("duty", fail)
    attempt = agent._attempts["duty"]
    assert not attempt.running
    assert attempt.height == 7 < 7 + RETRY_BLOCKS


async def test_a_database_that_fails_ends_the_node() -> None:
    async def fail() -> None:
        raise StoreError("damaged")

    with pytest.raises(StoreError):
        await make_agent()._perform("duty", fail)


@pytest.mark.parametrize(("height", "declined"), [(12, False), (20, True)])
async def test_a_place_is_declined_in_time_when_nobody_has_the_spec(
    height: int, declined: bool
) -> None:
    """Silence would be counted as this node's fault."""
    agent, submitted = make_agent(height), list[bytes]()

    async def nobody(_: bytes) -> bytes:
        raise SpecUnavailable("nobody has it")

    async def submit(raw: bytes) -> None:
        submitted.append(raw)

    agent.chain.fetch_spec = nobody  # type: ignore[method-assign]
    agent.chain.submit = submit  # type: ignore[assignment, method-assign]
    job = cast(
        Any,
        SimpleNamespace(id=bytes(32), spec_id=bytes(32), matched=10, status=JobStatus.MATCHED),
    )
    place = TakePlace(bytes(32), 0, 1)
    await agent._perform("place", lambda: agent._performer._take_place(cast(Any, None), job, place))
    found = [decode_transaction(raw, bytes(32)).payload for raw in submitted]
    assert found == ([Decline(bytes(32), 0, 1)] if declined else [])


async def test_given_weights_are_still_given_when_a_sealed_job_gets_a_new_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent, told = make_agent(), []

    async def rekey(*arguments: object, **options: object) -> None:
        told.append((*arguments, options))

    agent.machine = cast(Any, SimpleNamespace(rekey=rekey))
    monkeypatch.setattr(duties, "lost_places", lambda state, job: ["somebody"])
    root = "ab" * 32
    spec = SimpleNamespace(init=GivenInit((root,)), privacy="sealed")
    monkeypatch.setattr(agent._performer, "known_spec", lambda job: spec)
    job = SimpleNamespace(id=b"job", spec_id=b"spec", privacy="sealed", source=agent.key.public)
    await agent._tell_members(cast(Any, None), cast(Any, job), frozenset({"a"}))
    assert told == [(b"job", frozenset({"a"}), b"spec", {"given": [bytes.fromhex(root)]})]
