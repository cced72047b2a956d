"""The spectrum command as a user meets it: numbers, files, and every refusal."""

import functools
import importlib
import io
import itertools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import rich.progress
from problems import dense_hessian

from rmtdamp.__main__ import main
from rmtdamp.hessian import SplitHalfPairs, dense_matvec
from rmtdamp.outliers import outliers
from rmtdamp.spectrum import layer_spectra, measure
from rmtdamp.spectrum._check import check_factors, look
from rmtdamp.spectrum._measure import (
    LayerOverlap,
    _blocks,
    _kronecker_overlaps,
    _num_microbatches,
)
from rmtdamp.spectrum._page import as_json, check_finite, page, picture
from rmtdamp.spectrum._watch import Bars, Lines, Watch

SOURCE = """
import jax
import jax.numpy as jnp
import numpy as np

def loss_fn(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2, axis=1))

def parts(sizes=(24, 24, 12), seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"a": jax.random.normal(keys[0], (3, 4)),
              "b": jax.random.normal(keys[1], (4, 2))}
    x = jax.random.normal(keys[2], (sum(sizes), 3))
    y = jax.random.normal(keys[3], (sum(sizes), 2))
    ends = np.cumsum(sizes)
    batches = [(x[e - n:e], y[e - n:e]) for n, e in zip(sizes, ends)]
    return params, batches

def small():
    return (loss_fn, *parts())
"""
_names = (f"spectrum_problem_{i}" for i in itertools.count())


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A busy machine is no reason for lines on stderr."""
    monkeypatch.setattr(Lines, "patience", 1e4)


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Writes a module into the current folder and returns its target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(extra="", name="problem"):
        module = next(_names)
        (tmp_path / f"{module}.py").write_text(SOURCE + extra)
        importlib.invalidate_caches()
        return f"{module}:{name}"

    return write


@functools.cache
def problem():
    """(loss_fn, params, batches, data) of the module above."""
    space = {}
    exec(SOURCE, space)
    params, batches = space["parts"]()
    data = jax.tree.map(lambda *xs: jnp.concatenate(xs), *batches)
    return space["loss_fn"], params, batches, data


@functools.cache
def report():
    loss_fn, params, batches, _ = problem()
    return measure(
        loss_fn, params, batches, jax.random.key(1), k=4, layers=None, dense=False
    )


@functools.cache
def whole():
    """The same with whole matrices, which is the default for so few parameters."""
    loss_fn, params, batches, _ = problem()
    return measure(loss_fn, params, batches, jax.random.key(0), k=4, layers=None)


@functools.cache
def dense():
    """Hessians of the data set and of the first batch."""
    loss_fn, params, batches, data = problem()
    return [np.asarray(dense_hessian(loss_fn, params, x)) for x in (data, batches[0])]


@pytest.mark.slow
def test_numbers_are_those_of_the_dense_hessians():
    loss_fn, params, _, data = problem()
    whole, first = dense()
    got = as_json(report())
    assert (got["num_parameters"], got["num_examples"], got["num_batches"]) == (
        20,
        60,
        3,
    )
    assert got["loss"] == pytest.approx(float(loss_fn(params, data)))
    values = np.linalg.eigvalsh(whole)
    scale = np.abs(values).max()
    # The error of an eigenvalue is below its residual, 1e-3 of the largest at most.
    near = functools.partial(np.testing.assert_allclose, atol=1e-3 * scale)
    near(got["largest"]["eigenvalues"], values[-1:])
    near(got["smallest"]["eigenvalues"], values[:1])
    near(got["leading"]["eigenvalues"], sorted(values, key=abs)[:-7:-1])
    trace = got["trace"]
    assert abs(trace["value"] - values.sum()) < 4 * trace["stderr"]
    assert trace["per_parameter"] == pytest.approx(trace["value"] / 20)
    rates = got["stable_learning_rate"]
    assert rates["sgd"] == pytest.approx(2 / values[-1], rel=1e-3)
    assert rates["sgd_momentum_0.9"] == pytest.approx(3.8 / values[-1], rel=1e-3)
    near(
        got["outliers"]["eigenvalues"],
        sorted(np.linalg.eigvalsh(first), key=abs)[:-5:-1],
    )


def test_noise_is_that_of_the_dense_hessians():
    loss_fn, params, batches, _ = problem()
    x, y = batches[0]
    each = [
        dense_hessian(loss_fn, params, (x[i : i + 1], y[i : i + 1])) for i in range(24)
    ]
    spread = np.asarray(jnp.stack(each))
    spread = spread - spread.mean(0)
    exact = (spread**2).sum() / 23 / 24 / 20
    got = as_json(report())
    noise = got["noise"]
    assert noise["variance"] == pytest.approx(exact, rel=0.7)
    assert abs(noise["variance"] - exact) < 4 * noise["variance_stderr"]
    halves = [dense_hessian(loss_fn, params, (x[i::2], y[i::2])) for i in (0, 1)]
    values = np.linalg.eigvalsh(np.asarray(halves[0] - halves[1]) / 2)
    assert noise["edge"] == pytest.approx(np.abs(values).max(), rel=1e-4)
    # Four probes of 20 parameters: a ratio of two means that scatter.
    kurtosis = np.mean(values**4) / np.mean(values**2) ** 2
    assert noise["kurtosis"] == pytest.approx(kurtosis, rel=0.5)
    assert noise["semicircle_edge"] == pytest.approx(2 * noise["variance"] ** 0.5)
    damping, mean, square = got["damping"], noise["mean"], noise["square"]
    assert damping["identity"] == noise["variance"]
    ratio = mean * noise["variance"] / (square - mean**2)
    assert damping["scaled_identity"] == pytest.approx(ratio)
    assert damping["scaled_identity_target"] == mean


def test_overlaps_with_the_data_set_are_those_of_the_dense_vectors():
    leading = []
    # Those of the batch on the span of two more of the data set's.
    for matrix, count in zip(dense(), (6, 4), strict=True):
        values, vectors = np.linalg.eigh(matrix)
        leading.append(vectors[:, np.argsort(-np.abs(values))[:count]])
    exact = ((leading[1].T @ leading[0]) ** 2).sum(1)
    got = as_json(report())["outliers"]["measured_overlaps_squared"]
    np.testing.assert_allclose(got, exact, atol=0.01)


def test_densities_have_the_moments_of_the_matrices():
    whole, first = dense()
    found = report()
    for matrix, spectrum in ((whole, found.density), (first, found.batch_density)):
        assert spectrum.nodes.shape == (4, 20)
        for order in (1, 2):
            mean, stderr = spectrum.moment(order)
            exact = np.trace(np.linalg.matrix_power(matrix, order)) / 20
            assert abs(mean - exact) < 6 * stderr


def test_layers_are_diagonal_blocks():
    whole, _ = dense()
    found = report()
    # Both leaves lie at the top, so each is a layer; "a" has the first 12 parameters.
    assert list(found.layers) == ["['a']", "['b']"]
    for spectrum, block in zip(
        found.layers.values(), (whole[:12, :12], whole[12:, 12:]), strict=True
    ):
        assert spectrum.num_parameters == len(block)
        values = np.linalg.eigvalsh(block)
        got = np.sort(np.asarray(spectrum.nodes[0]))
        np.testing.assert_allclose(got[[0, -1]], values[[0, -1]], rtol=1e-6)


@pytest.mark.slow
def test_whole_matrices_give_exact_numbers():
    """Trace, eigenpairs, densities, layers and traces of the noise, to rounding."""
    loss_fn, params, batches, _ = problem()
    found, got = whole(), as_json(whole())
    data, first = dense()
    near = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
    values = np.linalg.eigvalsh(data)
    assert got["dense"]
    assert not as_json(report())["dense"]
    near(got["trace"]["value"], values.sum())
    assert got["trace"]["stderr"] == 0
    near(got["largest"]["eigenvalues"], values[-1:])
    near(got["smallest"]["eigenvalues"], values[:1])
    near(got["leading"]["eigenvalues"], sorted(values, key=abs)[:-7:-1])
    for pairs in (found.largest, found.smallest, found.leading):
        assert np.all(pairs.residuals < 1e-12)
    flat = jax.tree.map(lambda x: x.reshape(len(x), -1), found.leading.eigenvectors)
    vectors = np.concatenate([flat["a"], flat["b"]], axis=1)
    near(vectors @ data, np.asarray(found.leading.eigenvalues)[:, None] * vectors)
    blocks = (data[:12, :12], data[12:, 12:])
    spectra = (found.density, found.batch_density, *found.layers.values())
    for matrix, spectrum in zip((data, first, *blocks), spectra, strict=True):
        near(spectrum.nodes[0], np.linalg.eigvalsh(matrix))
        for order in (1, 2):
            value, stderr = spectrum.moment(order)
            exact = np.trace(np.linalg.matrix_power(matrix, order)) / len(matrix)
            near(value, exact)
            assert stderr == 0
    x, y = batches[0]
    parts = np.stack(
        [
            dense_hessian(loss_fn, params, (x[i : i + 1], y[i : i + 1]))
            for i in range(24)
        ]
    )
    variance = ((parts - parts.mean(0)) ** 2).sum() / 23 / 24 / 20
    near(got["noise"]["variance"], variance)
    near(got["noise"]["mean"], np.trace(first) / 20)
    assert found.moments.probe_stderr == 0
    assert got["noise"]["variance_stderr"] > 0


def test_whole_matrices_and_estimates_agree_on_the_outliers():
    exact, estimate = (as_json(x)["outliers"] for x in (whole(), report()))
    for name in ("eigenvalues", "measured_overlaps_squared"):
        np.testing.assert_allclose(exact[name], estimate[name], rtol=1e-2, atol=1e-2)
    assert exact["is_outlier"] == estimate["is_outlier"]


SLOW_COUNTS = [pytest.param(n, marks=pytest.mark.slow) for n in (13, 22)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [9, *SLOW_COUNTS])
def test_whole_matrices_of_a_batch_that_microbatches_do_not_divide(count):
    """9 examples: three times three, and halves of four. 13 and 22: some left over."""
    loss_fn, params, batches, _ = problem()
    batch = jax.tree.map(lambda x: x[:count], batches[0])
    found = measure(loss_fn, params, [batch], jax.random.key(0), k=4)
    values = np.linalg.eigvalsh(dense_hessian(loss_fn, params, batch))
    np.testing.assert_allclose(found.density.nodes[0], values, rtol=1e-9, atol=1e-11)
    even = jax.tree.map(lambda x: x[: count - count % 2], batch)
    pair = [
        dense_hessian(loss_fn, params, jax.tree.map(lambda x, i=i: x[i::2], even))
        for i in (0, 1)
    ]
    seen = sorted(np.linalg.eigvalsh((pair[0] + pair[1]) / 2), key=abs)[:-5:-1]
    np.testing.assert_allclose(found.outliers.eigenvalues, seen, rtol=1e-3)


@pytest.mark.slow
def test_the_whole_matrix_is_chosen_for_few_parameters_and_by_hand():
    loss_fn = lambda params, batch: jnp.mean((batch @ params) ** 2) / 2
    batch = jax.random.normal(jax.random.key(0), (8, 1001))
    for p, dense, expected in ((1000, None, True), (1001, None, False)):
        found = measure(
            loss_fn,
            jnp.ones(p),
            [batch[:, :p]],
            jax.random.key(1),
            k=2,
            num_steps=4,
            num_probes=1,
            dense=dense,
        )
        assert found.density.exact is expected
    assert not report().density.exact


def test_layers_by_expression_and_by_parent():
    params = {
        "x": {"w": jnp.full(5, 2.0), "b": jnp.full(3, 4.0)},
        "y": jnp.full(2, 7.0),
    }
    matvec = lambda v: jax.tree.map(jnp.multiply, params, v)
    spectra = functools.partial(layer_spectra, matvec, params)
    key, other, last = jax.random.split(jax.random.key(0), 3)
    by_parent = spectra(key)
    assert {n: s.num_parameters for n, s in by_parent.items()} == {
        "['x']": 8,
        "['y']": 2,
    }
    chosen = spectra(other, select=["w|y", "b"], num_steps=3)
    assert {n: s.num_parameters for n, s in chosen.items()} == {"w|y": 7, "b": 3}
    np.testing.assert_allclose(chosen["b"].moment(1)[0], 4)
    with pytest.raises(ValueError, match=r"no path of params matches 'z': choose from"):
        spectra(last, select=["z"])


FACTORS = """
from rmtdamp.kronecker import ModelFactors, make_blocks

