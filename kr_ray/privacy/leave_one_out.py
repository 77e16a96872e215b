"""Which other runs an attacked run is compared with, so that the
audit's design does not give its membership away.

Where every sample is in exactly half of the runs, the others' membership settles the attacked run's own: of 4
runs, a member sees one other run with the sample and two without it. Whatever then depends on these numbers
(a variance's degrees of freedom, the noise of a mean) is an attack on the design, not on the models: on pure
noise such a leave-one-out "proved" an epsilon of 2 to 4.

The rule, by what `member` shows of the design:
* Runs in pairs, one the complement of the other (`canaries.AuditDesign`): the partner is left out with the
  attacked run. The coin of a pair is tossed independently of all others, so what is left does not depend on
  it at all.
* Every sample in the same number k of runs: with the attacked run one run of the *opposite* side is left out,
  drawn without regard to any score. Member or not, the run then sees k - 1 runs inside and N - k - 1 outside.
* Numbers that differ (a coin per run and sample): the larger side is
  cut at random to the size of the smaller.

Why this is sound: take all answers of all models as given and let them know nothing of membership. The two
sets of other runs that a run is compared with are disjoint random sets of the same sizes whether the run had
the sample or not, in the first two cases for every k, in the third wherever being in and being out are
interchangeable. So the scores of members and of non-members have one distribution, whatever the models and
the samples are like, and no attack that sees the other runs only through these sets can tell them apart.
(Jointly the scores of one sample stay dependent: intervals resample or cluster samples.)

Independent coins that are not fair are sound as well, if the rule that every sample is in two runs and out of
two (which `check_member` asks for) settles nothing: a run is `judged` on a sample only if the other runs
alone satisfy that rule.

Not covered: numbers that were fixed beforehand *and* differ between
samples, at a share of members other than a half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kr_ray.privacy.arrays import BoolArray, FloatArray, IndexArray
from kr_ray.privacy.scores import MIN_MODELS


@dataclass(frozen=True)
class LeaveOneOut:
    """The comparisons of an audit; made by `leave_one_out`.

    Attributes:
        member: bool [models, samples].
        rank: place of each run among those of its side, per sample, in an order that is random and the same
            whatever `member`; int64 [models, samples].
        partner: int64 [models], each run's complement; None where runs do not come in pairs.
    """

    member: BoolArray
    rank: IndexArray
    partner: IndexArray | None

    def others(self, run: int) -> BoolArray:
        """Runs whose answers on a sample may be used against `run`: bool [models,
        samples]. A function of the other runs' rows."""
        if self.partner is not None:
            kept = np.ones_like(self.member)
            kept[[run, int(self.partner[run])]] = False
            return kept
        own, inside = self.member[run], self.member.sum(axis=0)
        others_in, others_out = inside - own, len(self.member) - inside - ~own
        if self._one_number:
            keep_in, keep_out = others_in - ~own, others_out - own
        else:
            keep_in = keep_out = np.minimum(others_in, others_out)
        # Where `run` has left its side, those behind it move up.
        place = self.rank - ((self.member == own) & (self.rank > self.rank[run]))
        kept = place < np.where(self.member, keep_in, keep_out)
        kept[run] = False
        return kept

    def sides(self, run: int) -> tuple[FloatArray, FloatArray]:
        """Weights 1 and 0 of the other runs with the sample and of
        those without it, float64 [models, samples]."""
        others = self.others(run)
        return (others & self.member).astype(np.float64), (others & ~self.member).astype(np.float64)

    def strangers(self, run: int) -> BoolArray:
        """Runs whose answers on images that no run saw may be used against `run`:
        all but itself and its partner, bool [models]."""
        kept = np.ones(len(self.member), dtype=np.bool_)
        kept[run] = False
        if self.partner is not None:
            kept[self.partner[run]] = False
        return kept

    @property
    def judged(self) -> BoolArray:
        """Pairs of a run and a sample that say something: bool [models,
        samples]; all of them but for numbers that differ."""
        if self.partner is not None or self._one_number:
            return np.ones_like(self.member)
        others_in = self.member.sum(axis=0) - self.member
        others_out = (~self.member).sum(axis=0) - ~self.member
        judged: BoolArray = np.minimum(others_in, others_out) >= MIN_MODELS
        return judged

    @property
    def _one_number(self) -> bool:
        inside = self.member.sum(axis=0)
        return bool((inside == inside[0]).all())


def leave_one_out(member: BoolArray) -> LeaveOneOut:
    """The comparisons for the audit of `member`, bool [models, samples]; the same for the same `member`."""
    order = np.random.default_rng(0).random(member.shape).argsort(axis=0)
    in_order = np.take_along_axis(member, order, axis=0)
    place = np.where(in_order, in_order.cumsum(axis=0), (~in_order).cumsum(axis=0)) - 1
    rank = np.empty_like(place)
    np.put_along_axis(rank, order, place, axis=0)
    return LeaveOneOut(member, rank, _partners(member))


def _partners(member: BoolArray) -> IndexArray | None:
    """Each run's complement, the neighbour first; None if a run has none."""
    models = len(member)
    if models % 2 == 0 and (member[0::2] == ~member[1::2]).all():
        return np.arange(models) ^ 1
    inside = member.astype(np.float64)
    opposite = inside @ inside.T + (1 - inside) @ (1 - inside).T == 0
    return opposite.argmax(axis=1) if opposite.any(axis=1).all() else None
