"""The statistics of the evidence, on numbers whose answer is known."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import intervals


def test_p_is_pooled_and_corrected_for_the_number_of_comparisons():
    """Spreads .1, .2 and .3 pool to √(.14/3); three seeds each make six degrees of freedom."""
    base, far = [9.0, 9.2, 8.8], [8.0, 8.3, 7.7]
    rows = {"near": [9.1, 9.2, 9.0], "same": [9.0, 9.2, 8.8], "far": far}
    p = 2 * stats.t.sf(np.array([1.0, 0.1]) / (0.14 / 3 * 2 / 3) ** 0.5, 6)
    assert intervals.adjusted(base, rows) == pytest.approx({"far": 2 * p[0], "near": p[1]})
    assert intervals.adjusted(base, {"far": far})["far"] == pytest.approx(stats.ttest_ind(base, far).pvalue)
    alike = intervals.adjusted(base, {"a": far, "b": [x + 0.01 for x in far]})
    assert alike["b"] == alike["a"] < 0.05  # never below that of a larger difference
    assert intervals.adjusted([0.0, 0.1], {"a": [0.01, 0.08], "b": [0.02, 0.09]}) == {"a": 1.0, "b": 1.0}


def test_the_mean_of_a_few_replicates_moves_by_a_t_distribution():
    """Three replicates of 80, 81 and 83 %, all images alike; two rows of them move together."""
    right = np.stack([np.arange(1000) < x for x in (800, 810, 830)]).astype(float)
    kept = np.stack([np.zeros_like(right), right - 1], 1)[:, None]
    rows = {"NoProp": kept, "NoProp: the same": kept, "CNNs": kept}
    drawn = intervals.resampled(rows, 0, draws=20_000)
    assert np.array_equal(drawn["NoProp"], drawn["NoProp: the same"])
    apart = drawn["NoProp"] - drawn["CNNs"]  # images cancel: of two independent means
    error = np.std([80, 81, 83], ddof=1) / 3**0.5
    two = stats.t.rvs(2, size=(2, 200_000), random_state=0)
    expected = np.quantile(error * (two[0] - two[1]), [0.025, 0.25, 0.975])
    assert np.quantile(apart[1:], [0.025, 0.25, 0.975]) == pytest.approx(expected, rel=0.1)
    assert np.isfinite(intervals.resampled({"CNNs": kept[:1]}, 0)["CNNs"]).all()


def test_cnns_may_have_more_or_fewer_replicates():
    """Images cancel: means of ten and of three independent seeds, each with its own t distribution."""
    ten, three = np.linspace(800, 830, 10), np.array([800, 810, 830])
    kept = [intervals.as_kept([np.arange(1000) < round(x) for x in of_one]) for of_one in (ten, three)]
    drawn = intervals.resampled({"NoProp": kept[0], "CNNs": kept[1]}, 0, draws=20_000)
    errors = [np.std(x.round() / 10, ddof=1) / len(x) ** 0.5 for x in (ten, three)]
    moves = [e * stats.t.rvs(n, size=200_000, random_state=n) for e, n in zip(errors, (9, 2), strict=True)]
    expected = (
        np.quantile(moves[0] - moves[1], [0.025, 0.25, 0.975]) + (ten.round().mean() - three.mean()) / 10
    )
    found = np.quantile((drawn["NoProp"] - drawn["CNNs"])[1:], [0.025, 0.25, 0.975])
    assert found == pytest.approx(expected, rel=0.1)


def test_a_seed_that_errs_in_every_fold_is_one_replicate():
    """Three seeds of 80, 81 and 83 % in each of four folds: their mean is no surer than of one fold."""
    right = [np.arange(1000) < x for x in (800, 810, 830)]
    one = {name: intervals.as_kept(right) for name in ("NoProp", "CNNs")}
    both = [one, {name: np.stack([kept] * 4) for name, kept in one.items()}]
    drawn = [intervals.resampled(rows, 0, draws=20_000) for rows in both]
    apart, folds = (x["NoProp"] - x["CNNs"] for x in drawn)  # where images cancel
    assert folds == pytest.approx(apart)
    alone = intervals.resampled({"NoProp": both[1]["NoProp"][:, :1]}, 0)["NoProp"][1:].std()
    assert alone == pytest.approx(100 * (0.8 * 0.2 / 4000) ** 0.5, rel=0.05)  # images are, of four thousand


def test_intervals_are_paired_over_images():
    """Two networks that err on the same images, but for 12 of 1,000, differ by that much, surely."""
    label = torch.arange(1000) % 10
    wrong = (label + (torch.arange(1000) % 5 == 0)) % 10  # one in five is wrong
    worse = torch.where((torch.arange(1000) % 83 == 1), (label + 1) % 10, wrong)

    def kept(answer: torch.Tensor) -> np.ndarray:
        log_p = torch.full((1000, 10), 0.01).scatter(1, answer[:, None], 0.91).log()
        return intervals.packed(log_p, label)[None, None]

    rows = {"NoProp": kept(worse), "CNNs": kept(wrong)}
    accuracy = intervals.resampled(rows, 0)
    apart = accuracy["NoProp"] - accuracy["CNNs"]
    both = (worse != label).sum() - (wrong != label).sum()
    assert apart[0] == pytest.approx(-100 * both / 1000) and accuracy["CNNs"][0] == pytest.approx(80.0)
    assert apart[1:].std() == pytest.approx(100 * (0.01 / 1000) ** 0.5, rel=0.1)
    assert intervals.verdict(apart, 2) == "worse" and intervals.verdict(-apart, 2) == "better"
    assert intervals.verdict(0 * apart, 2) == "the same" and intervals.verdict(apart, 1) == "one replicate"


def test_pairs_of_seeds_have_the_interval_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    base = rng.normal(99, 1, 6)
    values = base + rng.normal(0.2, 0.1, 6)  # what the seeds have in common cancels
    interval = stats.ttest_rel(values, base).confidence_interval(0.95)
    assert intervals.paired(values, base) == pytest.approx([(values - base).mean(), *interval])


def test_rows_of_a_results_file_are_paired_by_seed_in_whatever_order_they_stand():
    one, other = {"seeds": [0, 1, 2], "a": [1.0, 2.0, 3.0]}, {"seeds": [2, 0, 1], "a": [3.0, 1.0, 2.0]}
    assert intervals.by_seed(one, "a") == intervals.by_seed(other, "a")
    assert intervals.by_seed([1.0, 2.0, 3.0], "a") == intervals.by_seed(one, "a")
