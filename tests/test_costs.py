"""What the comparison of two runs of the costs calls worse."""

import pytest

from benchmarks.costs.regressions import unmatched, worse

TIMED = {"ratio": 2.0, "low": 1.9, "high": 2.1, "pairs": 25, "baseline_seconds": 1.0}


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        ({"ratio": 3.0, "low": 2.5, "high": 3.5}, [("ratio", "2", "3")]),
        ({"ratio": 3.0, "low": 2.0, "high": 9.0}, []),  # the intervals meet
        ({"ratio": 2.15, "low": 2.14, "high": 2.16}, []),  # too little
        ({"ratio": 1.0, "low": 0.9, "high": 1.1}, []),
        ({"baseline_seconds": 9.0}, []),  # the machine's
    ],
    ids=["worse", "noisy", "little", "better", "seconds"],
)
def test_a_timed_ratio_is_worse_beyond_both_intervals(now, changes):
    found = worse({"steps": {"mlp": TIMED}}, {"steps": {"mlp": TIMED | now}})
    expected = [
        {"figure": f"steps: mlp: {name}", "before": old, "now": new}
        for name, old, new in changes
    ]
    assert found == expected


def test_counts_memory_and_words_are_compared_as_they_are():
    before = {"a": {"temp_ratio": 2.0, "all-reduce": "1: 1.00 P", "product": TIMED}}
    now = {"a": {"temp_ratio": 2.3, "all-reduce": "2: 1.00 P", "product": TIMED}}
    figures = [row["figure"] for row in worse(before, now)]
    assert figures == ["a: all-reduce", "a: temp_ratio"]
    assert worse(now, before) == [
        {"figure": "a: all-reduce", "before": "2: 1.00 P", "now": "1: 1.00 P"}
    ]
    assert worse(before, {"b": now["a"]}) == []


def test_an_error_of_rounding_may_double():
    errors = lambda x: {"precision": {"bfloat16": {"variance": x}}}
    assert worse(errors(1e-4), errors(1.9e-4)) == []
    assert len(worse(errors(1e-4), errors(2.1e-4))) == 1


def test_rows_that_only_one_run_has_are_told():
    before = {"steps": {"mlp": TIMED, "cnn": TIMED}, "density": {"mlp": TIMED}}
    now = {"steps": {"mlp": TIMED, "transformer": TIMED}, "peer": {}}
    assert unmatched(before, now) == [
        "steps: cnn: not measured now",
        "steps: transformer: not kept",
    ]
