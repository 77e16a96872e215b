"""The ledger against published and exact figures, Opacus' accountant and dp-accounting's, and against what it
must refuse."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import optimize, stats

from kr_ray.privacy.accountants import (
    epsilon_of,
    event_of_record,
    event_record,
    gaussian,
    library,
    poisson_gaussian,
    together,
)
from kr_ray.privacy.ledger import LedgerError, calibrate_noise, check_target, default_delta, guarantee

N = 60_000
DELTA = 1e-5


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Root of the Gaussian mechanism's privacy curve (Balle and Wang 2018, theorem 8), without the
    library."""
    shift = 1 / noise_multiplier

    def excess(epsilon: float) -> float:
        above = stats.norm.logcdf(-shift / 2 - epsilon / shift)
        return stats.norm.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon + above) - delta

    return float(optimize.brentq(excess, 0, 200))


@pytest.mark.parametrize(("epsilon", "noise_multiplier"), [(1, 3.730632), (2, 1.9938), (10, 0.499889)])
def test_one_gaussian_has_its_exact_epsilon_and_is_calibrated_to_it(
    epsilon: float, noise_multiplier: float
) -> None:
    found, accountant = epsilon_of([gaussian(noise_multiplier)], DELTA)
    assert found == pytest.approx(epsilon, rel=1e-4) and accountant == "exact"
    assert found == pytest.approx(gaussian_epsilon(noise_multiplier, DELTA), rel=1e-6)
    chosen = calibrate_noise(gaussian, epsilon, DELTA)
    assert noise_multiplier * (1 - 1e-4) <= chosen <= noise_multiplier * 1.0011


