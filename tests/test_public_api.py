"""Every public name with its signature, as promised: nothing changes by accident.

After a change that is meant, `python tests/test_public_api.py` writes the file anew;
the CHANGELOG then says what it means for those who call it.
"""

import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib

import benchmarks
import rmtdamp

EMPTY = inspect.Parameter.empty
FILE = pathlib.Path(__file__).with_name("public_api.txt")


def rooms():
    """The package and all in it whose name has no underscore in front."""
    yield rmtdamp
    for found in pkgutil.walk_packages(rmtdamp.__path__, "rmtdamp."):
        private = any(part.startswith("_") for part in found.name.split("."))
        if not private and not found.name.startswith("rmtdamp.demo"):
            yield importlib.import_module(found.name)


def signature(value):
    """Names, kinds and defaults; not types, which each version prints in its way."""
    found = inspect.signature(value)
    parameters = []
    for parameter in found.parameters.values():
        default = parameter.default
        if default is not EMPTY and hasattr(default, "__name__"):
            default = Named(default.__name__)
        parameters.append(parameter.replace(annotation=EMPTY, default=default))
    return found.replace(parameters=parameters, return_annotation=EMPTY)


class Named(str):
    """Prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def described(name, value):
    """The lines of a name: its signature; of a class, its public methods' too."""
    if not callable(value):
        yield f"{name} = {value!r}" if isinstance(value, str | int | float) else name
        return
    try:
        yield f"{name}{signature(value)}"
    except ValueError:  # a class without a signature of its own
        yield name
    if isinstance(value, type):
        fields = getattr(value, "__dataclass_fields__", ())
        for attribute, member in sorted(vars(value).items()):
            public = not attribute.startswith("_") and attribute not in fields
            if public and inspect.isfunction(member):
                yield f"{name}.{attribute}{signature(member)}"


def public_api():
    """All lines, in order; a name that several rooms show is in each."""
    lines = set()
    for room in rooms():
        # A folder shows what it imports, a file what it defines.
        homes = "rmtdamp" if hasattr(room, "__path__") else room.__name__
        for name, value in vars(room).items():
            home = getattr(value, "__module__", "") or ""
            if name.startswith("_") or inspect.ismodule(value):
                continue
            if home.startswith(homes):
                lines.update(described(f"{room.__name__}.{name}", value))
    return "\n".join(sorted(lines)) + "\n"


def test_the_version_is_one():
    root = pathlib.Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert rmtdamp.__version__ == project["version"]
    assert f"\nversion: {project['version']}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {project['version']} - " in (root / "CHANGELOG.md").read_text()


def test_the_public_api_is_as_promised():
    found, promised = public_api().splitlines(), FILE.read_text().splitlines()
    new, gone = sorted({*found} - {*promised}), sorted({*promised} - {*found})
    assert (new, gone) == ([], []), (
        "the public API is another: if that is meant, run "
        "python tests/test_public_api.py and tell it in the CHANGELOG"
    )


def test_an_import_brings_nothing_heavy():
    """Flax, plots and data sets are imported by what needs them."""
    code = "import rmtdamp, sys; print(*sys.modules)"
    found = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    heavy = {"flax", "matplotlib", "sklearn", "pooch", "rich", "jax.extend.pallas"}
    assert {"rmtdamp", "optax"} <= {*found}
    assert not heavy & {*found}


def test_nothing_is_unpickled_and_nothing_is_fetched_unasked():
    """One place fetches, `fetch` in the benchmarks' data."""
    folders = (pathlib.Path(x.__file__).parent for x in (rmtdamp, benchmarks))
    text = {
        path.relative_to(folder.parent).as_posix(): path.read_text()
        for folder in folders
        for path in folder.rglob("*.py")
    }
    imported = lambda name: rf"^\s*(import|from) {name}\b"
    using = lambda word: {x for x in text if re.search(word, text[x], re.MULTILINE)}
    for word in ("pickle", "dill", "joblib", "shelve", "marshal"):
        assert using(imported(word)) == set()
    assert using(r"allow_pickle|(?<![.\w])(eval|exec)\(") == set()
    # A file of its own parent process; pickles have to be asked for.
    assert using(r"\bnp\.load\b") == {"benchmarks/costs/peer.py"}
    assert using(imported("pooch")) == {"benchmarks/shared/data.py"}
    for word in ("urllib", "requests", "socket", "http"):
        assert using(imported(word)) == set()


if __name__ == "__main__":
    FILE.write_text(public_api())
