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
    Conclusion,
    Experiment,
    carry_out,
    path_of,
    record_of,
    texts,
)
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.shared.checks import cell, difference
from benchmarks.shared.figures import Line, curves
from benchmarks.shared.runs import (
    Run,
    finished,
    load,
    path_of as runs_path,
    perform,
    save,
)

FOLDER = pathlib.Path("unused")
VERDICTS = {"reproduced", "partly", "not reproduced"}


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
    path = runs_path(killed, tmp_path)
    before = path.read_text()
    path.write_text(before + '{"config": {"seed": 2, "ba')  # killed while writing
    function, calls = counting()
    rows = perform("squares", runs_of(function), FOLDER, tmp_path)
    assert calls == [2, 3]
    assert [row["square"] for row in rows] == [9, 16, 25, 36]
    assert path.read_text().startswith(before)

    whole, _ = counting()
    assert rows == perform("squares", runs_of(whole), FOLDER, tmp_path / "again")
    again = runs_path(whole, tmp_path / "again")
    assert again.read_text() == path.read_text()


def test_a_damaged_line_is_named(tmp_path):
    function, _ = counting()
    path = runs_path(function, tmp_path)
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
    assert not runs_path(hiding, tmp_path).exists()


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
        runs=lambda scale: runs_of(function),
        conclude=lambda rows: Conclusion(
            table=[{"seed": r["seed"], "square": r["square"]} for r in rows],
            findings={"largest": max(r["square"] for r in rows), "none": math.nan},
            checks=[True, False],
        ),
        draw=lambda rows: [curves([Line("squares", range(4), range(4))])],
    )


def test_an_experiment_writes_its_record_and_picture(tmp_path, squares):
    carry_out(squares, "small", FOLDER, tmp_path)
    path = path_of(squares, "small", tmp_path)
    record = json.loads(path.read_text())
    assert record["claim"] == "Squares grow"
    assert record["paper"] == {"said: how": "nothing", "largest": [1, 2.5]}
    assert record["protocol"] == "Four *squares*. And no more."
    assert record["remark"] == "Squares."
    assert record["seeds"] == 4
    assert record["measured"]["largest"] == 36
    assert record["measured"]["none"] is None  # JSON has no NaN
    assert record["verdict"] == "partly"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match=r"squares has no scale 'full': it has small"):
        carry_out(squares, "full", FOLDER, tmp_path)


def test_experiments_are_chosen_by_name_by_a_beginning_or_all():
    assert chosen(["all"]) == list(EXPERIMENTS)
    assert chosen(["fig11", "cost"]) == ["fig11_kfac_auto", "cost"]
    assert chosen(["beyond"]) == ["beyond_tasks", "beyond_text", "beyond_layers"]
    with pytest.raises(ValueError, match=r"no experiment fig1, fog: choose from all"):
        chosen(["fig1", "fog", "cost"])


def test_cells_and_paired_differences():
    assert cell([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert cell([1.0, math.inf], 1) == "1.0, 1 of 2 diverged"
    assert cell([math.nan]) == "1 of 1 diverged"
    assert difference([3.0, 5.0], [1.0, 1.0]) == (3.0, 1.0)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_configurations_are_json_and_have_seeds(name):
    for scale in EXPERIMENTS[name].text.protocol:
        for run in EXPERIMENTS[name].runs(scale):
            assert json.loads(run.key) == run.config
            assert isinstance(run.config["seed"], int)


RECORDS = _page.records()


def test_the_page_is_up_to_date():
    out_of_date = "run python -m benchmarks.paper page"
    assert _page.README.read_text() == _page.page(), out_of_date
    main = _page.MAIN.read_text()
    assert main == _page.main_readme(main), out_of_date


@pytest.mark.parametrize(("path", "record"), RECORDS, ids=[p.stem for p, _ in RECORDS])
def test_records_are_whole_and_come_from_runs_that_are_there(path, record):
    assert record["verdict"] in VERDICTS
    assert path.with_suffix(".png").exists()
    experiment, scale = EXPERIMENTS[record["experiment"]], record["scale"]
    rows = finished(experiment.runs(scale), RESULTS)
    assert len(rows) == record["runs"]
    assert record == json.loads(json.dumps(record_of(experiment, scale, rows)))
    assert not re.search(r"\bnan\b|\binf\b", record["remark"])
