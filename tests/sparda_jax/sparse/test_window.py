"""The `window` selector: init and local blocks, and nothing else."""

import pytest
from selector_cases import check_everywhere


@pytest.mark.slow
def test_window_runs_everywhere():
    check_everywhere("window")
