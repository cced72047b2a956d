"""The runner of the paper's experiments: stopped at any moment, it ends the same."""

import functools
import json
import math
import pathlib
import re

import pytest

from benchmarks.paper import _experiment, _page
from benchmarks.paper.__main__ import chosen
from benchmarks.paper._experiment import (
    RESULTS,
    Experiment,
    carry_out,
    record_of,
    texts,
    verdict_of,
)
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.shared import claims
from benchmarks.shared.claims import Check
from benchmarks.shared.report import Line, curves
from benchmarks.shared.runs import Run, finished, load, path_of, perform, save

FOLDER = pathlib.Path("unused")


class Killed(Exception):
    """In place of a signal."""


def counting(limit=math.inf):
    """A run's function that is killed at its `limit`-th call, and its calls."""
    calls = []

    @functools.wraps(counting)
    def square(folder, *, seed, base):
        assert folder == FOLDER
        calls.append(seed)
        if len(calls) > limit:
            raise Killed
        return {"square": (base + seed) ** 2, "seconds": 0.0}

    square.__name__ = "square"
    return square, calls


def runs_of(function):
    return [Run(function, {"seed": seed, "base": 3}) for seed in range(4)]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    killed, _ = counting(limit=2)
    with pytest.raises(Killed):
        perform("squares", runs_of(killed), FOLDER, tmp_path)
    path = path_of(killed, tmp_path)
    before = path.read_text()
    path.write_text(before + '{"config": {"seed": 2, "ba')  # killed while writing
    function, calls = counting()
    rows = perform("squares", runs_of(function), FOLDER, tmp_path)
    assert calls == [2, 3]
    assert [row["square"] for row in rows] == [9, 16, 25, 36]
    assert path.read_text().startswith(before)

    whole, _ = counting()
    assert rows == perform("squares", runs_of(whole), FOLDER, tmp_path / "again")
    again = path_of(whole, tmp_path / "again")
    assert again.read_text() == path.read_text()


def test_a_damaged_line_is_named(tmp_path):
    function, _ = counting()
    path = path_of(function, tmp_path)
    save(path, runs_of(function)[0], {"square": 9})
    path.write_text("{oops\n" + path.read_text())
    with pytest.raises(ValueError, match=r"line 1 is damaged: delete that line"):
        load(path)


def test_a_run_is_found_whatever_the_order_of_its_config(tmp_path):
    function, calls = counting()
    perform("squares", [Run(function, {"seed": 1, "base": 3})], FOLDER, tmp_path)
    other = Run(function, {"base": 3, "seed": 1})
    assert finished([other], tmp_path)[0]["square"] == 16
    perform("squares", [other], FOLDER, tmp_path)
    assert calls == [1]


def test_a_result_that_would_hide_its_config_is_refused(tmp_path):
    def hiding(folder, *, seed):
        return {"seed": seed + 1}

    with pytest.raises(ValueError, match=r"hiding returns seed, which its config"):
        perform("hiding", [Run(hiding, {"seed": 1})], FOLDER, tmp_path)
    assert not path_of(hiding, tmp_path).exists()


TEXT = """\
# {four}

Four *squares*.

# squares

## Claim

Squares
grow

## The paper

- **said: how**: nothing
- **largest**: [1, 2.5]

## How (small scale)

{four} And
no more.

## What came out

Squares.
"""


