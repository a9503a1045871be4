"""What a frame may hold: any finite values, however large their sum."""

import pytest
import torch

from tdmld.train.runner import _all_finite

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0, 0.0], True),
        ([LARGEST, LARGEST, LARGEST], True),  # their sum is infinite
        ([LARGEST, LARGEST, -LARGEST, -LARGEST], True),
        ([1.0, float("inf"), 2.0], False),
        ([float("inf"), float("-inf")], False),
        ([float("nan"), 1.0], False),
        ([LARGEST, LARGEST, float("nan")], False),
    ],
)
def test_a_sum_that_overflows_accuses_nobody(values: list[float], finite: bool) -> None:
    assert _all_finite(torch.tensor(values)) is finite
    assert _all_finite(torch.tensor(values * 1000).view(-1, len(values))) is finite
