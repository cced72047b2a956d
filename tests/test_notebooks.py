"""Notebook and script are one source; what is committed was run, and runs again."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
by_name = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def cells_of_script(text):
    """(type, source) of each cell of a py:percent script."""
    for part in re.split(r"(?m)^# %%", text)[1:]:
        head, _, source = part.partition("\n")
        if head == " [markdown]":
            lines = source.strip().splitlines()
            yield "markdown", "\n".join(line.removeprefix("#")[1:] for line in lines)
        else:
            yield "code", source.strip()


def notebook(script):
    return json.loads(script.with_suffix(".ipynb").read_text())


def test_every_notebook_has_a_script_and_a_place_in_the_docs():
    index = (ROOT / "docs" / "index.md").read_text()
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [path.stem for path in notebooks] == [path.stem for path in SCRIPTS]
    for path in notebooks:
        assert f"../notebooks/{path.stem}\n" in index


@by_name
def test_notebook_and_script_agree(script):
    cells = notebook(script)["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert found == list(cells_of_script(script.read_text()))


@by_name
def test_outputs_are_whole_small_and_free_of_errors(script):
    codes = [c for c in notebook(script)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in codes] == list(range(1, 1 + len(codes)))
    outputs = [output for cell in codes for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert script.with_suffix(".ipynb").stat().st_size < 150_000


@by_name
def test_links_lead_somewhere(script):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", script.read_text()):
        assert (script.parent / target).exists(), target


@pytest.mark.slow
@by_name
def test_it_runs(script):
    """In a process of its own, as a reader starts it, without warnings."""
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=script.parent,
        env=environment,
        check=True,
        timeout=900,
    )
