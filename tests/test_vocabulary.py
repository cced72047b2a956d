"""The same argument has the same name, kind and default in every public signature."""

import inspect
import types

import pytest

import rmtdamp
from rmtdamp import (
    hessian,
    kronecker,
    losses,
    outliers,
    plot,
    schedules,
    spectrum,
    transforms,
)

EMPTY, KEYWORD = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
ROOMS = (rmtdamp, hessian, kronecker, outliers, plot, schedules, spectrum, transforms)


def public() -> dict:
    """Every public function and dataclass of the package, by name."""
    found = {}
    more = (rmtdamp.damping, rmtdamp.flatness, losses, rmtdamp.pac_bayes, rmtdamp.rmt)
    for room in (*ROOMS, *more, rmtdamp.stability):
        for name, value in vars(room).items():
            ours = getattr(value, "__module__", "").startswith("rmtdamp")
            record = isinstance(value, type) and hasattr(value, "_fields")
            if ours and callable(value) and not name.startswith("_") and not record:
                found[name] = value
    return found


PUBLIC = public()


def parameters():
    """(function, parameter) of every public signature."""
    for name, value in PUBLIC.items():
        if isinstance(value, type) and not hasattr(value, "__dataclass_fields__"):
            continue
        for parameter in inspect.signature(value).parameters.values():
            yield name, parameter


def of(argument) -> dict:
    return {name: p for name, p in parameters() if p.name == argument}


# argument -> its default, wherever it is offered; functions with one of their own.
DEFAULTS = {
    "loss_args": ((), {}),
    "momentum": (0.9, {"stable_learning_rate": 0.0}),
    "nesterov": (False, {}),
    "weight_decay": (0.0, {"adamw_shrinkage": 1e-4}),
    "mask": (None, {}),
    "b1": (0.9, {}),
    "b2": (0.999, {}),
    "seed": (0, {}),
    "labels": (None, {}),
    "precision": ("highest", {}),
    "mode": ("forward-over-reverse", {}),
    "eigen_every": (10, {}),
    "decay": (0.95, {"DampingLearner": 0.7}),
    "refresh_every": (
        100,
        dict.fromkeys(("kfac", "scale_by_kfac"), 10)
        | dict.fromkeys(("lanczos_newton", "scale_by_lanczos"), 1),
    ),
    "damping": (
        1e-8,
        dict.fromkeys(
            ("kfac", "scale_by_kfac", "lanczos_newton", "scale_by_lanczos"), None
        ),
    ),
}
# What takes a damping as its subject, not as an option.
SUBJECT = {
    "set_damping",
    "with_damping",
    "shrinkage_from_damping",
    "damping_weight",
    "curvature_ratio",
    "initial_damping",
    "Shrinkage",
}
POSITIONAL = {"damping": {"scale_by_adam_shrinkage", "adam_shrinkage"}}


@pytest.mark.parametrize("argument", DEFAULTS)
def test_defaults_agree(argument):
    default, exceptions = DEFAULTS[argument]
    found = {
        name: p.default
        for name, p in of(argument).items()
        if name not in SUBJECT and p.default is not EMPTY
    }
    assert len(found) > 0
    for name, value in found.items():
        assert value == exceptions.get(name, default), f"{name}({argument}={value})"


def test_damping_is_keyword_only_but_for_adam():
    for name, parameter in of("damping").items():
        if name in SUBJECT or "adam" in name:
            continue
        assert parameter.kind is KEYWORD, name


def test_optimisers_offer_momentum_and_weight_decay_alike():
    together = {"momentum", "nesterov", "weight_decay", "mask"}
    for name in ("kfac", "lanczos_newton", "spectral_descent", "shampoo"):
        assert together <= set(inspect.signature(PUBLIC[name]).parameters), name


def test_scale_by_is_free_of_the_learning_rate():
    for name, parameter in parameters():
        if name.startswith("scale_by_"):
            assert parameter.name not in ("learning_rate", "momentum", "weight_decay")


def test_functions_end_in_fn_and_counts_begin_with_num():
    for name, parameter in parameters():
        assert not parameter.name.startswith(("n_", "nb_")), name
        assert not parameter.name.endswith("_every_n"), name
    words = {p.name for _, p in parameters()}
    retired = {"every", "factor_every", "factor_decay", "terms", "ns_steps", "loss"}
    assert not words & retired


def test_states_are_named_after_their_transformation():
    states = [
        value
        for value in vars(transforms).values()
        if isinstance(value, type) and "count" in getattr(value, "_fields", ())
    ]
    factories = {
        name.replace("_", "").lower()
        for name, value in vars(transforms).items()
        if isinstance(value, types.FunctionType)
    }
    assert len(states) >= 6
    for state in states:
        assert state.__name__.removesuffix("State").lower() in factories, state


def test_the_root_holds_what_a_readme_reader_needs():
    names = [
        name
        for name, value in vars(rmtdamp).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    assert len(names) <= 30, sorted(names)
