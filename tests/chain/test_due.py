"""The due queue against a model: ordered by height, then by setting; moved, never doubled."""

from hypothesis import given
from hypothesis import strategies as st

from tdmld.chain import due
from tdmld.chain.codec import encode
from tdmld.chain.ledger import next_due
from tdmld.chain.records import Due, Timer
from tdmld.chain.state import State
from tests.chain.world import mark

entries = st.builds(
    Due, st.sampled_from([Timer.MATCH, Timer.AUDIT]), st.just(mark("job")), st.integers(0, 5)
)
heights = st.sampled_from([1, 2, 3, 1023, 1024, 1025, 5000, 2**20])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), entries, heights),
        st.tuples(st.just("cancel"), entries, st.just(0)),
        st.tuples(st.just("take"), st.none(), heights),
    ),
    max_size=60,
)


@given(steps)
def test_the_queue_behaves_like_a_sorted_list(script: list[tuple[str, Due | None, int]]) -> None:
    store: dict[bytes, bytes] = {}
    model: list[tuple[int, int, Due]] = []
    for turn, (action, entry, height) in enumerate(script):
        state = State(store.get)
        if action == "take":
            model.sort(key=lambda row: row[:2])
            wanted = model.pop(0)[2] if model and model[0][0] <= height else None
            assert due.take(state, height) == wanted
        else:
            assert entry is not None
            model = [row for row in model if row[2] != entry]
            if action == "put":
                model.append((height, turn, entry))
                due.put(state, entry, height)
                assert due.height_of(state, entry) == height
            else:
                due.cancel(state, entry)
                assert due.height_of(state, entry) is None
        for key, value in state.changes.items():
            if value is None:
                store.pop(key, None)
            else:
                store[key] = value
        assert next_due(store.get) == min((row[0] for row in model), default=None)
    if not model:
        assert store == {}


def test_an_entry_set_again_moves_to_the_end_of_its_new_height() -> None:
    state = State({}.get)
    one, two = (Due(Timer.DRAW, mark("job"), slot) for slot in range(2))
    due.put(state, one, 5)
    due.put(state, two, 5)
    due.put(state, one, 5)
    assert [due.take(state, 5), due.take(state, 5), due.take(state, 5)] == [two, one, None]


def test_deleted_records_leave_no_bytes() -> None:
    state = State({}.get)
    entry = Due(Timer.DRAW, mark("job"))
    due.put(state, entry, 7)
    due.cancel(state, entry)
    assert set(state.changes.values()) == {None}
    assert encode(entry)
