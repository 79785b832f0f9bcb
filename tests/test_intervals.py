"""The statistics of the evidence, on numbers whose answer is known."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import intervals


def test_p_is_pooled_and_corrected_for_the_number_of_comparisons():
    """Spreads .1 and .3 pool to √.05; three seeds each make four degrees of freedom."""
    rows = {"near": [0.1, 0.2, 0.0], "same": [0.0, 0.0, 0.0], "far": [-1.0, -1.3, -0.7]}
    t = np.array([1.0, 0.1]) / (0.05 / 3) ** 0.5
    far, near = 2 * stats.t.sf(t, 4)
    assert intervals.adjusted(rows) == pytest.approx({"far": 2 * far, "near": near})
    alike = intervals.adjusted({"a": [-1.0, -1.3, -0.7], "b": [-0.99, -1.29, -0.69]})
    assert alike["b"] == alike["a"] < 0.05  # never below that of a larger difference
    assert intervals.adjusted({"a": [0.01, -0.02], "b": [0.02, -0.01]}) == {"a": 1.0, "b": 1.0}


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
