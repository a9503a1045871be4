"""The table: every rule of core, pacing and shell, mutants that break it, and what kills each.

A mutant is killed when a committed seed or a directed trace, which the product passes, fails with
it. `RULES` is complete: a test compares it with the rules that the modules' heads number.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tdmld.chain.consensus import Simplex
from tdmld.chain.pacing import Pacing
from tdmld.chain.pending import BlockTree
from tests.simulation import mutants_core as core
from tests.simulation import mutants_pacing as pacing
from tests.simulation import mutants_shell as shell
from tests.simulation import traces
from tests.simulation.node import Node
from tests.simulation.world import run_seed

Trace = Callable[[type[Node]], None]

SEARCHED = 400
"""Seeds that `killer` tries when the committed one does not kill any more."""


@dataclass(frozen=True)
class Mutant:
    """`broken` replaces the part of the node that it is a subclass of."""

    rule: str
    broken: type[Node] | type[Simplex] | type[Pacing] | type[BlockTree]
    killer: int | Trace

    @property
    def name(self) -> str:
        return self.broken.__name__

    @property
    def node(self) -> type[Node]:
        """The class of nodes with this defect."""
        if issubclass(self.broken, Node):
            return self.broken
        for base, attribute in (
            (Simplex, "simplex"),
            (Pacing, "pacing_type"),
            (BlockTree, "tree_type"),
        ):
            if issubclass(self.broken, base):
                return type(self.name, (Node,), {attribute: self.broken})
        raise TypeError(f"{self.name} replaces no part of a node")

    def killed(self, by: int | Trace | None = None) -> str:
        """What its killer, or another one, says of the mutant; empty when the mutant survives."""
        killer = self.killer if by is None else by
        try:
            if isinstance(killer, int):
                run_seed(killer, self.node)
            else:
                killer(self.node)
        except AssertionError as broken:
            return f"{type(broken).__name__}: {broken}"
        return ""


MUTANTS = (
    Mutant("S1", core.HalfQuorum, 0),
    Mutant("S1", core.ThirdQuorum, 0),
    Mutant("S1", core.CountsHeads, 0),
    Mutant("S2", core.NotarizesTwice, 85),
    Mutant("S2", core.NotarizesAfterNullify, 0),
    Mutant("S2", core.NotarizesOtherViews, 0),
    Mutant("S3", core.AnyParent, traces.wants_a_notarized_parent),
    Mutant("S3", core.AnyGap, 5),
    Mutant("S3", core.FinalizesUncertified, 0),
    Mutant("S4", core.FinalizesAfterNullify, 3),
    Mutant("S4", core.NullifiesAfterFinalize, 3),
    Mutant("S5", core.NullifiesAhead, 0),
    Mutant("S6", core.StaysAfterNotarization, 0),
    Mutant("S6", core.StaysAfterNullification, 0),
    Mutant("S6", core.SkipsNothing, 8),
    Mutant("S7", core.NoDepthBound, traces.bounds_the_depth),
    Mutant("S7", core.StopsAtDepth, traces.bounds_the_depth),
    Mutant("S8", core.FirstVoteOnly, traces.counts_every_variant),
    Mutant("S8", core.CountsEverything, traces.bounds_its_tables),
    Mutant("S8", core.NearCertificatesOnly, traces.takes_far_certificates),
    Mutant("S8", shell.EndlessVariants, traces.bounds_its_bodies),
    Mutant("S9", core.CountsUnstored, 0),
    Mutant("S9", core.ForgetsCertificates, traces.survives_a_common_restart),
    Mutant("S9", shell.Amnesiac, 10),
    Mutant("S10", core.ForgetsNothing, 0),
    Mutant("S10", core.FinalizesNothing, 0),
    Mutant("S10", shell.LastBlockOnly, 3),
    Mutant("S11", core.ForwardsNothing, traces.forwards_nullifications),
    Mutant("S11", core.ForwardsNoContradicted, traces.forwards_contradictions),
    Mutant("S11", core.AnswersNobody, traces.answers_the_lost),
    Mutant("P1", pacing.TimerAtEntry, traces.rests),
    Mutant("P2", pacing.NoInterval, traces.keeps_the_interval),
    Mutant("P2", pacing.TimerFromEntry, traces.costs_two_blocks),
    Mutant("P2", pacing.NeverTimesOut, 2),
    Mutant("P3", pacing.NoHeartbeat, traces.beats),
    Mutant("P3", pacing.DeafPacing, traces.follows_the_demand_of_others),
    Mutant("P3", pacing.NoPatience, traces.is_patient),
    Mutant("P3", pacing.NoTip, traces.finishes_a_late_finalization),
    Mutant("P4", pacing.TimerOutlivesDemand, traces.forgets_old_demand),
    Mutant("P5", pacing.NeverGrows, traces.grows_patient),
    Mutant("P5", pacing.NeverShrinks, traces.recovers_its_pace),
    Mutant("P5", pacing.WaitsForTheAbsent, traces.skips_the_absent),
    Mutant("P6", pacing.TalksAlone, traces.is_silent_alone),
    Mutant("P7", pacing.SaysItOnce, traces.says_it_again),
    Mutant("P8", shell.ProposesWhileLagging, traces.proposes_what_it_executed),
    Mutant("N1", shell.SendsUnstored, 0),
    Mutant("N1", shell.SendsUnsynced, 10),
    Mutant("N2", shell.RestartSaysNothing, traces.tells_what_it_stored),
    Mutant("N2", shell.ProposesAgain, 35),
    Mutant("N3", shell.JudgesByView, traces.asks_for_a_lost_body),
    Mutant("N3", shell.AsksForNothing, traces.asks_for_a_lost_body),
    Mutant("N4", shell.TrustsState, 2),
    Mutant("N4", shell.TrustsClocks, 22),
    Mutant("N4", shell.RefusesTheFuture, traces.waits_for_the_time),
    Mutant("N4", shell.NeverLooksAgain, traces.waits_for_the_time),
    Mutant("N5", shell.NamesTheUnexecuted, 18),
    Mutant("N6", shell.SpeaksAtOnce, traces.abstains_after_a_wipe),
    Mutant("N6", shell.SpeaksWhenGreeted, traces.abstains_after_a_wipe),
    Mutant("N6", shell.NeverSpeaks, traces.speaks_when_needed),
    Mutant("N6", shell.SwallowsTimeOut, traces.makes_up_for_time_outs),
)


def killer(mutant: Mutant) -> int | Trace | None:
    """What kills the mutant: what is committed, else the first seed that does; None for nobody."""
    if mutant.killed():
        return mutant.killer
    return next((seed for seed in range(SEARCHED) if mutant.killed(seed)), None)
