"""The table: every rule of core, pacing and shell, mutants that break it, and what kills each.

A mutant is killed when a committed seed or a directed trace, which the product passes, fails with
it. `RULES` is complete: a test compares it with the rules that the modules' heads number.
"""

from dataclasses import dataclass

from tdmld.chain.consensus import Simplex
from tdmld.chain.pacing import Pacing
from tdmld.chain.pending import BlockTree
from tests.simulation import mutants_core as core
from tests.simulation import mutants_epochs as epochs
from tests.simulation import mutants_pacing as pacing
from tests.simulation import mutants_shell as shell
from tests.simulation.directed import core as cores
from tests.simulation.directed import epochs as edges
from tests.simulation.directed import pacing as paces
from tests.simulation.directed import shell as shells
from tests.simulation.directed.base import Trace
from tests.simulation.disk import Store
from tests.simulation.facts import stand_ins
from tests.simulation.node import Node
from tests.simulation.parts import Eyes, Terms, WatchedBodies, Wires
from tests.simulation.world import run_seed

PARTS = (
    (Simplex, "simplex"),
    (Pacing, "pacing_type"),
    (BlockTree, "tree_type"),
    (WatchedBodies, "bodies_type"),
    (Eyes, "validator_type"),
    (Terms, "succession_type"),
    (Wires, "links_type"),
    (Store, "store_type"),
)
"""What a mutant may replace, and by what name a node has it."""

SEARCHED = 400
"""Seeds that `killer` tries when the committed one does not kill any more."""