def model_fn(params, x, tape):
    hidden = jnp.tanh(tape.linear("first", x, x @ params["a"]))
    return tape.linear("second", hidden, hidden @ params["b"])

def criterion(outputs, y):
    return jnp.mean(jnp.sum((outputs - y) ** 2, axis=1))

def problem():
    params, batches = parts()
    layers = {"first": {"kernel": "a"}, "second": {"kernel": "b"}}
    blocks = make_blocks(params, layers)
    factors_fn = ModelFactors(
        model_fn=model_fn, criterion=criterion, blocks=blocks, fisher="ggn"
    )
    return loss_fn, params, batches, factors_fn
"""


@functools.cache
def with_factors():
    space = {}
    exec(SOURCE + FACTORS, space)
    return space["problem"]()


def check_overlaps(found):
    """The last layer's Hessian is its factors' product; the first's is dense here."""
    _, params, _, (x, _) = problem()
    assert list(found) == ["['a']", "['b']"]
    assert found["['b']"] == LayerOverlap(4, pytest.approx(1, abs=1e-4), 4 / 8)
    hidden = np.tanh(x @ params["a"])
    slopes = (1 - hidden**2)[:, :, None] * np.asarray(params["b"])[None]
    outputs = 2 * np.einsum("nao,nbo->ab", slopes, slopes) / len(x)
    factors = np.kron(x.T @ x / len(x), outputs)
    top = lambda matrix: np.linalg.eigh(matrix)[1][:, -4:]
    expected = np.sum((top(dense()[0][:12, :12]).T @ top(factors)) ** 2) / 4
    assert found["['a']"] == LayerOverlap(4, pytest.approx(expected, abs=1e-3), 4 / 12)
    assert expected < 0.9


