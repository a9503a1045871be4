"""Reputation: a published integer formula over facts that are on the chain, in millionths.

    experience = segments settled + audits with a verdict + standby proofs
    reputation = (100,000 + 900,000 * experience / (experience + 100))
                 * 10 / (10 + faults + 10 * mismatches)

A newcomer starts at 100,000; ten faults, or one mismatch, halve what was earned. Facts count for
the owner, so that a new node key buys no new start. Reputation is never a gate; it weighs prices
in matching.
"""

from tdmld.chain.accounts import (
    Facts,
)

START = 100_000


def reputation(facts: Facts) -> int:
    """0 to 1,000,000."""
    experience = facts.segments + facts.audits + facts.proofs
    earned = START + 900_000 * experience // (experience + 100)
    return earned * 10 // (10 + facts.faults + 10 * facts.mismatches)
