"""Whatever is broken ends in a right result or in one of our errors. `scripts/fuzz.sh` tries many more."""

from __future__ import annotations

from tests.fuzz.run import kind_of, run_cases


def test_broken_things_end_in_a_right_result_or_in_one_of_our_errors():
    outcomes = run_cases(range(300))
    assert {outcome.end for outcome in outcomes} >= {"result", "error"}
    failures = [str(outcome) for outcome in outcomes if not outcome.is_accepted]
    assert not failures, "\n".join(failures)


def test_a_case_is_made_from_its_number_alone():
    assert [kind_of(seed) for seed in range(50)] == [kind_of(seed) for seed in range(50)]
    first, again = run_cases(range(7, 8)), run_cases(range(7, 8))
    assert [(case.what, case.end) for case in first] == [(case.what, case.end) for case in again]