def test_share_of_a_layers_sharp_space_that_its_factors_show(capsys):
    import rich

    _, params, batches, factors_fn = with_factors()
    matvec, blocks = dense_matvec(dense()[0], params), _blocks(params, None)
    at = matvec, params, batches, jax.random.key(0), blocks | {"all": "a|b"}
    seen = _kronecker_overlaps(factors_fn, *at, 4)
    check_overlaps(seen)  # and "all" is no layer
    found = report()._replace(kronecker=seen)
    second = as_json(found)["kronecker"]["['b']"]
    assert second == {"k": 4, "overlap": pytest.approx(1, abs=1e-4), "random": 0.5}
    first = seen["['a']"].overlap
    rich.print(page(found, "x"))
    printed = capsys.readouterr().out
    assert "KFAC: share of the 4 sharpest directions" in printed
    rows = {x.split()[0]: x.split()[1:] for x in printed.splitlines() if x.split()}
    assert rows["['a']"][0] == "12"
    assert rows["['a']"][-2:] == [f"{first:.3f}", "0.33"]
    rich.print(page(report(), "x"))
    assert "KFAC" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_measure_compares_layers_and_factors(dense):
    loss_fn, params, batches, factors_fn = with_factors()
    options = {"k": 4, "num_steps": 5, "num_probes": 1, "dense": dense}
    of = functools.partial(measure, loss_fn, params, batches, **options)
    found = of(jax.random.key(0), layers=None, factors_fn=factors_fn)
    check_overlaps(found.kronecker)


