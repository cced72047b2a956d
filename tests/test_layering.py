"""The direction of imports is part of the design, so it is tested."""

import ast
import pathlib

import pytest

import rmtdamp

PACKAGE = pathlib.Path(rmtdamp.__file__).parent
# A room may import what stands to its left.
LAYERS = [
    "_types", "_jax", "_sharding", "_tree", "_basis", "_parts", "_checks", "hessian",
    "flatness", "losses", "kronecker", "rmt", "stability", "pac_bayes", "damping",
    "outliers", "transforms",
]  # fmt: skip
DOORS = {
    "schedules", "flax", "plot", "spectrum", "demo", "_cli", "__main__", "__init__",
}  # fmt: skip
OPTAX_ALLOWED = {"transforms", "flax", "demo"}


def imported(path):
    """Yield the dotted names a file imports, relative ones resolved."""
    here = ("rmtdamp", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


FILES = {str(p.relative_to(PACKAGE)): p for p in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_left(name):
    room = pathlib.PurePath(name).with_suffix("").parts[0]
    assert room in LAYERS or room in DOORS, f"{name}: a room the design does not have"
    for dotted in imported(FILES[name]):
        root, _, rest = dotted.partition(".")
        target = rest.split(".")[0]
        if root == "rmtdamp" and target in DOORS:
            assert room in DOORS, f"{name} imports the door {dotted}"
        if root == "rmtdamp" and target in LAYERS and room in LAYERS:
            assert LAYERS.index(target) <= LAYERS.index(room), f"{name}: {dotted}"
        if root == "optax":
            assert room in OPTAX_ALLOWED, f"{name} imports optax"


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__main__.py"}))
def test_no_room_imports_the_private_modules_of_another(name):
    room = pathlib.PurePath(name).with_suffix("").parts[0]
    for dotted in imported(FILES[name]):
        root, other, rest = (*dotted.split("."), "", "")[:3]
        if root == "rmtdamp" and other != room:
            assert not rest.startswith("_"), f"{name} reaches into {dotted}"
