"""What a host can be asked for: bounded, each message as old everywhere, nothing listed twice."""

from tdmld.p2p.recent import SETTLE_SECONDS, WINDOW_SECONDS, Page, Recent


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def put(store: Recent, number: int, now: float = 0.0, **options) -> None:
    settings = {"topic": "t", "source": b"a", "raw": bytes(10), "age": None} | options
    store.hold(key(number), now=now, **settings)


def numbers(page: Page) -> list[int]:
    return [int.from_bytes(held.key, "big") for held in page.messages]


def test_who_asks_again_hears_only_what_is_new():
    store = Recent()
    for number in range(5):
        put(store, number)
    first = store.since(0, {"t"}, SETTLE_SECONDS, 3)
    assert (numbers(first), first.more) == ([0, 1, 2], True)
    second = store.since(first.upto, {"t"}, SETTLE_SECONDS, 3)
    assert (numbers(second), second.more) == ([3, 4], False)
    put(store, 5, topic="u", now=SETTLE_SECONDS)
    put(store, 6, now=SETTLE_SECONDS)
    third = store.since(second.upto, {"t"}, 2 * SETTLE_SECONDS, 3)
    assert (numbers(third), third.upto) == ([6], store.top)


def test_what_is_on_its_way_is_not_offered_and_not_forgotten():
    store = Recent()
    put(store, 1)
    put(store, 2, now=1.0)
    put(store, 3, now=1.0, age=30.0)
    page = store.since(0, {"t"}, SETTLE_SECONDS, 10)
    assert numbers(page) == [1, 3]
    later = store.since(page.upto, {"t"}, SETTLE_SECONDS + 1, 10)
    assert numbers(later) == [2, 3]


def test_a_message_is_dropped_at_the_same_time_wherever_it_came_from():
    store = Recent()
    put(store, 1)
    put(store, 2, now=10.0, age=WINDOW_SECONDS - 1)
    put(store, 3, now=10.0, age=WINDOW_SECONDS)
    assert key(3) not in store
    assert store.get(key(2), 10.9) is not None
    assert store.get(key(2), 11.1) is None
    assert numbers(store.since(0, {"t"}, 11.1, 10)) == [1]
    assert store.get(key(1), WINDOW_SECONDS) is None
    put(store, 4, now=WINDOW_SECONDS)
    assert len(store) == 1


def test_a_flooder_pushes_out_its_own():
    store = Recent(max_bytes=100_000, max_messages=100)
    for number in range(10):
        put(store, number, source=b"honest", raw=bytes(100))
    for number in range(100, 1000):
        put(store, number, source=b"flood", raw=bytes(500))
    for flooder in range(5):
        for number in range(20):
            put(store, 10_000 + 20 * flooder + number, source=b"%d" % flooder, raw=bytes(400))
    assert store.size <= 100_000
    assert len(store) <= 100
    assert all(key(number) in store for number in range(10))


def test_a_great_flood_leaves_nothing_behind():
    store = Recent(max_messages=8)
    for number in range(100):
        put(store, number, now=float(number), source=b"%d" % (number % 3))
    put(store, 1000, now=100 + WINDOW_SECONDS)
    assert len(store) == len(store._numbers) == len(store._shares) == 1
    assert store.size == store.get(key(1000), 200.0).cost
