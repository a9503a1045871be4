"""The attackers by name. Twins are no class: two honest processes run with one key. Nor is who is
absent: an honest process that ends for good at some time."""

from tests.simulation.attackers.equivocator import Equivocator
from tests.simulation.attackers.faces import TwoFaces
from tests.simulation.attackers.liar import LyingParent
from tests.simulation.attackers.nuller import Nuller
from tests.simulation.attackers.silent import SilentLeader
from tests.simulation.attackers.stale import StaleVotes
from tests.simulation.attackers.timer import Timer
from tests.simulation.attackers.withholder import Withholder
from tests.simulation.parts import Eyes

TWINS, ABSENT = "twins", "absent"

ATTACKERS: dict[str | None, type[Eyes]] = {
    "equivocator": Equivocator,
    "lying parent": LyingParent,
    "nuller": Nuller,
    "silent leader": SilentLeader,
    "stale votes": StaleVotes,
    "timer": Timer,
    "two faces": TwoFaces,
    "withholder": Withholder,
}