@pytest.mark.parametrize(
    ("batch", "noise_multiplier", "epochs", "pld", "rdp"),
    [(256, 1.1, 60, 2.3817, 2.5966), (256, 1.3, 15, 0.8645, 0.9544), (256, 0.7, 45, 5.6394, 6.3195)],
)
def test_dp_sgd_has_the_known_epsilons(
    batch: int, noise_multiplier: float, epochs: int, pld: float, rdp: float
) -> None:
    """The known PLD figures are of ten times finer privacy losses: ours may be a little above them, never
    below."""
    event = poisson_gaussian(batch / N, noise_multiplier, N * epochs // batch)
    epsilon, accountant = epsilon_of([event], DELTA)
    assert accountant == "PLD" and pld - 1e-3 <= epsilon <= pld * 1.01
    reference = library("dp_accounting.rdp").RdpAccountant()
    reference.compose(event)
    assert reference.get_epsilon(DELTA) == pytest.approx(rdp, rel=1e-3) and epsilon < rdp


@pytest.mark.parametrize(
    ("records", "known"),
    [(546, (8.6, 3.4, 1.5)), (1080, (6.0, 2.4, 1.1)), (4708, (2.8, 1.2, 0.54)), (11_959, (1.75, 0.76, 0.35))],
)
def test_small_medical_sets_have_the_known_epsilons(records: int, known: tuple[float, ...]) -> None:
    """BreastMNIST to PathMNIST in size: B 256, 30 epochs, delta N^-1.1, by RDP; ours is tighter."""
    for noise_multiplier, epsilon in zip((2.0, 4.0, 8.0), known, strict=True):
        event = poisson_gaussian(256 / records, noise_multiplier, round(30 * records / 256))
        reference = library("dp_accounting.rdp").RdpAccountant()
        reference.compose(event)
        assert reference.get_epsilon(records**-1.1) == pytest.approx(epsilon, rel=0.04)  # known to two digits
        assert 0.7 * epsilon < epsilon_of([event], records**-1.1)[0] < 1.03 * epsilon


def test_dp_sgd_agrees_with_opacus_own_accountant() -> None:
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    prv.history = [(1.0, 1024 / N, 1171)]
    epsilon, _ = epsilon_of([poisson_gaussian(1024 / N, 1.0, 1171)], DELTA)
    assert epsilon == pytest.approx(prv.get_epsilon(DELTA), rel=5e-3)
    # prv-accountant's own bounds for it (Gopi et al. 2021).
    assert 3.447 < epsilon < 3.647 and epsilon == pytest.approx(3.5468, abs=2e-3)


@pytest.mark.parametrize(("epsilon", "noise_multiplier"), [(1.0, 2.335), (10.0, 0.656)])
def test_dp_sgd_is_calibrated_to_the_known_noise(epsilon: float, noise_multiplier: float) -> None:
    def event(z: float) -> object:
        return poisson_gaussian(1024 / N, z, 20 * N // 1024)

    chosen = calibrate_noise(event, epsilon, DELTA)  # type: ignore[arg-type]
    assert chosen == pytest.approx(noise_multiplier, rel=3e-3)
    assert epsilon_of([event(chosen)], DELTA)[0] <= epsilon  # type: ignore[list-item]


def test_many_gaussians_are_one() -> None:
    answers = gaussian(50.0, 179)
    assert epsilon_of([answers], DELTA)[0] == pytest.approx(
        gaussian_epsilon(50 / math.sqrt(179), DELTA), rel=1e-6
    )
    assert epsilon_of([answers], DELTA)[0] <= 1 < epsilon_of([gaussian(50.0, 180)], DELTA)[0]
    parts = [gaussian(50.0, 100), together(gaussian(50.0, 79))]
    assert epsilon_of(parts, DELTA) == epsilon_of([answers], DELTA)


def test_composition_costs_less_than_adding_up_and_more_than_either() -> None:
    """Known: with a generator of epsilon 0.5 a teacher of B 1,024 x 10 epochs needs noise 2.010 for 1 in all
    (alone: 0.84)."""
    generator = gaussian(calibrate_noise(gaussian, 0.5, DELTA))
    steps = 10 * N // 1024
    noise = calibrate_noise(lambda z: poisson_gaussian(1024 / N, z, steps), 1.0, DELTA, [generator])
    assert noise == pytest.approx(2.010, rel=5e-3)
    alone = epsilon_of([poisson_gaussian(1024 / N, noise, steps)], DELTA)[0]
    assert alone == pytest.approx(0.84, abs=0.01) and alone < 1 < alone + 0.5


def test_a_part_without_an_event_makes_epsilon_infinite() -> None:
    found = guarantee({"generator": gaussian(3.8), "teacher": None}, N)
    assert math.isinf(found.epsilon) and not found.holds and found.uncovered == ("teacher",)
    assert "inf" in found.words() and "teacher" in found.words() and found.record().epsilon is None
    non_private = library("dp_accounting.dp_event").NonPrivateDpEvent()
    assert math.isinf(guarantee({"a": gaussian(3.8), "b": non_private}, N).epsilon)


def test_nothing_released_costs_nothing() -> None:
    found = guarantee({}, N)
    assert found.epsilon == 0 and found.holds


def test_words_say_what_the_number_means_and_when_it_means_nothing() -> None:
    small = guarantee({"student": gaussian(3.8)}, 2000, 1e-5)
    assert small.holds and all(
        word in small.words() for word in ("zero-out", "2000 records", "per image", "student")
    )
    assert not small.words().startswith("not a guarantee")
    large = guarantee({"student": gaussian(0.1)}, 2000, 1e-5)
    assert large.epsilon > 50 and not large.holds and large.words().startswith("not a guarantee")
    known = guarantee({"student": gaussian(3.8)}, 2000, 1e-5, insecure_noise=True)
    assert not known.holds and known.words().startswith("not a guarantee")


def test_an_audit_above_the_bound_contradicts_it() -> None:
    found = guarantee({"student": gaussian(3.8)}, 2000, 1e-5)
    assert found.contradicted_by(found.epsilon + 0.01)
    assert not found.contradicted_by(found.epsilon) and not found.contradicted_by(None)


@pytest.mark.parametrize(
    ("records", "delta"), [(546, 546**-1.1), (60_000, 60_000**-1.1), (10, 10**-1.1), (10**6, 10**-6.6)]
)
def test_default_delta_is_below_one_over_n(records: int, delta: float) -> None:
    assert default_delta(records) == pytest.approx(min(1e-5, delta))
    assert default_delta(records) < 1 / records


def test_a_group_of_one_gaussian_has_k_times_the_sensitivity() -> None:
    found = guarantee({"release": gaussian(7.0)}, N, DELTA, unit="patient", group_size=3)
    assert (
        found.epsilon == pytest.approx(gaussian_epsilon(7 / 3, DELTA), rel=1e-6)
        and "3 images" in found.words()
    )


def test_group_privacy_of_subsampled_steps_holds_by_its_definition() -> None:
    """(e, d) for one record gives (k e, d (e^(k e) - 1) / (e^e - 1)) for k; checked with the library's delta
    at the found e."""
    event = poisson_gaussian(64 / 2000, 2.0, 500)
    one, _ = epsilon_of([event], DELTA)
    three, _ = epsilon_of([event], DELTA, 3)
    accountant = library("dp_accounting.pld").PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(event)
    at = three / 3
    assert accountant.get_delta(at) * math.expm1(3 * at) / math.expm1(at) <= DELTA
    assert 3 * one < three < 20 * one


def test_selection_goes_through_rdp_and_hopeless_noise_too() -> None:
    events = library("dp_accounting.dp_event")
    selected = events.RepeatAndSelectDpEvent(gaussian(3.730632), 10, 1)
    epsilon, accountant = epsilon_of([selected], DELTA)
    reference = library("dp_accounting.rdp").RdpAccountant()
    reference.compose(selected)
    assert accountant == "RDP" and epsilon == pytest.approx(reference.get_epsilon(DELTA)) and epsilon > 1
    assert epsilon_of([poisson_gaussian(0.1, 0.2, 1000)], DELTA)[1] == "RDP"


def test_events_come_back_from_their_records() -> None:
    event = together(gaussian(3.0, 7), poisson_gaussian(0.1, 1.5, 20))
    assert event_of_record(event_record(event)) == event
    with pytest.raises(ValueError, match=r"kind must be one of .* 'os.system'"):
        event_of_record({"kind": "os.system"})


@pytest.mark.parametrize(
    ("epsilon", "delta", "records", "said"),
    [
        (0.0, 1e-5, None, "epsilon=0.0"),
        (51.0, 1e-5, None, "epsilon=51.0"),
        (math.nan, 1e-5, None, "epsilon=nan"),
        (1.0, 0.0, None, "delta=0.0"),
        (1.0, 1.0, None, "delta=1.0"),
        (1.0, 1e-3, 1000, "1000 images"),
    ],
)
def test_targets_out_of_range_are_refused_with_values_and_remedy(
    epsilon: float, delta: float, records: int | None, said: str
) -> None:
    with pytest.raises(LedgerError, match=r"must hold, but got .*; use") as refused:
        check_target(epsilon, delta, records)
    assert said in str(refused.value)


def test_a_target_that_other_parts_have_spent_is_refused() -> None:
    with pytest.raises(LedgerError, match=r"must be reachable.*is spent by other parts.*; take fewer steps"):
        calibrate_noise(gaussian, 1.0, DELTA, [gaussian(3.0)])
    with pytest.raises(LedgerError, match=r"must be reachable, but got 1e-06"):
        calibrate_noise(lambda z: poisson_gaussian(0.5, z, 100_000), 1e-6, DELTA)


def test_the_ledger_needs_neither_torch_nor_the_library_until_asked() -> None:
    code = "import sys, kr_ray.privacy.ledger; print('torch' in sys.modules, 'dp_accounting' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )


def test_printed_theorem_and_honest_figure_are_what_they_are() -> None:
    """The four numbers of DPDFD's theorem 3: a batch of B gradients of one teacher has sensitivity 2 C B."""
    for batch, steps, honest in ((64, 1, 5.84), (64, 1000, 991), (256, 1000, 13_797)):
        assert epsilon_of([gaussian(100 / (2 * batch), steps)], DELTA)[0] == pytest.approx(honest, rel=1e-3)


def test_simulated_gaussians_have_the_privacy_the_ledger_states() -> None:
    """P[output in O | member] - e^eps P[O | non-member] is largest for half-lines: the empirical delta at the
    stated epsilon."""
    noise_multiplier, delta = 1.2, 0.01
    epsilon, _ = epsilon_of([gaussian(noise_multiplier)], delta)
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, noise_multiplier, 400_000), rng.normal(0, noise_multiplier, 400_000)
    cuts = np.linspace(-3, 6, 181)
    excess = [(inside > cut).mean() - math.exp(epsilon) * (outside > cut).mean() for cut in cuts]
    assert max(excess) == pytest.approx(delta, abs=2e-3)