@dataclass(frozen=True)
class Mutant:
    """`broken` replaces the part of the node that it is a subclass of."""

    rule: str
    broken: type
    killer: int | Trace

    @property
    def name(self) -> str:
        return self.broken.__name__

    @property
    def node(self) -> type[Node]:
        """The class of nodes with this defect."""
        if issubclass(self.broken, Node):
            return self.broken
        for base, attribute in PARTS:
            if issubclass(self.broken, base):
                return type(self.name, (Node,), {attribute: self.broken})
        raise TypeError(f"{self.name} replaces no part of a node")

    def killed(self, by: int | Trace | None = None) -> str:
        """What its killer, or another one, says of the mutant; empty when the mutant survives."""
        killer = self.killer if by is None else by
        try:
            with stand_ins():
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
    Mutant("S2", core.NotarizesTwice, 0),
    Mutant("S2", core.NotarizesAfterNullify, 3),
    Mutant("S2", core.NotarizesOtherViews, 0),
    Mutant("S3", core.AnyParent, cores.wants_a_notarized_parent),
    Mutant("S3", core.AnyGap, cores.wants_no_gap),
    Mutant("S3", core.FinalizesUncertified, 0),
    Mutant("S4", core.FinalizesAfterNullify, 9),
    Mutant("S4", core.NullifiesAfterFinalize, 1),
    Mutant("S5", core.NullifiesAhead, 1),
    Mutant("S6", core.StaysAfterNotarization, 0),
    Mutant("S6", core.StaysAfterNullification, 1),
    Mutant("S6", core.SkipsNothing, cores.takes_far_certificates),
    Mutant("S7", core.NoDepthBound, cores.bounds_the_depth),
    Mutant("S7", core.StopsAtDepth, cores.bounds_the_depth),
    Mutant("S8", core.FirstVoteOnly, cores.counts_every_variant),
    Mutant("S8", core.CountsEverything, cores.bounds_its_tables),
    Mutant("S8", core.NearCertificatesOnly, cores.takes_far_certificates),
    Mutant("S8", shell.EndlessVariants, cores.bounds_its_bodies),
    Mutant("S9", core.CountsUnstored, 0),
    Mutant("S9", core.ForgetsCertificates, cores.survives_a_common_restart),
    Mutant("S9", shell.Amnesiac, 8),
    Mutant("S10", core.ForgetsNothing, 0),
    Mutant("S10", core.FinalizesNothing, cores.says_what_is_final),
    Mutant("S10", shell.LastBlockOnly, 0),
    Mutant("S11", core.ForwardsNothing, cores.forwards_nullifications),
    Mutant("S11", core.ForwardsNoContradicted, cores.forwards_contradictions),
    Mutant("S11", core.AnswersNobody, cores.answers_the_lost),
    Mutant("P1", pacing.TimerAtEntry, paces.rests),
    Mutant("P2", pacing.NoInterval, paces.keeps_the_interval),
    Mutant("P2", pacing.TimerFromEntry, paces.costs_two_blocks),
    Mutant("P2", pacing.NeverTimesOut, 1),
    Mutant("P3", pacing.NoHeartbeat, paces.beats),
    Mutant("P3", pacing.DeafPacing, paces.follows_the_demand_of_others),
    Mutant("P3", pacing.NoPatience, paces.is_patient),
    Mutant("P3", pacing.NoTip, paces.finishes_a_late_finalization),
    Mutant("P4", pacing.TimerOutlivesDemand, paces.forgets_old_demand),
    Mutant("P5", pacing.NeverGrows, paces.grows_patient),
    Mutant("P5", pacing.NeverShrinks, paces.recovers_its_pace),
    Mutant("P5", pacing.WaitsForTheAbsent, paces.skips_the_absent),
    Mutant("P6", pacing.TalksAlone, paces.is_silent_alone),
    Mutant("P7", pacing.SaysItOnce, paces.says_it_again),
    Mutant("P8", shell.ProposesWhileLagging, paces.proposes_what_it_executed),
    Mutant("N1", shell.SendsUnstored, 0),
    Mutant("N1", shell.SendsUnsynced, 2),
    Mutant("N2", shell.RestartSaysNothing, shells.tells_what_it_stored),
    Mutant("N2", shell.ProposesAgain, shells.proposes_once),
    Mutant("N3", shell.JudgesByView, shells.asks_for_a_lost_body),
    Mutant("N3", shell.AsksForNothing, shells.asks_for_a_lost_body),
    Mutant("N4", shell.TrustsState, shells.waits_for_its_execution),
    Mutant("N4", shell.TrustsClocks, shells.waits_for_the_time),
    Mutant("N4", shell.RefusesTheFuture, shells.waits_for_the_time),
    Mutant("N4", shell.NeverLooksAgain, shells.waits_for_the_time),
    Mutant("N5", shell.NamesTheUnexecuted, 0),
    Mutant("N6", shell.SpeaksAtOnce, shells.abstains_after_a_wipe),
    Mutant("N6", shell.SpeaksWhenGreeted, shells.abstains_after_a_wipe),
    Mutant("N6", shell.AbstainsWhenItJoins, edges.joins_at_once),
    Mutant("N6", shell.SpeaksAtEveryEdge, edges.abstains_at_the_edge),
    Mutant("N6", shell.SleepsWhenGreeted, shells.leads_when_greeted),
    Mutant("N6", shell.NeverSpeaks, shells.speaks_when_needed),
    Mutant("N6", shell.SwallowsTimeOut, shells.makes_up_for_time_outs),
    Mutant("N7", epochs.NeverAgain, edges.votes_again),
    Mutant("N7", epochs.OnceAgain, edges.votes_again),
    Mutant("N7", epochs.TicksOn, 0),
    Mutant("N7", epochs.ProposesOnTheLast, edges.proposes_nothing_on_the_last),
    Mutant("N8", shell.AccusesNobody, shells.accuses_who_votes_twice),
    Mutant("N8", shell.ComparesNothing, shells.accuses_who_proposes_twice),
    Mutant("N8", shell.AccusesAgain, 0),
    Mutant("N9", shell.StaysInJail, shells.returns_from_jail),
    Mutant("N9", shell.ReturnsAgainAndAgain, shells.returns_from_jail),
    Mutant("EPOCH-1", epochs.ViewsGoOn, 0),
    Mutant("EPOCH-1", epochs.TakesAnyEpoch, edges.takes_nothing_of_another_epoch),
    Mutant("EPOCH-2", epochs.TrustsSets, edges.computes_the_sets),
    Mutant("EPOCH-5", epochs.CountsTheEdgeAsFailure, 0),
    Mutant("EPOCH-5", epochs.ForgivesTheEdge, edges.knows_who_was_passed_over),
    Mutant("EPOCH-6", epochs.TakesChildren, edges.votes_for_no_child),
    Mutant("EPOCH-6", epochs.BeginsUnfinal, 0),
    Mutant("EPOCH-6", epochs.WantsTheViewOfTheBlock, edges.catches_up_over_a_later_view),
    Mutant("early", epochs.KeepsEverything, edges.keeps_little_of_what_came_early),
    Mutant("early", epochs.KeepsEveryBlock, edges.keeps_little_of_what_came_early),
    Mutant("early", epochs.KeepsNothing, edges.hears_what_came_early),
    Mutant("late", epochs.IgnoresTheLate, edges.tells_who_is_late),
    Mutant("links", epochs.LinksTooLate, edges.links_an_epoch_early),
    Mutant("links", epochs.LeavesAtOnce, edges.outlives_who_leaves),
)


def killer(mutant: Mutant) -> int | Trace | None:
    """What kills the mutant: what is committed, else the first seed that does; None for nobody."""
    if mutant.killed():
        return mutant.killer
    return next((seed for seed in range(SEARCHED) if mutant.killed(seed)), None)
