"""Every Python block of README and docs runs, by itself, as a reader would paste it."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
BLOCKS = {
    f"{page.name}, block {i}": block
    for page in PAGES
    for i, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    )
}


# The first is the one that is copied first; the others among the slow tests.
FIRST, *OTHERS = BLOCKS
SLOW_BLOCKS = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


@pytest.mark.parametrize("name", [FIRST, *SLOW_BLOCKS])
def test_block_runs(name, capsys):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        exec(compile(BLOCKS[name], name, "exec"), {})
    printed = capsys.readouterr().out
    assert not re.search(r"\b(nan|inf)\b", printed)
    assert ("print(" in BLOCKS[name]) == bool(printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_is_a_page_long():
    assert README.count("\n") <= 250


def test_first_two_bash_blocks_are_one_line_each():
    commands = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert [c.count("\n") for c in commands[:2]] == [1, 1]
    assert "-m rmtdamp" in commands[0]
    assert "pytest" in commands[1]
