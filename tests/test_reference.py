"""Every public name stands on the reference page once, and shows how it is used."""

import ast
import importlib
import inspect
import pathlib
import re
import types

import rmtdamp

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reference.md").read_text()
ROOMS = sorted(
    path.stem
    for path in pathlib.Path(rmtdamp.__file__).parent.iterdir()
    if re.fullmatch("[a-z]+(_bayes)?(.py)?", path.name) and path.name != "demo"
)


def public(module) -> list[str]:
    """What a module says is public, else what it re-exports or defines itself."""
    if hasattr(module, "__all__"):
        return module.__all__
    tree = ast.parse(inspect.getsource(module))
    names = [
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]
    if not names:
        definitions = ast.FunctionDef, ast.ClassDef
        names = [node.name for node in tree.body if isinstance(node, definitions)]
    return [name for name in names if not name.startswith("_")]


PUBLIC = {}  # object -> its names; the root's come first
for room in (rmtdamp, *(importlib.import_module(f"rmtdamp.{r}") for r in ROOMS)):
    for name in public(room):
        found = getattr(room, name)
        if not isinstance(found, types.ModuleType):
            path = f"{room.__name__}.{name}"
            PUBLIC.setdefault(id(found), (found, []))[1].append(path)
NAMES = {paths[0]: found for found, paths in PUBLIC.values()}
# Numbers and type aliases have no docstring of their own.
DOCUMENTED = {
    name: x
    for name, x in NAMES.items()
    if isinstance(x, type | types.FunctionType) and x.__module__.startswith("rmtdamp")
}


def listed() -> list[str]:
    """What the page's autosummaries list."""
    found, module = [], ""
    for line in PAGE.splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.removeprefix(".. currentmodule:: ")
        elif name := re.fullmatch(r" {3}(\w+)", line):
            found.append(f"{module}.{name[1]}")
    return found


def test_the_rooms_are_all_there():
    assert {"damping", "hessian", "pac_bayes", "stability", "flax"} <= set(ROOMS)
    assert len(DOCUMENTED) > 140


def test_the_page_lists_each_public_name_once():
    assert sorted(listed()) == sorted(DOCUMENTED)


def test_the_page_mentions_what_has_no_docstring():
    for name in set(NAMES) - set(DOCUMENTED):
        assert f"`{name.rpartition('.')[2]}`" in PAGE, name


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text().splitlines()
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages - {"index"} <= set(index)


def test_each_has_an_example():
    without = [name for name, x in DOCUMENTED.items() if ">>>" not in (x.__doc__ or "")]
    assert not without
