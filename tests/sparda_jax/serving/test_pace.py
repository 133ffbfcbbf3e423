"""How many steps a call of decode has."""

from sparda_jax.serving.pace import Pace


def _calls(pace: Pace, seconds: float, count: int) -> list[int]:
    """Steps of some calls, each step of which takes so long."""
    found = []
    for _ in range(count):
        found.append(pace.steps)
        pace.took(found[-1], found[-1] * seconds)
    return found


def test_short_steps_share_a_call_and_long_ones_do_not():
    pace = Pace(32)
    assert _calls(pace, 0.019, 3) == [1, 10, 10]
    assert _calls(pace, 0.16, 3) == [10, 1, 1]  # longer contexts
    # A call that was so much faster is not believed at once.
    assert _calls(pace, 0.0001, 6) == [1, 2, 5, 10, 20, 32]
    assert _calls(pace, 0.6, 2) == [32, 1]


def test_one_step_a_call_stays_one():
    assert _calls(Pace(1), 0.0001, 4) == [1, 1, 1, 1]


def test_a_call_in_which_all_rows_ended_makes_the_next_no_longer():
    """It may have had one step of ten; but a step takes as long as it did at least."""
    pace = Pace(32)
    assert _calls(pace, 0.019, 2) == [1, 10]
    pace.took(10, 0.02, whole=False)
    assert pace.steps == 10
    pace.took(10, 0.39, whole=False)
    assert pace.steps == 5