def test_a_box_around_a_leaf_is_no_layer():
    from flax import nnx

    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    for params in ({"x": state}, {"x": nnx.as_pure(state)}):
        assert list(_blocks(params, None)) == ["['x']"]
    assert list(_blocks(jnp.ones(3), None)) == [""]


def test_factors_of_another_model_are_refused():
    _, params, batches, factors_fn = with_factors()
    other = params | {"a": jnp.ones((3, 5))}
    with pytest.raises(
        ValueError, match=r"a block 'first' of shapes \(\(3, 4\),\), and"
    ):
        check_factors(factors_fn, other, batches[0])
    with pytest.raises(
        ValueError, match=r"fails on batch 0: ValueError: batch is .* must be a pair"
    ):
        check_factors(factors_fn, params, batches[0][0])


@pytest.mark.parametrize("count", [4, 5, 16, 31, 62, 127, 128, 250, 256])
def test_microbatches_leave_out_as_little_as_can_be(count):
    n, possible = _num_microbatches(count), range(4, min(32, count) + 1)
    assert n in possible
    assert count % n == min(count % m for m in possible)
    assert n == max(m for m in possible if count % m == count % n)


@pytest.mark.slow
def test_command_prints_a_page_and_writes_two_files(target, tmp_path, capsys):
    extra = "def problem():\n    params, batches = parts((25, 12))\n"
    extra += "    return loss_fn, params, batches\n"
    name = target(extra)
    options = ["--k", "3", "--num-steps", "9", "--num-probes", "2", "--layers", "a|b"]
    options += ["--mode", "reverse-over-reverse", "--no-dense"]
    assert main(["spectrum", name, *options]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    for words in (
        f"Hessian of the data set: {name}",
        "parameters P",
        "trace",
        "largest eigenvalue",
        "smallest eigenvalue",
        "stable learning rate, SGD",
        "with momentum 0.9",
        "variance m",
        "25 microbatches, 2 probes",
        "semicircle 2",
        "damping, eq. 15",
        "damping, Ledoit and Wolf",
        "of 3 are shown to be more than",
        "noise",
        "verdict",
        "measured",
        "rmtdamp-spectrum/spectrum.png",
        "note: batch 0 holds 25 examples, an odd number: its outliers are those of the",
    ):
        assert words in printed
    assert max(map(len, printed.splitlines())) <= 80
    out = tmp_path / "rmtdamp-spectrum"
    assert {p.name for p in out.iterdir()} == {"spectrum.png", "spectrum.json"}
    assert (out / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    got = json.loads((out / "spectrum.json").read_text())
    assert got["settings"]["target"] == name
    assert (got["batch_size"], got["num_examples"], got["batch_only"]) == (
        25,
        37,
        False,
    )
    nodes = np.array(got["densities"]["layers"]["a|b"]["nodes"])
    assert nodes.shape == (2, 9)
    assert f"{got['trace']['value']:.3g}" in printed
    space = {}
    exec(SOURCE, space)
    params, batches = space["parts"]((25, 12))
    data = jax.tree.map(lambda *xs: jnp.concatenate(xs), *batches)
    values = np.linalg.eigvalsh(dense_hessian(space["loss_fn"], params, data))
    assert got["largest"]["eigenvalues"] == pytest.approx(values[-1:], rel=1e-3)


@pytest.mark.slow
def test_one_batch_stands_for_the_data_set():
    loss_fn, params, batches, _ = problem()
    found = measure(loss_fn, params, batches[:1], jax.random.key(1), k=4)
    assert found.batch_only
    assert found.density is found.batch_density
    assert as_json(found)["outliers"]["measured_overlaps_squared"] is None
    values = np.linalg.eigvalsh(dense()[1])
    np.testing.assert_allclose(found.largest.eigenvalues, values[-1:], rtol=1e-3)
    assert len(picture(found, "x").axes) == 1
    assert len(picture(report(), "x").axes) == 4


def test_numbers_without_a_value_are_null_in_json_and_words_on_the_page(capsys):
    import rich

    found = report()
    flat = found.largest._replace(eigenvalues=jnp.array([-1.0]))
    lost = found.moments._replace(mean=jnp.array(-0.5))
    for moments, words, value in (
        (lost, "none", None),
        (lost._replace(mean=jnp.array(1.0), square=jnp.array(0.5)), "infinite", None),
    ):
        changed = found._replace(largest=flat, moments=moments)
        got = json.loads(json.dumps(as_json(changed), allow_nan=False))
        assert got["stable_learning_rate"]["sgd"] is None
        assert got["damping"]["scaled_identity"] is value
        rich.print(page(changed, "x"))
        printed = capsys.readouterr().out
        assert words in printed
        assert "any" in printed


def printed_page(found, capsys) -> str:
    import rich

    rich.print(page(found, "x"))
    return capsys.readouterr().out


def test_the_page_says_of_each_vector_what_the_halves_say(capsys):
    found = report()
    out = jnp.array([True, False, True, True])
    some = found.outliers._replace(is_outlier=out, overlaps_squared=jnp.full(4, 0.875))
    printed = printed_page(found._replace(outliers=some), capsys)
    assert "3 of 4 are shown to be more than noise" in printed
    rows = [x.split("  ") for x in printed.splitlines()]
    rows = [[y.strip() for y in x if y.strip()] for x in rows]
    rows = [x for x in rows if len(x) == 6 and x[2] in ("true", "not shown")]
    assert [x[2] for x in rows] == ["true", "not shown", "true", "true"]
    assert [x[3] for x in rows] == ["0.875", "-", "0.875", "0.875"]
    words = " ".join(printed.split())
    assert "span of the k + 2 leading true ones" in words
    assert "verdict: true where that is above 0.89" in words


def test_the_page_gives_the_verdict_s_threshold():
    """c^2 from the agreement at which `outliers` changes its mind."""
    agreements = np.linspace(0.6, 0.75, 1501)
    pairs = SplitHalfPairs(jnp.ones(1501), None, None, jnp.asarray(agreements), 0)
    found = outliers(pairs)
    least = np.asarray(found.overlaps_squared)[np.asarray(found.is_outlier)].min()
    assert least == pytest.approx(0.89, abs=0.005)


def test_the_page_says_how_much_was_drawn(capsys):
    assert "24 microbatches, 4 probes" in printed_page(report(), capsys)
    assert "24 microbatches, exact traces" in printed_page(whole(), capsys)
    one = report()._replace(num_probes=1)
    assert "24 microbatches, 1 probe " in printed_page(one, capsys)
    noise = as_json(report())["noise"]
    assert (noise["num_microbatches"], noise["num_probes"]) == (24, 4)


def test_traces_of_layers_come_with_their_errors(capsys):
    """Beside the exact trace of the block, which has none."""
    for found, signs in ((report(), 2), (whole(), 0)):
        lines = printed_page(found, capsys).splitlines()
        rows = [x for x in lines if x.split() and x.split()[0] in ("['a']", "['b']")]
        assert len(rows) == 2
        assert sum("±" in x for x in rows) == signs


def test_every_label_of_the_page_is_explained(capsys):
    """In the table of docs/hessian.md, with what the line says and what to do."""
    text = (pathlib.Path(__file__).parents[1] / "docs/hessian.md").read_text()
    lines = [x for x in text.splitlines() if x.startswith("| `")]
    explained = {name for x in lines for name in x.split("|")[1].split("`")[1::2]}
    seen = report()._replace(kronecker={"['a']": LayerOverlap(4, 0.9, 0.3)})
    for found in (seen, whole()):
        first, second, third, fourth, *_ = page(found, "x").renderables
        labels = [str(x) for part in (first, second) for x in part.columns[0].cells]
        labels += [str(x.header) for part in (third, fourth) for x in part.columns]
        assert len(labels) >= 20
        for label in labels:
            assert label in explained


@pytest.mark.parametrize(
    ("field", "part", "message"),
    [
        ("trace", "value", "the trace of the data set is not finite: .* at 0"),
        ("leading", "eigenvalues", "an eigenvalue of the data set is not finite"),
        ("moments", "variance", "the variance of batch 0 is not finite"),
        ("noise_density", "nodes", "the spectrum of the noise of batch 0 is not fin"),
    ],
)
def test_results_that_are_not_finite_are_refused(field, part, message):
    check_finite(report())
    side = getattr(report(), field)
    side = side._replace(**{part: getattr(side, part) * jnp.inf})
    with pytest.raises(ValueError, match=message):
        check_finite(report()._replace(**{field: side}))


RETURN = "def problem():\n    params, batches = parts()\n    return "


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "def other(): pass\n",
            "has no 'problem': it has loss_fn, parts, small, other",
        ),
        ("problem = 3\n", "is of type int, and must be a function that returns"),
        ("def problem(x): pass\n", "is called without arguments, and needs some"),
        ("def problem(): import nowhere_at_all\n", "needs 'nowhere_at_all', which is"),
        (
            RETURN + "loss_fn, params",
            "returned a tuple of 2, and must return a tuple of",
        ),
        (RETURN + "params", "returned a dict, and must return a tuple of three"),
        (
            RETURN + "3, params, batches",
            "loss_fn is of type int, and must be a function",
        ),
        (
            RETURN + "loss_fn, {'a': jnp.arange(3)}, batches",
            "params['a'] is int64, and curvature needs arrays of a real floating dtype",
        ),
        (
            RETURN + "loss_fn, params, batches, 3",
            "factors_fn is of type int, and must measure Kronecker factors: take",
        ),
        (RETURN + "loss_fn, params, []", "batches is empty, and at least one batch is"),
        (
            RETURN + "loss_fn, params, 7",
            "batches is of type int, and must be an iterable",
        ),
        (
            RETURN + "loss_fn, params, {'x': 1}",
            "batches is a single dict, and must be an iterable of batches: return [",
        ),
        (
            RETURN + "loss_fn, params, batches[0][0]",
            "batches is a single ArrayImpl, and must be an iterable of batches",
        ),
        (
            RETURN + "loss_fn, params, batches[0]",
            "fails on batch 0: ValueError: too many values to unpack",
        ),
        (
            RETURN + "loss_fn, params, (batches[0][0], batches[0][1][:, 0])",
            "looks like one batch: hand over a list of batches",
        ),
        (
            RETURN + "loss_fn, params, (b for b in batches)",
            "batches is of type generator, which is exhausted after one pass",
        ),
        (
            "class Once:\n    def __init__(self, x): self.x = iter(x)\n"
            "    def __iter__(self): return self.x\n"
            + RETURN
            + "loss_fn, params, Once(batches)",
            "batches gave no batch on the second pass, and every product is a pass",
        ),
        (
            "class Noisy(list):\n    scale = 1.0\n"
            "    def __iter__(self):\n        self.scale *= 2\n"
            "        pairs = list.__iter__(self)\n"
            "        return iter([(x * self.scale, y) for x, y in pairs])\n"
            + RETURN
            + "loss_fn, params, Noisy(batches)",
            "batches differ from pass to pass: loss",
        ),
        (
            "def problem():\n    params, batches = parts((3, 9))\n"
            "    return loss_fn, params, batches",
            "batch 0 holds 3 examples, and its noise can be measured from 4 on",
        ),
        (
            RETURN + "lambda p, b: b[0] @ p['a'], params, batches",
            "loss_fn must return a real scalar and returned shape (24, 4)",
        ),
        (
            RETURN + "lambda p, b: (loss_fn(p, b), 1), params, batches",
            "loss_fn must return one scalar and returned a tuple",
        ),
        (
            RETURN + "lambda p, b: loss_fn(p, b) * jnp.nan, params, batches",
            "loss_fn gives nan on batch 0: no curvature there would be finite",
        ),
        (
            RETURN
            + "loss_fn, params, [*batches, (batches[0][0] * jnp.inf, batches[0][1])]",
            "loss_fn gives nan on batch 3: no curvature there",
        ),
        (
            RETURN + "loss_fn, params, [*batches, (batches[0][0][:, :2],) * 2]",
            "loss_fn(params, batch) fails on batch 3: TypeError: ",
        ),
        (
            RETURN + "lambda p, b: loss_fn(p, b) + jnp.sqrt(jnp.sum(0 * p['b'])),"
            "params, batches",
            "the Hessian of batch 0 is not finite at params['b'], though the loss is",
        ),
        (
            RETURN + "lambda p, b: jnp.mean(b[0] @ p['a'][:, 0]) ** 2, "
            "{'a': jnp.ones((3, 1))}, batches",
            "params hold 3 numbers, and the noise is judged from 4 on",
        ),
    ],
    ids=lambda x: None if x.endswith("\n") or "problem" in x else x[:30],
)
def test_problems_that_are_refused(target, capsys, extra, message):
    assert main(["spectrum", target(extra)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rmtdamp: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", [], "'digits' is not of the form module:function, such as rmtdamp."),
        (":digits", [], "':digits' is not of the form module:function"),
        ("nowhere_at_all:f", [], "there is no module 'nowhere_at_all', neither in "),
        ("rmtdamp.nowhere:f", [], "there is no module 'rmtdamp.nowhere', neither in "),
        (
            "model.py:f",
            [],
            "'model.py' is a file, and a module is needed: write model:f",
        ),
        (
            "small",
            ["--k", "21"],
            "k is 21, and must lie between 1 and the 20 parameters",
        ),
        ("small", ["--k", "0"], "'0' is not a whole number of at least 1"),
        ("small", ["--mode", "forward"], "invalid choice: 'forward'"),
        ("small", ["--out", "taken"], "cannot write to taken: "),
        ("small", ["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_command_lines_that_are_refused(
    target, tmp_path, capsys, name, options, message
):
    (tmp_path / "taken").write_text("")
    name = target(name="small") if name == "small" else name
    try:
        code = main(["spectrum", name, *options])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_module_that_lacks_something_is_told_from_one_that_is_missing(target, capsys):
    assert main(["spectrum", target("import nowhere_at_all\n")]) == 2
    assert "needs 'nowhere_at_all', which is not installed" in capsys.readouterr().err


def test_a_log_has_a_line_for_a_stage_that_lasts_and_none_for_others(monkeypatch):
    monkeypatch.setattr(Lines, "patience", 0.2)
    file = io.StringIO()
    lines = Lines(file)
    lines.stage("short")
    lines.stage("long", 3)
    deadline = time.monotonic() + 30
    while not file.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    lines.stage("last")
    lines.close()
    assert file.getvalue() == "rmtdamp: long (3 steps) ...\n"


def test_a_log_says_how_far_a_long_stage_is(monkeypatch):
    monkeypatch.setattr(Lines, "patience", 1e4)
    monkeypatch.setattr(Lines, "interval", 0.05)
    file = io.StringIO()
    lines = Lines(file)
    for steps in (3, None):
        lines.stage("long", steps)
        lines.step()  # at once: too early for a line
        time.sleep(0.06)
        lines.step()
    lines.close()
    said = "rmtdamp: long: step 2"
    assert file.getvalue() == f"{said} of 3 ...\n{said} ...\n"


@pytest.mark.slow
def test_each_stage_is_announced_before_it_compiles(target, capsys, monkeypatch):
    """No stage waits in silence: what is slow has its line, here with no patience."""
    monkeypatch.setattr(Lines, "patience", 0.0)
    name = target(name="small")
    assert main(["spectrum", name, "--num-steps", "3", "--no-dense"]) == 0
    err = capsys.readouterr().err
    for words in (f"running {name}", "compiling Hessian-vector products", "density"):
        assert f"rmtdamp: {words}" in err


def test_bars_count_steps():
    progress = rich.progress.Progress(console=rich.console.Console(file=io.StringIO()))
    bars = Bars(progress)
    bars.step()  # before the first stage there is nothing to count
    bars.stage("first", 2)
    bars.stage("second", 5)
    assert list(bars.passing([1, 2])) == [1, 2]
    bars.step()
    (task,) = progress.tasks
    assert (task.description, task.completed, task.total) == ("second", 2, 5)
    silent = Watch()
    silent.stage("x")
    assert list(silent.passing([3])) == [3]


def test_an_error_in_the_user_s_function_keeps_its_traceback(target):
    with pytest.raises(ZeroDivisionError):
        main(["spectrum", target("def problem(): return 1 / 0\n")])


def test_a_loss_that_is_no_mean_is_measured_with_a_note():
    loss_fn, params, batches, _ = problem()
    summed = lambda p, b: loss_fn(p, b) * b[0].shape[0]
    found = look(
        summed,
        params,
        batches,
        mode="forward-over-reverse",
        batch_only=True,
    )
    assert "do not trust variance, damping and outliers: loss_fn sums" in found.notes[0]
    assert found.counts == [24]


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["spectrum", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--out", "--k", "--num-steps", "--layers", "--batch-only", "--mode"):
        assert f"{option} " in text
    assert "--dense, --no-dense" in text
    assert "microbatches remains" in text
    assert "a part of a path such as ['att']['key'] or a regular expression" in text
    assert "rmtdamp.demo.spectrum_example:digits" in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m rmtdamp spectrum" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_example_is_a_problem():
    from rmtdamp.demo.spectrum_example import digits

    with jax.numpy_rank_promotion("allow"):
        check_example(*digits())


def check_example(loss_fn, params, batches, factors_fn):
    check_factors(factors_fn, params, batches[0])
    assert [len(labels) for _, labels in batches] == [256] * 5
    loss = float(loss_fn(params, batches[0]))
    assert 0.05 < loss < 0.5  # trained, and not to the end


def test_without_the_extra_the_command_names_it(monkeypatch):
    name = "rmtdamp.spectrum._command"
    for module in (name, "rmtdamp.spectrum._page"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in [x for x in sys.modules if x.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        SystemExit, match=r"needs rich.*: pip install 'rmtdamp\[plot\]'"
    ):
        importlib.import_module(name)
