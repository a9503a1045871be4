"""What findings of witnesses mean. Pure: no clock, no network.

**open**     others can dial us: at least half of the witnesses that count did.
**closed**   they cannot: others reach us through relays and punched holes only.
**unknown**  nobody has tried.

Once one witness sees us from the Internet, those on our own side of a router (a local address, the
same IP address, the same /64 of IPv6) say nothing about the others any more and do not count. One
voice an owner is the caller's business.
Nothing that costs anybody anything rests on this: the chain counts receipts of other owners.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from tdmld.node.reachask import Trial
from tdmld.node.reachwire import MAX_DIALLED, ip_of

State = Literal["open", "closed", "unknown"]
MAX_ANNOUNCED = 8
"""Addresses in a peer record."""


def verdict(trials: Sequence[tuple[Trial, bool]]) -> State:
    """Of trials, each with whether its witness sees us from the Internet."""
    done = [(trial, public) for trial, public in trials if trial.reached is not None]
    if any(public for _, public in done):
        done = [(trial, public) for trial, public in done if public]
    if not done:
        return "unknown"
    reached = sum(trial.reached is True for trial, _ in done)
    return "open" if 2 * reached >= len(done) else "closed"


def candidates(seen_at: str, listening: Sequence[str], announced: Sequence[str]) -> tuple[str, ...]:
    """Where a witness that sees us at an IP address may dial us: what we announce there, and the
    ports on which we listen there (a router may forward them as they are)."""
    if not seen_at:
        return ()
    here = [text for text in (*announced, *listening) if ip_of(text) == seen_at]
    family = "ip6" if ":" in seen_at else "ip4"
    loopback = seen_at.startswith("127.") or seen_at == "::1"
    for text in listening:
        # Who listens on this machine only is not behind a forwarded port either.
        if loopback or not is_loopback_text(text):
            here.append(f"/{family}/{seen_at}/tcp/{text.rpartition('/')[2]}")
    return tuple(dict.fromkeys(here))[:MAX_DIALLED]


def is_loopback_text(address: str) -> bool:
    """Whether a direct multiaddr names the machine itself."""
    ip = ip_of(address)
    return ip.startswith("127.") or ip == "::1"


def announced(
    configured: Iterable[str],
    findings: Iterable[Trial],
    mapped: Iterable[str],
    relayed: Iterable[str],
    listening: Iterable[str],
    *,
    state: State,
) -> tuple[str, ...]:
    """What the peer record says, best first: what people configured, what was dialled with success,
    what a router forwards (unless that was tried in vain), relays, interfaces."""
    trials = list(findings)
    proven = [trial.address for trial in trials if trial.address]
    forwarded = () if state == "closed" else mapped
    found = dict.fromkeys((*configured, *proven, *forwarded, *relayed, *listening))
    return tuple(found)[:MAX_ANNOUNCED]
