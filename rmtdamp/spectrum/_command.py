"""`python -m rmtdamp spectrum module:function`: a page about a model's Hessian."""

import argparse
import contextlib
import importlib
import inspect
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import get_args

try:
    import rich.console
    import rich.progress

    from ._page import as_json, check_finite, page, picture
except ModuleNotFoundError as missing:
    package = str(missing.name).partition(".")[0]
    if package not in {"rich", "matplotlib"}:
        raise
    sys.exit(
        f"rmtdamp: the spectrum command needs {package}: pip install 'rmtdamp[plot]'"
    )

import jax

from rmtdamp._cli import Parser, WriteError, number, write_whole
from rmtdamp._types import Mode

from ._measure import Report, measure
from ._watch import Bars, Lines, Watch

EXAMPLE = "rmtdamp.demo.spectrum_example:digits"


class CommandError(ValueError):
    """The command cannot do what it was asked; the message says why."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = Parser(
        prog="python -m rmtdamp spectrum",
        description="Measure the Hessian of a model: trace, extreme eigenvalues, "
        "density, the noise of a batch and its outliers, the damping and the learning "
        "rate they call for. Prints a page and writes spectrum.png and spectrum.json.",
        epilog=f"An example that runs as it stands: {EXAMPLE}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, unset = out.add_argument, argparse.SUPPRESS
    add(
        "target",
        metavar="module:function",
        help="a function without arguments that returns (loss_fn, params, batches): "
        "loss_fn(params, batch) -> mean loss, and an iterable of batches that can be "
        "read again and again; a fourth item, if any, measures Kronecker factors "
        "(rmtdamp.flax.nnx_factors, for one): with --layers it is held beside each "
        "layer's Hessian; the current folder is searched first",
    )
    add(
        "--out",
        type=pathlib.Path,
        metavar="FOLDER",
        default="rmtdamp-spectrum",
        help="where spectrum.png and spectrum.json go",
    )
    add(
        "--k",
        type=number(int, 1),
        metavar="N",
        default=unset,
        help="eigenvalues of largest magnitude (default: 9, at most P)",
    )
    add(
        "--num-steps",
        type=number(int, 1),
        metavar="N",
        default=80,
        help="points per probe of a density; cut to P",
    )
    add(
        "--num-probes",
        type=number(int, 1),
        metavar="N",
        default=4,
        help="random probes of a density and of the variance",
    )
    add("--seed", type=number(int, 0), metavar="N", default=0, help="of the probes")
    add(
        "--batch-only",
        action="store_true",
        help="let the first batch stand for the data set, which takes much less time",
    )
    add(
        "--layers",
        nargs="*",
        metavar="PATH",
        default=unset,
        help="also the density of diagonal blocks: of the parameters whose path has "
        "each of these in it, a part of a path such as ['att']['key'] or a regular "
        "expression, or of every layer if there is none; each costs as much as the "
        "whole density (default: no blocks)",
    )
    add(
        "--mode",
        choices=get_args(Mode),
        default="forward-over-reverse",
        help="how products are differentiated; the second for a loss with a custom "
        "VJP, the third for one whose gradient has no derivative at all",
    )
    add(
        "--dense",
        action=argparse.BooleanOptionalAction,
        default=unset,
        help="make the whole Hessian: all numbers are exact then but the variance m, "
        "whose error from at most 32 microbatches remains, and what follows from it "
        "(default: of at most 1,000 parameters)",
    )
    return out


def load(target: str) -> Callable:
    """The function that `module:function` names.

    Returns:
        It, not yet called.

    Raises:
        CommandError: the text, the module or the function is not what it should be.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise CommandError(
            f"{target!r} is not of the form module:function, such as {EXAMPLE}"
        )
    if module_name.endswith(".py") or os.sep in module_name:
        raise CommandError(
            f"{module_name!r} is a file, and a module is needed: write "
            f"{pathlib.Path(module_name).stem}:{name} in the folder that holds it"
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise CommandError(
                f"there is no module {error.name!r}, neither in {here} nor installed"
            ) from None
        raise CommandError(
            f"module {module_name!r} needs {error.name!r}, which is not installed"
        ) from None
    if not hasattr(module, name):
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        known = ", ".join(functions) or "no functions at all"
        raise CommandError(f"module {module_name!r} has no {name!r}: it has {known}")
    function = getattr(module, name)
    if not callable(function):
        raise CommandError(
            f"{target} is of type {type(function).__name__}, and must be a function "
            "that returns (loss_fn, params, batches)"
        )
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise CommandError(
            f"{target} is called without arguments, and needs some ({error}): give "
            "them defaults, or write a function around it"
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    return function


def problem(target: str) -> tuple:
    """(loss_fn, params, batches, factors_fn or None) from the `target`'s function."""
    try:
        found = load(target)()
    except ModuleNotFoundError as error:
        raise CommandError(
            f"{target} needs {error.name!r}, which is not installed"
        ) from None
    if not isinstance(found, tuple) or len(found) not in (3, 4):
        described = f"a {type(found).__name__}"
        if isinstance(found, tuple | list):
            described += f" of {len(found)}"
        raise CommandError(
            f"{target} returned {described}, and must return a tuple of three: "
            "(loss_fn, params, batches), or of four with a factors_fn"
        )
    return (*found, None)[:4]


def _measured(args, watch: Watch) -> Report:
    watch.stage(f"running {args.target}")
    loss_fn, params, batches, factors_fn = problem(args.target)
    try:  # before the long part
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write to {args.out}: {error}") from None
    try:
        report = measure(
            loss_fn,
            params,
            batches,
            jax.random.key(args.seed),
            k=args.k,
            num_steps=args.num_steps,
            num_probes=args.num_probes,
            batch_only=args.batch_only,
            # No expression after --layers: every layer.
            layers=args.layers or (None if args.layers is not None else ()),
            factors_fn=factors_fn,
            mode=args.mode,
            dense=args.dense,
            watch=watch,
        )
        check_finite(report)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error).strip().partition("\n")[0]) from error
    return report


def _run(args) -> None:
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    progress = rich.progress.Progress(*columns, console=console, transient=True)
    lines = Lines(sys.stderr)
    with progress if console.is_terminal else contextlib.closing(lines):
        report = _measured(args, Bars(progress) if console.is_terminal else lines)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    text = json.dumps({"settings": settings} | as_json(report), allow_nan=False) + "\n"
    figure = picture(report, args.target)
    write_whole(args.out / "spectrum.json", lambda path: path.write_text(text))
    write_whole(
        args.out / "spectrum.png",
        lambda path: figure.savefig(path, format="png", dpi=130),
    )
    console = rich.console.Console()
    console.print(page(report, args.target))
    console.print(
        f"\n{args.out / 'spectrum.png'}\n{args.out / 'spectrum.json'}", highlight=False
    )


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    args = argparse.Namespace(k=None, layers=None, dense=None)
    parser().parse_args(argv, args)
    try:
        _run(args)
    except (CommandError, WriteError) as error:
        print(f"rmtdamp: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("rmtdamp: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    return 0
