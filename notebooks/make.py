"""Run the notebooks, or those named, and keep what they show: `.py` -> `.ipynb`.

    python notebooks/make.py [01_the_walk.py ...]

The script is the source, in jupytext's py:percent. Pictures are cut to 64 colours, and
nothing is kept that differs between two runs of one machine.
"""

import base64
import io
import os
import pathlib
import sys
import time

import jupytext
import nbclient
import nbformat
from PIL import Image

FOLDER = pathlib.Path(__file__).parent


def smaller(png: str) -> str:
    """The picture with a palette, both in base64."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    picture.quantize(64).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def make(script: pathlib.Path) -> pathlib.Path:
    """Execute a script as a notebook, in its folder, and write it beside it."""
    source = jupytext.read(script, fmt="py:percent")
    cells = [
        nbformat.v4.new_markdown_cell(cell.source, id=f"cell-{i}")
        if cell.cell_type == "markdown"
        else nbformat.v4.new_code_cell(cell.source, id=f"cell-{i}")
        for i, cell in enumerate(source.cells)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbclient.NotebookClient(
        notebook,
        record_timing=False,
        coalesce_streams=True,
        timeout=600,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    notebook.metadata.pop("language_info")  # holds the version of Python
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": smaller(output.data["image/png"])}
                output.metadata = {}
    path = script.with_suffix(".ipynb")
    nbformat.write(notebook, path)
    return path


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    named = [FOLDER / name for name in sys.argv[1:]]
    wanted = named or sorted(FOLDER.glob("[0-9]*.py"))
    for script in wanted:
        start = time.perf_counter()
        path = make(script)
        size, seconds = path.stat().st_size / 1e3, time.perf_counter() - start
        print(f"{path.name}: {size:.0f} kB, {seconds:.0f} s")
