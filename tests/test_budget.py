"""What a search may cost: how a budget is written, and how much of it is left."""

from __future__ import annotations

import time

import pytest

from regraft.budget import budget_from
from regraft.errors import RunError

TIMES = {"90s": 90, "5m": 300, "2h": 7200, "1.5h": 5400, "0.5m": 30, " 10 m ": 600, "0s": 0}
TRIALS = {"20trials": 20, "1trial": 1, "0trials": 0, " 3 trials": 3}
OTHER = ["", "10", "m", "-5m", "5 minutes", "5M", "1e3s", "1.5trials", "trials", "5m 3s", "nan", "inf s", ".5h", "5.h"]


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_a_time_is_written_in_seconds_minutes_or_hours(text, seconds):
    budget = budget_from(text)
    assert (budget.seconds, budget.trials) == (seconds, None)


@pytest.mark.parametrize(("text", "trials"), TRIALS.items())
def test_trials_are_counted_and_their_time_is_not(text, trials):
    budget = budget_from(text, spent=1e6)
    assert (budget.seconds, budget.trials) == (None, trials)
    assert budget.left() == float("inf")


@pytest.mark.parametrize("text", [*OTHER, None, 300, 2.5], ids=repr)
def test_other_words_are_refused_with_what_was_found(text):
    with pytest.raises(RunError, match="such as 90s, 5m, 2h or 20trials; found ") as caught:
        budget_from(text)
    assert str(caught.value).endswith(f"found {text!r}.")


def test_time_is_spent_from_the_start_and_by_what_was_interrupted_before():
    begun = time.monotonic() - 20
    budget = budget_from("1m", spent=30, started=begun)
    assert 50 <= budget.elapsed() < 55
    assert 5 < budget.left() <= 10
    before = budget.elapsed()
    time.sleep(0.01)
    assert budget.elapsed() >= before + 0.01
    assert budget_from("10s", spent=30).left() < 0


def test_a_budget_begins_when_it_is_read_unless_told_otherwise():
    assert budget_from("1m").elapsed() < 1
