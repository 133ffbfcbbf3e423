"""The computed table of many hosts: what it adds to the planner's step."""

import pytest

from benchmarks.scale import sums_seconds


def test_sums_are_two_a_layer_of_what_a_ring_sends():
    one = {"layers": 10, "rows": 4, "hidden": 1000, "latency": 1e-5, "bandwidth": 1e9}
    assert sums_seconds(**one, cards=1) == 0
    # 8,000 bytes of bfloat16; a card of four sends 1.5 times as many.
    assert sums_seconds(**one, cards=4) == pytest.approx(20 * (1e-5 + 12e-6))
