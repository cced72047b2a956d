"""Every Python block of the README runs, by itself, as a reader would paste it."""

import pathlib
import re

import jax
import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


# The first is the one that is copied first; the others among the slow tests.
SLOW_BLOCKS = [pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(BLOCKS))]


@pytest.mark.parametrize("index", [0, *SLOW_BLOCKS])
def test_block_runs(index, capsys):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        exec(compile(BLOCKS[index], f"README block {index}", "exec"), {})
    printed = capsys.readouterr().out
    assert not re.search(r"\b(nan|inf)\b", printed)
    assert ("print(" in BLOCKS[index]) == bool(printed)


def test_first_two_bash_blocks_are_one_line_each():
    commands = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert [c.count("\n") for c in commands[:2]] == [1, 1]
    assert "-m rmtdamp" in commands[0]
    assert "pytest" in commands[1]
