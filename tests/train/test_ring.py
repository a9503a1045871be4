"""The U shape: the order of work of its first slot, and who is joined to whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdmld.train.budget import stage_memory
from tdmld.train.errors import SpecError
from tdmld.train.schedule import one_f_one_b, operations, ring_start, step_frames, traffic
from tdmld.train.spec import Spec
from tests.train.support import family_spec

stages_of = st.integers(2, 8)
batches_of = st.integers(1, 24)


def ring(stages: int, **changes: object) -> Spec:
    return family_spec("gemma", stages, **changes)


@given(stages_of, batches_of)
def test_the_first_slot_does_each_operation_once_and_in_order(stages: int, batches: int) -> None:
    order = ring_start(stages, batches)
    for kind in "FHB":
        assert [n for k, n in order if k == kind] == list(range(batches))


def test_the_order_of_the_first_of_three_slots() -> None:
    order = " ".join(f"{kind}{number}" for kind, number in ring_start(3, 5))
    assert order == "F0 F1 F2 H0 H1 F3 H2 B0 F4 H3 B1 H4 B2 B3 B4"
    spec = ring(3, train__micro_batches=3)
    order = " ".join(f"{kind}{number}" for kind, number in operations(spec, 0, 1))
    assert order == "F0 F1 F2 B0 B1 B2"  # as if a fourth stage followed


@given(stages_of, batches_of)
def test_a_ring_never_waits_in_a_circle(stages: int, batches: int) -> None:
    """Run the orders of all slots; each operation waits only for the ones that feed it."""
    orders = [ring_start(stages, batches)]
    orders += [one_f_one_b(stages + 1, stage, batches) for stage in range(1, stages)]
    done: set[tuple[str, int, int]] = set()
    ahead = 0
    place = [0] * stages
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                kind, n = order[place[stage]]
                needed = {
                    "F": ("F", stage - 1, n) if stage else None,
                    "H": ("F", stages - 1, n),
                    "B": ("B", stage + 1, n) if stage + 1 < stages else ("H", 0, n),
                }[kind]
                if needed is not None and needed not in done:
                    break
                done.add((kind, stage, n))
                place[stage] += 1
                moved = True
                if stage == 0 and kind == "F":
                    back = sum(("B", 1, k) in done for k in range(batches))
                    ahead = max(ahead, n - (back - 1))
    assert place == [len(order) for order in orders]
    assert ahead <= stages + 1  # what `Spec.ahead` promises the other end of the link


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_both_ends_of_every_link_agree(stages: int) -> None:
    spec = ring(
        stages, train__micro_batches=7, train__wire=["fp32", "bf16", "int8", "fp32"][:stages]
    )
    opposite = {"up": "down", "down": "up"}
    assert spec.ahead == stages + 1
    for stage in range(stages):
        assert spec.links(0, stage) == ("up", "down")
        for link in spec.links(0, stage):
            _, other, back = spec.other_end(0, stage, link)
            assert (back, spec.other_end(0, other, back)) == (opposite[link], (0, stage, link))
            assert spec.wire(other, opposite[link]) == spec.wire(stage, link)
            assert spec.boundary(other, opposite[link]) == spec.boundary(stage, link)
            mine, theirs = (
                {
                    (direction, frame.seq)
                    for frame in step_frames(spec, 0, end, 3)
                    for direction in [frame.direction]
                    if frame.link == name
                }
                for end, name in ((stage, link), (other, opposite[link]))
            )
            assert {seq for d, seq in mine if d == "sent"} == {s for d, s in theirs if d != "sent"}
            assert len(mine) == len(theirs) == 14


def test_the_first_slot_alone_sees_data_and_loss() -> None:
    spec = ring(3)
    assert [spec.has_loss(n) for n in range(3)] == [True, False, False]
    assert [spec.reads_text(n) for n in range(3)] == [True, False, False]
    names = [{weight.name for weight in spec.weights(n)} for n in range(3)]
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= names[0]
    assert "lm_head.weight" not in set.union(*names)
    assert sum(len(own) for own in names) == len(set.union(*names))
    assert [kind for kind, _ in operations(spec, 0, 1)].count("H") == 0
    assert traffic(spec, 0, "H") == ("up", "up")
    assert stage_memory(spec, 0) > stage_memory(spec, 1)


def test_one_stage_is_no_ring() -> None:
    spec = ring(1)
    assert (spec.is_ring, spec.links(0, 0), spec.ahead, spec.frame_bytes) == (False, (), 1, 1)


def test_the_first_slot_of_a_ring_may_hold_no_layer() -> None:
    assert ring(3, pipeline__cuts=[0, 0, 2, 4]).layers(0) == (0, 0)
    with pytest.raises(SpecError, match="does not increase"):
        ring(3, pipeline__cuts=[0, 2, 2, 4])
    with pytest.raises(SpecError, match="does not increase"):
        family_spec("llama", 3, pipeline__cuts=[0, 0, 2, 4])