@pytest.fixture
def squares(tmp_path, monkeypatch):
    """An experiment with its words in a file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "some.md").write_text(TEXT)
    monkeypatch.setattr(_experiment, "texts", lambda: texts(folder))
    function = counting()[0]
    return Experiment(
        name="squares",
        runs=lambda: runs_of(function),
        heads=lambda row: {"base": row["base"]},
        line=lambda base, found: claims.cells(found[base], {"square": ("square", 0)}),
        checks=lambda found: [
            claims.below("They stay small", claims.ends(found[3], "square"), 1e3),
            Check("They have no end", math.nan, None, None),
        ],
        pictures=[
            ("log", "square"),
            lambda rows: [curves([Line("squares", range(4), range(4))])],
        ],
        more=lambda found: [{"base": "every", "square": "many"}],
    )


def test_an_experiment_writes_its_record_and_picture(tmp_path, squares):
    carry_out(squares, FOLDER, tmp_path)
    path = tmp_path / "squares.json"
    record = json.loads(path.read_text())
    assert record["claim"] == "Squares grow"
    assert record["paper"] == {"said: how": "nothing", "largest": [1, 2.5]}
    assert record["protocol"] == "Four *squares*. And no more."
    assert record["remark"] == "Squares."
    assert record["seeds"] == 4
    table = [{"base": 3, "square": "22 ± 6"}, {"base": "every", "square": "many"}]
    assert record["measured"] == {"table": table}
    assert [check["holds"] for check in record["checks"]] == [True, None]
    assert record["checks"][0]["value"] == 21.5
    assert record["checks"][1]["value"] is None  # JSON has no NaN
    assert record["verdict"] == "partly"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))


def test_experiments_are_chosen_by_name_by_a_beginning_or_all():
    assert chosen(["all"]) == list(EXPERIMENTS)
    assert chosen(["fig11", "cost"]) == ["fig11_kfac_auto", "cost"]
    assert chosen(["beyond"])[:2] == ["beyond_tasks", "beyond_text"]
    with pytest.raises(ValueError, match=r"no experiment fig1, fog: choose from all"):
        chosen(["fig1", "fog", "cost"])


LOW, HIGH = [1.0, 2.0, 3.0], [1.5, 2.4, 3.6]  # 0.50 ± 0.06 apart, seed by seed


def test_a_difference_counts_beyond_two_standard_errors():
    assert claims.difference([3.0, 5.0], [1.0, 1.0]) == (3.0, 1.0)
    assert claims.sign(HIGH, LOW) == 1
    assert claims.sign([3.0, 5.0], [1.0, 2.0]) == 1  # 2.5 ± 0.5
    assert claims.sign([3.0, 5.0], [1.0, 4.4]) == 0  # 1.3 ± 0.7
    assert claims.sign(LOW, [1.0, math.inf, 1.0]) == -1  # diverged
    assert claims.sign([math.inf], [math.inf]) == 0
    assert claims.sign(LOW, LOW) == 0
    less = claims.less("It is less", LOW, HIGH)
    assert less == ("It is less", -0.5, pytest.approx(0.0577, rel=1e-2), True)
    assert not claims.less("", LOW, LOW).holds
    assert not claims.more("", LOW, HIGH).holds
    assert claims.not_more("", LOW, LOW).holds
    assert not claims.not_more("", HIGH, LOW).holds


def test_near_means_below_a_multiple_by_the_rule():
    near = claims.within("It is near", 0.8, HIGH, LOW)
    assert near == ("It is near", 0.25, pytest.approx(0.0289, rel=1e-2), True)
    assert not claims.within("", 0.25, HIGH, LOW).holds  # 25 % of 2 is the mean
    assert claims.below("", LOW, 5.0).holds
    assert not claims.below("", LOW, 2.5).holds
    assert claims.above("", HIGH, 0.5).holds
    assert not claims.above("", HIGH, 2.0).holds


def test_a_trend_counts_as_a_whole_and_nowhere_the_other_way():
    tie, higher = [1.4, 2.5, 3.5], [3.0, 4.0, 5.0]
    assert claims.trend("", [LOW, HIGH, tie, higher]).holds
    assert claims.trend("", [higher, tie, HIGH, LOW], way=-1).holds
    assert not claims.trend("", [LOW, higher, HIGH]).holds
    assert not claims.trend("", [HIGH, tie]).holds
    assert claims.trend("It rises", [LOW, higher, HIGH])[1] == pytest.approx(0.5)


def test_sharpness_is_judged_at_equal_training_loss_alone():
    check = Check("It is flat", 1.0, 0.1, True)
    assert claims.at_equal_loss(check, [[1.0, 1.0], [1.2, 1.2]]) == check
    for other in ([1.3, 1.3], [1.0, math.inf]):
        assert claims.at_equal_loss(check, [[1.0, 1.0], other]).holds is None


def test_verdicts_and_cells():
    verdict = lambda *held: verdict_of([Check("", 0.0, None, x) for x in held])
    assert verdict(True, True) == "reproduced"
    assert verdict(True, None) == verdict(False, True) == "partly"
    assert verdict(False, None) == "not reproduced"
    assert claims.cell([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert claims.cell([1.0, math.inf], 1) == "1.0, 1 of 2 diverged"
    assert claims.cell([math.nan]) == "1 of 1 diverged"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_configurations_are_json_and_have_seeds(name):
    for run in EXPERIMENTS[name].runs():
        assert json.loads(run.key) == run.config
        seeds = run.config.get("seeds") or [run.config["seed"]]
        assert all(isinstance(seed, int) for seed in seeds)


RECORDS = _page.records()


def test_every_run_is_kept_under_the_key_that_its_experiment_asks_for():
    asked = {}
    for experiment in EXPERIMENTS.values():
        for run in experiment.runs():
            asked.setdefault(path_of(run.function, RESULTS), set()).add(run.key)
    assert {path: set(load(path)) for path in asked} == asked
    assert set((RESULTS / "runs").iterdir()) == asked.keys()


def test_the_page_is_up_to_date():
    out_of_date = "run python -m benchmarks.paper page"
    assert _page.README.read_text() == _page.page(), out_of_date


@pytest.mark.parametrize("record", RECORDS, ids=[r["experiment"] for r in RECORDS])
def test_records_follow_from_runs_that_are_there(record):
    experiment = EXPERIMENTS[record["experiment"]]
    rows = finished(experiment.runs(), RESULTS)
    assert len(rows) == len(experiment.runs()) == record["runs"]
    found = json.loads(json.dumps(record_of(experiment, rows)))
    words = lambda record: [(c["statement"], c["holds"]) for c in record["checks"]]
    figures = lambda record: [
        c[n] or 0 for c in record["checks"] for n in ("value", "stderr")
    ]
    assert figures(found) == pytest.approx(figures(record), rel=1e-9, abs=1e-9)
    assert words(found) == words(record)
    assert found | {"checks": ()} == record | {"checks": ()}
    assert (RESULTS / record["experiment"]).with_suffix(".png").exists()


def numbers(text):
    found = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", text)
    return [number.replace(",", "") for number in found]


@pytest.mark.parametrize("record", RECORDS, ids=[r["experiment"] for r in RECORDS])
def test_what_is_said_quotes_the_record(record):
    """Every number of a remark stands, rounded as it is there, in the record."""
    rest = json.dumps({k: v for k, v in record.items() if k != "remark"})
    known = [float(x) for x in numbers(rest)]
    known += [100 * x for x in known]  # a share, in per cent

    def stands(quoted):
        digits, _, power = quoted.partition("e")
        unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
        return any(abs(float(quoted) - x) <= 0.5001 * unit for x in known)

    assert [x for x in numbers(record["remark"]) if not stands(x)] == []
