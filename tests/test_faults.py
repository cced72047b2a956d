"""What goes wrong in the middle of a run: numbers, data, files, kills, a full disk.

A sample of each; CONTRIBUTING has the command of the full counts.
"""

import contextlib
import functools
import gzip
import json
import math
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings, strategies as st
from problems import mlp, mlp_batch, mlp_loss
from test_paper_data import CIFAR_100, IDX, write, zipped

import rmtdamp
from benchmarks.shared import training
from benchmarks.shared.data import load
from benchmarks.shared.runs import Run, load as load_runs, path_of, perform, save
from rmtdamp import damping as rules
from rmtdamp._cli import WriteError, write_whole
from rmtdamp.demo import _data, _train, _unfinished
from rmtdamp.demo._data import DataError, load_digits, load_idx
from rmtdamp.demo._report import ReportError, Runs
from rmtdamp.demo._train import Record, Settings
from rmtdamp.demo._unfinished import Unfinished

pytestmark = pytest.mark.usefixtures("standard_promotion")

ROOT = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("RMTDAMP_KILLS", "2"))
get = optax.tree.get

# Numbers.

SIZES = (3, 4, 2)
PARAMS = mlp(jax.random.key(0), SIZES, jnp.float32)
BATCH = mlp_batch(jax.random.key(1), 16, SIZES, jnp.float32)
RULES = {
    "identity_target": rules.identity_target,
    "scaled_identity_target": rules.scaled_identity_target,
    "StabilityFloor": rules.StabilityFloor(),
    "for_adam": rules.StabilityFloor.for_adam(),
    "relative_target": rules.relative_target,
    "GradientNorm": rules.GradientNorm(),
    "LevenbergMarquardt": rules.LevenbergMarquardt(),
}
# One looks at the step, one has a meaning for a loss that is not finite: more damping.
OTHERS = {"GradientNorm", "LevenbergMarquardt"}
VARIANTS = {"scaled_identity_target", "StabilityFloor", "relative_target"}


def finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def loss_at(params, batch, ruin):
    """Its value, gradient and products are ruined where `ruin` is not 1."""
    return ruin * mlp_loss(params, batch)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in VARIANTS else x for x in RULES],
)
def test_what_is_not_finite_changes_no_damping_and_is_counted(name, bad):
    """At random steps the measurement is ruined, or the gradient, or both."""
    learner = rmtdamp.DampingLearner(loss_at, rule=RULES[name], floor=1e-2)
    tx = rmtdamp.auto_damping(
        rmtdamp.adam_shrinkage(0.05), learner, refresh_every=1, learning_rate=0.05
    )
    tx = optax.apply_if_finite(tx, max_consecutive_errors=100)

    @jax.jit
    def step(params, state, of_loss, of_grads):
        grads = jax.grad(mlp_loss)(params, BATCH)
        grads = jax.tree.map(lambda g: of_grads * g, grads)
        updates, state = tx.update(
            grads, state, params, batch=BATCH, loss_args=(of_loss,)
        )
        return optax.apply_updates(params, updates), state

    faults = np.random.default_rng(0).choice(4, size=16, p=[0.55, 0.15, 0.15, 0.15])
    params, state = PARAMS, tx.init(PARAMS)
    steps = refused = 0
    for fault in faults:
        of_loss, of_grads = (bad if fault & bit else 1.0 for bit in (1, 2))
        before = get(state, "damping")
        params, state = step(params, state, of_loss, of_grads)
        assert finite((params, get(state, "damping")))
        assert get(state, "damping") > 0
        if fault and name not in OTHERS:
            assert get(state, "damping") == before
        steps += not fault & 2  # a step whose gradient is not finite is no step
        refused += fault == 1
    assert get(state, "total_notfinite") == len(faults) - steps
    if name not in OTHERS:
        assert get(state, "refresh_rejections") == refused > 0
        assert get(state, "refresh_attempts") == steps
    assert mlp_loss(params, BATCH) < mlp_loss(PARAMS, BATCH)


def test_a_gradient_that_is_not_finite_is_no_damping_either():
    """Without apply_if_finite Adam is lost, and the damping is not."""
    learner = rmtdamp.DampingLearner(mlp_loss, rule=rules.GradientNorm(), floor=1e-2)
    tx = rmtdamp.auto_damping(rmtdamp.adam_shrinkage(0.05), learner)
    good = jax.grad(mlp_loss)(PARAMS, BATCH)
    bad = jax.tree.map(lambda g: g * jnp.nan, good)
    _, state = tx.update(good, tx.init(PARAMS), PARAMS, batch=BATCH)
    _, after = tx.update(bad, state, PARAMS, batch=BATCH)
    assert get(after, "damping") == get(state, "damping") > 0


