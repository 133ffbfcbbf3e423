"""The `window` selector: init and local blocks, and nothing else."""

from selector_cases import check_everywhere


def test_window_runs_everywhere():
    check_everywhere("window")
