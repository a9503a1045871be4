"""Every limit of the ledger that is a rule of the protocol, with its reason.

Windows and prices that a network may choose are genesis parameters; what stands here bounds the
work of one transaction, one due entry or one record, and is the same on every network.
"""

TRANSACTION_BYTES = 8192
"""Greatest transaction on the wire: an Offer with STAGES stages takes about 1,500 bytes."""
SPEC_BYTES = 65_536
"""Greatest canonical spec (ANNEX A1)."""
TEXT_BYTES = 64
"""Class ids and privacy modes."""
MISSING_BYTES = 128
"""What an AuditFail says was missing."""

STAGES = 64
LANES = 16
"""Lanes of a job: in lane mode sync each slot has a link to all others of its stage."""
LINKS = LANES + 1
"""Links of a slot: up, down, and one to each other lane."""
LANE_WEIGHT = 64
SLOTS = 256
"""Slots of a job: bounds matching, refund and closing, which look at each of them."""
UNSETTLED = 64
"""D: bounds what a refund of one slot has to look at."""
ROUNDS = 1 << 20
SEGMENT_STEPS = 1 << 20
SEGMENT_TOKENS = 1 << 40
PARAMETERS = 1 << 44
MEMORY_BYTES = 1 << 50
PRICE = 1 << 53
"""Greatest price in any offer or ask."""
AUDIT_CAPACITY = 1024
"""Greatest number of open audits that one node may declare."""
DEADLINE_BLOCKS = 1 << 20
"""How far ahead a due entry may lie: bounds the index of the due queue."""
DUE_BUCKET = 1024
"""Heights in one bucket of the due index."""

UNBONDINGS = 16
"""Unbonding entries of one owner; those of one epoch and bucket are one."""

ABSENCES = 4096
"""Views of one gap that are counted as missed turns: bounds a block's work. The last ones, since a
longer gap is an outage of everybody anyway; it is also the longest period of a rotation."""
JAIL_MISSES = 3
"""Missed turns of an epoch below which nobody is jailed: a restart is no absence."""

RATE_ONE = 1_000_000
"""Rates and reputation are parts of a million."""
MATCH_TRIES = 4
"""First matching and three more without the decliners."""
MATCH_COST = 10
"""One part in so many of the deposit burns for each matching: it looks at every ask."""
ASKS = 8
"""Asks of one node in an epoch: they are free. More than the one that it needs, so that a machine
whose carrier was started again is soon reached by auditors."""

RECEIPTS = 8
"""Dial receipts in an ask: each costs a signature check, and asks are free."""

INCARNATIONS = 20
"""Incarnations of a slot: vacancies, and nodes that were asked to fill them. Each may cost
`unsettled` segments once more, which the fees that an offer locks cover."""
ROLLBACKS = 8
"""Rollbacks of a job, each of which may cost every slot `unsettled` segments once more."""
STANDBY_TURNS = 32
"""Times that the standby's place is filled anew."""
STALLS = 32
"""Accusations that one slot may make in a job."""
STALLS_OF_PAIR = 3
"""The accusation by one neighbour, all found untrue, that separates the pair."""
UNPROVEN_COPIES = 2
"""Copies on end that were not proven: their standby, or the worker that did not confirm them, is
replaced."""
LINK_NAME = 8
"""Name of a link, in code points."""

STANDBY_SLOT = 0xFFFF_FFFF
"""The `slot` of an Accept or Decline by the job's standby."""

RECORD_BYTES = 1 << 30
"""Greatest stored record. Out of reach on purpose: a record that outgrew it, say an index bucket of
a very large network, would end every node at the same block."""