def test_a_batch_may_shrink_in_mid_run():
    tx = rmtdamp.auto_adam(0.05, rmtdamp.DampingLearner(mlp_loss), refresh_every=1)
    params, state = PARAMS, tx.init(PARAMS)
    for size in (16, 9, 2, 16):
        part = jax.tree.map(lambda x, size=size: x[:size], BATCH)
        grads = jax.grad(mlp_loss)(params, part)
        updates, state = tx.update(grads, state, params, batch=part)
        params = optax.apply_updates(params, updates)
    assert get(state, "refresh_attempts") == 4
    one = jax.tree.map(lambda x: x[:1], BATCH)
    with pytest.warns(UserWarning, match="a batch of one example has no variance"):
        updates, after = tx.update(grads, state, params, batch=one)
    rejected = get(state, "refresh_rejections") + 1
    assert get(after, "refresh_rejections") == rejected
    assert get(after, "damping") == get(state, "damping")
    assert finite((params, updates, get(after, "damping")))
    none = jax.tree.map(lambda x: x[:0], BATCH)
    with pytest.raises(ValueError, match="batch holds no examples"):
        tx.update(grads, state, params, batch=none)


# Any params, any numbers.

DTYPES = st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
TREES = st.recursive(
    st.builds(jax.ShapeDtypeStruct, SHAPES, DTYPES) | st.none(),
    lambda inside: (
        st.lists(inside, max_size=2)
        | st.dictionaries(st.sampled_from("ab"), inside, max_size=2)
        | st.tuples(inside, inside)
    ),
    max_leaves=4,
)
sample = settings(max_examples=settings().max_examples // 4)


def mean_of_squares(params, batch):
    """sum_i w_i |x - 1|^2 / 2n: the Hessian is the mean of w times the unit matrix."""
    of = lambda x: jnp.sum((x - 1).astype(jnp.float32) ** 2)
    total = sum((of(x) for x in jax.tree.leaves(params)), jnp.zeros(()))
    return (jnp.mean(batch) * total / 2).astype(jnp.float32)


def optimisers(rate, damping):
    return {
        "adam_shrinkage": rmtdamp.adam_shrinkage(rate, damping=damping),
        "adamw_shrinkage": rmtdamp.adamw_shrinkage(rate, damping=damping),
        "spectral_descent": rmtdamp.spectral_descent(rate, damping=damping),
        "shampoo": rmtdamp.shampoo(rate, damping=damping),
        "lanczos_newton": rmtdamp.lanczos_newton(
            rate,
            rmtdamp.RitzMeasurer(mean_of_squares, num_steps=2),
            damping=damping,
        ),
    }


@sample
@given(
    params=TREES,
    name=st.sampled_from(list(optimisers(0.1, 0.1))),
    rule=st.sampled_from(list(RULES)),
    damping=st.floats(1e-6, 1e2),
    rate=st.floats(1e-6, 1.0),
    size=st.integers(2, 9),
)
def test_any_tree_keeps_its_structure_shapes_and_dtypes(
    params, name, rule, damping, rate, size
):
    """Of updates and of the state, for every optimiser under a learned damping."""
    assume(params is not None)  # which for optax are no params at all
    learner = rmtdamp.DampingLearner(mean_of_squares, floor=damping, rule=RULES[rule])
    inner = optimisers(rate, damping)[name]
    tx = rmtdamp.auto_damping(inner, learner, refresh_every=2, learning_rate=rate)
    try:
        state = jax.eval_shape(tx.init, params)
    except ValueError as refused:  # a rule that the optimiser cannot follow says so
        if "transformation inside does not" not in str(refused):
            raise
        return
    batch = jnp.ones(size, jnp.float32)
    update = lambda params, state: tx.update(params, state, params, batch=batch)
    updates, after = jax.eval_shape(update, params, state)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(updates) == kinds(params)
    assert kinds(after) == kinds(state)


@functools.cache
def compiled():
    """A step whose numbers are all arguments: few programs for many cases."""

    def step(params, batch, rate, b1, floor, decay, min_shrinkage, seed):
        learner = rmtdamp.DampingLearner(
            mean_of_squares,
            floor=floor,
            decay=decay,
            min_shrinkage=min_shrinkage,
            num_microbatches=4,
            seed=seed,
        )
        tx = rmtdamp.auto_adam(rate, learner, b1, form="shrinkage")
        grads = jax.grad(mean_of_squares)(params, batch)
        updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


@pytest.mark.slow
@sample
@given(
    dtype=DTYPES,
    weights=st.lists(st.floats(-8, 8, width=16), min_size=8, max_size=8),
    rate=st.floats(0, 10),
    b1=st.floats(0, 0.99),
    floor=st.floats(1e-8, 1e3),
    decay=st.floats(0, 0.99),
    min_shrinkage=st.floats(1e-3, 0.99),
    seed=st.integers(0, 2**31),
)
def test_any_numbers_give_finite_params_and_the_damping_of_eq_15(
    dtype, weights, rate, b1, floor, decay, min_shrinkage, seed
):
    """Known in closed form: microbatches' Hessians are w_j I, and m their variance."""
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    params = {"a": [zeros(2), None], "b": (zeros(1, 2), zeros()), "c": zeros(0, 3)}
    batch = jnp.array(weights, jnp.float32)
    after, state = compiled()(
        params, batch, rate, b1, floor, decay, min_shrinkage, jnp.uint32(seed)
    )
    assert finite(after)
    means = np.array(weights, float).reshape(2, 4).mean(0)  # strided: i, i + 4
    noise = means.var(ddof=1) * 2 / 8
    bound = 1 / min_shrinkage - 1
    expected = min(floor + noise, bound)
    assert get(state, "refresh_attempts") == 1
    assert get(state, "refresh_rejections") == 0
    np.testing.assert_allclose(get(state, "damping"), expected, rtol=2e-2, atol=1e-5)
    if expected < 0.99 * bound:
        assert get(state, "refresh_caps") == 0


# Data.

IMAGES, LABELS = (name for name in IDX if name.startswith("train"))


@st.composite
def damaged(draw, content):
    """A file after an accident: cut, longer, overwritten, or with another header."""
    kind = draw(st.sampled_from(["cut", "longer", "bytes", "header"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "longer":
        return content + draw(st.binary(min_size=1, max_size=20))
    raw = bytearray(content)
    if kind == "header":
        start = draw(st.binary(min_size=4, max_size=16))
        raw[: len(start)] = start
        raw[:2] = draw(st.sampled_from([raw[:2], b"\0\0"]))
        raw[2:3] = draw(st.sampled_from([raw[2:3], b"\x08"]))
        raw[3:4] = draw(st.sampled_from([raw[3:4], b"\1", b"\3", b"\xff"]))
        return bytes(raw)
    for _ in range(draw(st.integers(1, 3))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


@contextlib.contextmanager
def memory_at_most(megabytes):
    """More than that above what is there now is a MemoryError."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@sample
@given(data=st.data(), zip_it=st.booleans())
def test_damaged_idx_files_are_named_or_whole(tmp_path_factory, data, zip_it):
    """Either an error that names a file, or arrays that are what the files say."""
    name = data.draw(st.sampled_from(list(IDX)))
    files = dict(IDX) | {name: data.draw(damaged(IDX[name]))}
    if zip_it:
        files = zipped(files)
        if data.draw(st.booleans()):
            files[f"{name}.gz"] = data.draw(damaged(zipped(IDX)[f"{name}.gz"]))
    folder = write(tmp_path_factory.mktemp("fuzz") / "mnist", files)
    for read in (load_idx, functools.partial(load, "mnist")):
        with memory_at_most(64):
            try:
                found = read(folder)
            except DataError as error:
                assert str(folder) in str(error)  # noqa: PT017
                continue
        assert [len(split[1]) for split in found[1:3]] == [30, 20]
        for images, labels in found[1:3]:
            assert np.isfinite(images).all()
            assert labels.max() < found.num_classes
    shutil.rmtree(folder)


@sample
@given(data=st.data())
def test_damaged_cifar_files_are_named_or_whole(tmp_path_factory, data):
    name = data.draw(st.sampled_from(list(CIFAR_100)))
    files = dict(CIFAR_100) | {name: data.draw(damaged(CIFAR_100[name]))}
    folder = write(tmp_path_factory.mktemp("fuzz") / "cifar-100-binary", files)
    try:
        found = load("cifar-100", folder)
    except DataError as error:
        assert str(folder) in str(error)  # noqa: PT017
    else:
        for images, labels in found[1:3]:
            assert images.shape == (len(labels), 32, 32, 3)
            assert labels.max() < 100
    shutil.rmtree(folder)


def header(*shape, rank=None):
    sizes = b"".join(x.to_bytes(4, "big") for x in shape)
    return bytes([0, 0, 8, len(shape) if rank is None else rank]) + sizes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(header(2, 5, 5) + bytes(2**27)), "has too much in it"),
        (header(2**32 - 1, 28, 28), "promises an array of .*; at most 2147483648 are"),
        (header(60_000, 28, 28), "is truncated"),
        (header(0, 2**32 - 1, 2**32 - 1), r"is empty: an array of shape \(0, 4294"),
        (header(*[1] * 100) + b"\7", "not an idx file of .* begins with 00000864"),
        (header(rank=0) + b"\7", "not an idx file of .* begins with 00000800"),
    ],
    ids=["bomb", "huge", "promise", "nothing", "dimensions", "scalar"],
)
def test_a_header_is_not_believed(tmp_path, content, message):
    """A bomb of 128 MiB is left after the first of them."""
    path = tmp_path / ("file.gz" if content[:2] == b"\x1f\x8b" else "file")
    path.write_bytes(content)
    with memory_at_most(64), pytest.raises(DataError, match=message):
        _data.read_idx(path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    with pytest.raises(DataError, match="pipe does not exist, or is no file"):
        _data.read_idx(tmp_path / "pipe")


def idx(array):
    return header(*array.shape) + array.tobytes()


ONES = np.ones((30, 6, 5), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({IMAGES: idx(ONES)}, "train-images.* is blank: every pixel is 1"),
        (
            {LABELS: idx(np.zeros(30, np.uint8))},
            "t10k-labels.* has the label 9, and .*train-labels.* none above 0",
        ),
        (
            {IMAGES: idx(np.arange(30 * 16, dtype=np.uint8).reshape(30, 4, 4))},
            r"do not belong together: images of \(4, 4\) and \(6, 5\) pixels",
        ),
    ],
    ids=["blank", "label", "size"],
)
def test_files_that_would_give_senseless_numbers_are_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_idx(write(tmp_path, dict(IDX) | changes))


# Kept runs.

SETTINGS = Settings(epochs=2)
RECORDS = [Record(i, 0.5, 0.5, 0.5, 0.5, 1e-3, None, 9.0) for i in (1, 2)]


@sample
@given(data=st.data())
def test_a_damaged_report_is_named_or_whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("report")
    Runs(folder, "digits", SETTINGS).save("adam", 0, RECORDS)
    paths = [folder / "settings.json", folder / "runs" / "adam-0.json"]
    path = data.draw(st.sampled_from(paths))
    whole = path.read_bytes()
    other = st.sampled_from([b"[]", b"{}", b"3", b"null", b"[{}]", b"[" * 10**5])
    path.write_bytes(data.draw(damaged(whole) | other))
    with contextlib.suppress(ReportError):
        found = Runs(folder, "digits", SETTINGS).load("adam", 0)
        # A digit may have become another; a line may have lost its end.
        assert found is not None
        assert [record.epoch for record in found] == [1, 2]
        assert all(math.isfinite(record.test_loss) for record in found)
    shutil.rmtree(folder)


def squares(folder, *, seed):
    return {"square": seed**2, "seconds": 0.0}


@sample
@given(data=st.data())
def test_damaged_lines_of_runs_are_named_made_again_or_whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs")
    asked = [Run(squares, {"seed": seed}) for seed in range(3)]
    expected = perform("squares", asked, folder, folder)
    path = path_of(squares, folder)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:cut])
    assert perform("squares", asked, folder, folder) == expected
    assert sorted(path.read_bytes().split()) == sorted(whole.split())

    line = data.draw(st.integers(0, 2))
    lines = whole.split(b"\n")
    lines[line] = data.draw(st.sampled_from([b"5", b"\xff", b"{}", b"[" * 10**5, b""]))
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"line {line + 1} is damaged: delete that"):
        load_runs(path)
    shutil.rmtree(folder)


# Runs that are cut short.

ARRAYS = {"w": jnp.arange(6, dtype=jnp.bfloat16), "key": jax.random.key(3)}


@pytest.fixture
def kept_at_once(monkeypatch):
    monkeypatch.setattr(_unfinished, "SECONDS", 0.0)


def cut_short(monkeypatch, module, name, after):
    """That function's calls are counted; after so many it is interrupted, once."""
    calls, original, left = [], getattr(module, name), iter(range(after))

    def counted(*args):
        calls.append(args)
        if next(left, None) is None and len(calls) == after + 1:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


def without_speed(records):
    return [record._replace(steps_per_second=0.0) for record in records]


@pytest.mark.usefixtures("kept_at_once")
def test_a_run_of_the_main_job_goes_on_inside_itself(tmp_path, monkeypatch):
    run = load_digits(), "auto-adam", Settings(epochs=5, width=8, every=5), 0
    whole = list(_train.train(*run))
    kept = Runs(tmp_path, "digits", run[2]).unfinished("auto-adam", 0)
    calls = cut_short(monkeypatch, _train, "_train_epoch", after=3)
    with pytest.raises(KeyboardInterrupt):
        list(_train.train(*run, kept))
    again = list(_train.train(*run, kept))
    assert without_speed(again) == without_speed(whole)
    assert len(calls) == 5 + 1
    kept.remove()
    assert not [*tmp_path.rglob("*.unfinished")]


@pytest.mark.usefixtures("kept_at_once")
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_run_of_an_experiment_goes_on_inside_itself(tmp_path, monkeypatch, by_hand):
    config = {
        "task": {"dataset": "digits", "model": "mlp", "width": 0.1},
        "method": {"optimizer": "adam", "learned": True, "refresh_every": 5},
        "learning_rate": 1e-3, "damping": 1e-3, "epochs": 5, "batch_size": 256,
    }  # fmt: skip
    function = training.train if by_hand else training.train_scanned
    asked = [Run(function, config | {"seed": 3})]
    (whole,) = perform("whole", asked, tmp_path, tmp_path / "whole")
    name = "_by_hand" if by_hand else "_scanned"
    total = 5 if by_hand else 10
    calls = cut_short(monkeypatch, training, name, after=3)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            (again,) = perform("again", asked, tmp_path, tmp_path / "again")
    assert again | {"seconds": 0} == whole | {"seconds": 0}
    assert len(calls) == total + 1
    assert not list(tmp_path.rglob("unfinished/*"))


@pytest.mark.usefixtures("kept_at_once")
@sample
@given(data=st.data())
def test_a_damaged_unfinished_run_is_whole_or_none(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("kept") / "run"
    kept = Unfinished(path)
    kept.save(ARRAYS, [1, math.nan])
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    if (found := kept.load(ARRAYS)) is not None:
        np.testing.assert_equal(np.asarray(found[0]["w"]), np.asarray(ARRAYS["w"]))
        assert found[0]["key"] == ARRAYS["key"]
        np.testing.assert_equal(found[1], [1, math.nan])
    shutil.rmtree(path.parent)


@pytest.mark.usefixtures("kept_at_once")
@pytest.mark.parametrize(
    "other", [{"w": jnp.ones(6)}, {"w": jnp.ones(6), "key": jax.random.key(0)}, {}]
)
def test_an_unfinished_run_of_another_tree_is_none(tmp_path, other):
    kept = Unfinished(tmp_path / "run")
    assert kept.load(ARRAYS) is None
    kept.save(ARRAYS, [])
    assert kept.load(ARRAYS)[1] == []
    assert kept.load(other) is None


def test_little_is_written_and_nothing_without_a_file(tmp_path):
    kept = Unfinished(tmp_path / "run")
    kept.save(ARRAYS, [])
    assert not list(tmp_path.iterdir())
    nowhere = Unfinished(None)
    nowhere.save(ARRAYS, [])
    nowhere.remove()
    assert nowhere.load(ARRAYS) is None


# A full disk.


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "report.json"
    write_whole(path, lambda part: part.write_text("before"))
    part = tmp_path / "report.json.part"
    part.symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"cannot write .*report\.json: .*No space"):
        write_whole(path, lambda part: part.write_text("after"))
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "before"


def test_a_full_disk_leaves_the_lines_that_were_there(tmp_path):
    path = path_of(squares, tmp_path)
    one, two = (Run(squares, {"seed": seed}) for seed in (1, 2))
    save(path, one, {"square": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(path, two, {"square": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes().endswith(b'\n{"config"')
    assert load_runs(path) == {one.key: {"square": 1}}
    save(path, two, {"square": 4})
    assert load_runs(path) == {one.key: {"square": 1}, two.key: {"square": 4}}


def test_the_main_job_says_so_in_one_line(tmp_path, capsys):
    from rmtdamp.__main__ import main

    (tmp_path / "report.json.part").symlink_to("/dev/full")
    Runs(tmp_path, "digits", SETTINGS).save("sgd", 0, RECORDS)
    options = ["--epochs", "2", "--seeds", "1", "--methods", "sgd"]
    assert main([*options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rmtdamp: cannot write")
    assert error.count("\n") == 1


# Kills.

MAIN_JOB = textwrap.dedent(
    """
    from rmtdamp.__main__ import main
    from rmtdamp.demo import _unfinished

    _unfinished.SECONDS = 0.0
    options = "--epochs 5 --width 8 --every 5 --seeds 2 --methods sgd auto-adam".split()
    raise SystemExit(main([*options, "--out", "out"]))
    """
)
PAPER = textwrap.dedent(
    """
    import pathlib
    from benchmarks.paper import _experiment
    from benchmarks.shared import claims, report, training
    from benchmarks.shared.runs import runs_of
    from rmtdamp.demo import _unfinished

    _unfinished.SECONDS = 0.0
    task = {"dataset": "digits", "model": "mlp", "width": 0.1}
    method = {"optimizer": "adam", "learned": True, "refresh_every": 5}
    numbers = {"learning_rate": 1e-3, "damping": 1e-3, "epochs": 5, "batch_size": 256}

    def walk(folder, *, seed):
        asked = {"task": task, "method": method, "seed": seed, **numbers}
        return {**training.train(folder, **asked), "seconds": 0.0}

    words = _experiment.Text("It walks", {}, "small", "A walk.", "So it does.")
    _experiment.texts = lambda: {"walks": words}
    experiment = _experiment.Experiment(
        name="walks",
        runs=lambda: runs_of(walk, {}, seed=range(6)),
        heads=lambda row: {"of": "all"},
        line=lambda of, found: {"end": found[of][0]["test_loss"][-1]},
        checks=lambda found: [claims.below("It stays", [1.0, 2.0], 9.0)],
        pictures=[lambda rows: [report.curves([report.Line("w", range(4), range(4))])]],
    )
    _experiment.carry_out(experiment, pathlib.Path("."), pathlib.Path("out"))
    """
)


def contents(folder):
    """Every file: JSON without times, a set of lines, or bytes."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name == "report.json":
            report = json.loads(path.read_text())
            for run in (run for runs in report["runs"].values() for run in runs):
                for record in run:
                    del record["steps_per_second"]
            found[path.name] = report["runs"]
        elif path.suffix == ".jsonl":
            found[path.name] = path.read_bytes()
        elif path.suffix == ".json" and "minutes" in path.read_text():
            found[path.name] = json.loads(path.read_text()) | {"minutes": 0}
        elif path.parent.name != "runs" and path.suffix != ".png":
            found[path.name] = path.read_bytes()
        else:
            found[path.name] = path.suffix
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", [MAIN_JOB, PAPER], ids=["main job", "paper runner"])
def test_a_job_that_is_killed_at_any_moment_ends_with_the_same_numbers(
    tmp_path, command, record_property
):
    """SIGKILL, again and again; a job that ends is compared, and begun anew."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(name):
        (tmp_path / name / "out").mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-c", command],
            cwd=tmp_path / name,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def end(job):
        _, errors = job.communicate(timeout=600)
        assert job.returncode == 0, errors.decode()

    def seconds(name):
        begin = os.times().elapsed
        end(start(name))
        return os.times().elapsed - begin

    seconds("first")  # compiles
    duration = seconds("whole")
    whole = contents(tmp_path / "whole" / "out")
    assert len(whole) >= 3
    rng, kills, ended = random.Random(0), 0, 0
    while kills < KILLS:
        job = start("killed")
        try:
            job.wait(rng.uniform(0.2, 1) * duration)
        except subprocess.TimeoutExpired:
            job.kill()
            job.communicate()
            kills += 1
            continue
        end(job)
        assert contents(tmp_path / "killed" / "out") == whole
        shutil.rmtree(tmp_path / "killed")
        ended += 1
    end(start("killed"))
    assert contents(tmp_path / "killed" / "out") == whole
    record_property("kills", kills)
    record_property("ended", ended + 1)
