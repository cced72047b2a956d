"""Pictures: what is drawn is compared with the numbers behind it."""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from rmtdamp import plot, rmt
from rmtdamp.hessian import EigenPairs, SpectralDensity, squared_overlaps
from rmtdamp.outliers import Outliers
from rmtdamp.plot._axis import Smoothed

pytestmark = pytest.mark.slow

P = 1000
VARIANCE = 0.25


def semicircle(num_nodes=60):
    """Gauss quadrature of the semicircle: Chebyshev's of the second kind, s = 1/2."""
    angles = np.pi * np.arange(1, num_nodes + 1) / (num_nodes + 1)
    weights = 2 * np.sin(angles) ** 2 / (num_nodes + 1)
    return SpectralDensity(jnp.cos(angles)[None], jnp.array(weights)[None], P)


def with_spikes(values):
    """The semicircle and single eigenvalues."""
    bulk = semicircle()
    weights = bulk.weights * (1 - len(values) / P)
    spikes = jnp.full((1, len(values)), 1 / P)
    nodes = jnp.concatenate([bulk.nodes, jnp.array([values])], axis=1)
    return SpectralDensity(nodes, jnp.concatenate([weights, spikes], axis=1), P)


def vectors(key, count):
    """Orthonormal vectors of a pytree with 6 elements."""
    rows = jnp.linalg.qr(jax.random.normal(key, (6, 6)))[0][:count]
    return {"a": rows[:, :2], "b": rows[:, 2:].reshape(count, 2, 2)}


def found(values, beyond=1.0, seed=0):
    """Outliers as if they had been judged so, by their magnitudes."""
    values = jnp.array(values)
    out = jnp.abs(values) > beyond
    return Outliers(
        eigenvalues=values,
        residuals=jnp.zeros_like(values),
        is_outlier=out,
        true_eigenvalues=jnp.where(out, values, jnp.nan),
        overlaps_squared=jnp.where(out, 1 - 0.1 / jnp.abs(values), 0.6),
        eigenvectors=vectors(jax.random.key(seed), len(values)),
    )


def line(ax, label):
    """x and y of the line with this label."""
    (chosen,) = [x for x in ax.lines if str(x.get_label()).startswith(label)]
    return np.asarray(chosen.get_xdata()), np.asarray(chosen.get_ydata())


@pytest.mark.parametrize(("width", "rtol"), [(0.02, 0.2), (0.5, 0.05), (10.0, 0.05)])
def test_smoothed_density_integrates_to_one_and_follows_the_law(width, rtol):
    smoothed = Smoothed(semicircle(), width, np.array([-1.5, 1.5]))
    mass = np.trapezoid(smoothed.density, smoothed.x)
    np.testing.assert_allclose(mass, 1, rtol=1e-3)
    inside = np.abs(smoothed.x) < 0.8
    law = np.asarray(rmt.semicircle_density(smoothed.x, VARIANCE))
    np.testing.assert_allclose(smoothed.density[inside], law[inside], rtol=rtol)


def test_a_single_eigenvalue_is_a_line_of_its_mass():
    smoothed = Smoothed(with_spikes([30.0]), 0.5, np.array([-1.0, 30.0]))
    near = np.abs(smoothed.x - 30) < 3
    mass = np.trapezoid(smoothed.density[near], smoothed.x[near])
    np.testing.assert_allclose(mass, 1 / P, rtol=0.05)
    assert smoothed.density[near].max() == pytest.approx(smoothed.one, rel=0.3)


def test_copies_and_padding_change_nothing():
    plain = with_spikes([5.0])
    pad = lambda x, value: jnp.concatenate([x, jnp.full((1, 3), value)], axis=1)
    padded = plain._replace(
        nodes=pad(plain.nodes, 5.0), weights=pad(plain.weights, 0.0)
    )
    reach = np.array([-1.0, 5.0])
    curves = [Smoothed(x, 0.5, reach).density for x in (plain, padded)]
    np.testing.assert_allclose(*curves)


def test_density_picture_shows_edges_outliers_and_semicircle():
    values = [30.0, -8.0, 2.0, 0.5]
    noise = semicircle()
    noise = noise._replace(nodes=noise.nodes.at[0, 0].set(-1.5))
    ax = plot.density(
        with_spikes(values), outliers=found(values), noise=noise, variance=VARIANCE
    )
    assert isinstance(ax.figure, Figure)
    assert (ax.get_xscale(), ax.get_yscale()) == ("asinh", "log")
    assert "loss / parameter²" in ax.get_xlabel()
    assert "parameter² / loss" in ax.get_ylabel()
    edges = [x.get_xdata()[0] for x in ax.lines if x.get_linestyle() == "--"]
    assert sorted(edges) == [-1.5, 1.5]
    x, _ = line(ax, "3 outliers")
    assert sorted(x) == [-8, 2, 30]
    assert {t.get_text() for t in ax.texts} == {"30", "-8", "2"}
    x, y = line(ax, "semicircle, edges ±1")
    middle = np.abs(x) < 0.9
    law = 2 / np.pi * np.sqrt(1 - x[middle] ** 2)
    np.testing.assert_allclose(y[middle], law, rtol=1e-6)
    # Every outlier is inside the picture, and one eigenvalue stands above its floor.
    assert ax.get_xlim()[0] < -8
    assert ax.get_xlim()[1] > 30
    assert ax.get_ylim()[0] < 1 / P


def test_density_picture_needs_nothing_but_a_spectrum(tmp_path):
    ax = plot.density(semicircle())
    assert [x.get_label() for x in ax.lines] == ["spectral density"]
    ax.figure.savefig(tmp_path / "density.png")
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_given_wins():
    ax = Figure().subplots()
    spectrum = with_spikes([30.0])
    same = plot.density(
        spectrum,
        outliers=found([30.0]),
        noise=semicircle(),
        variance=1.0,
        linear_width=3.0,
        ax=ax,
    )
    assert same is ax
    line(ax, "semicircle, edges ±2")
    line(plot.density(spectrum, noise=semicircle()), "semicircle, edges ±1")
    assert ax.xaxis.get_transform().linear_width == 3.0
    zero = plot.density(spectrum, variance=0.0)
    assert [x.get_label() for x in zero.lines] == ["spectral density"]


def test_a_multiple_of_the_unit_matrix_can_be_drawn():
    for value in (0.0, -3.0):
        unit = SpectralDensity(jnp.full((2, 4), value), jnp.full((2, 4), 0.25), 7)
        ax = plot.density(unit)
        assert ax.get_xlim()[0] < value < ax.get_xlim()[1]
        x, y = line(ax, "spectral density")
        assert abs(x[np.argmax(y)] - value) < 0.1


def test_squared_overlaps_are_those_of_the_flat_vectors():
    first, second = (
        EigenPairs(jnp.ones(k), vectors(key, k), jnp.zeros(k), 0)
        for k, key in zip((3, 2), jax.random.split(jax.random.key(3)), strict=True)
    )
    u, v = (
        np.concatenate([x["a"], x["b"].reshape(-1, 4)], axis=1)
        for x in (first.eigenvectors, second.eigenvectors)
    )
    got = squared_overlaps(first, second)
    np.testing.assert_allclose(got, (u @ v.T) ** 2, atol=1e-14)
    np.testing.assert_allclose(squared_overlaps(first, first), np.eye(3), atol=1e-14)


@pytest.mark.parametrize("second", ["batch", "truth"])
def test_overlap_picture_estimates_once_or_twice(second):
    first = found([4.0, -2.0, 0.9], seed=1)
    other = found([3.5, 2.5], seed=2)
    overlaps = squared_overlaps(first, other)
    # Of the outliers alone.
    estimate = np.asarray(first.overlaps_squared)[:2]
    power = 2 if second == "batch" else 1
    if second == "batch":
        partners = overlaps.argmax(1)[:2]
        estimate = estimate * np.asarray(other.overlaps_squared)[partners]
    else:
        other = EigenPairs(other.eigenvalues, other.eigenvectors, other.residuals, 0)
    ax = plot.eigenvector_overlap(first, other, variance=VARIANCE)
    x, y = line(ax, "estimated from the halves")
    np.testing.assert_allclose(x, [4, 2])
    np.testing.assert_allclose(y, estimate)
    x, y = line(ax, "Theorem 1")
    assert x[0] == pytest.approx(0.9 * 0.9)
    far = x > 1.05
    nu = (x[far] + np.sqrt(x[far] ** 2 - 4 * VARIANCE)) / 2
    law = (1 - VARIANCE / nu**2) ** power
    np.testing.assert_allclose(y[far], law, atol=1e-6)
    assert (y[x < 1] == 0).all()
    x, y = line(ax, "projection on all 2")
    np.testing.assert_allclose(x, [4, 2, 0.9])
    np.testing.assert_allclose(y, overlaps.sum(1))
    np.testing.assert_allclose(line(ax, "best partner")[1], overlaps.max(1))
    plain = plot.eigenvector_overlap(first, other)
    assert not any(str(x.get_label()).startswith("Theorem") for x in plain.lines)


def test_two_noisy_batches_overlap_by_the_product():
    """The law that the picture draws, by experiment: spiked Wigner, nu = 2 s."""
    size, spike, s2 = 400, 1.0, 0.25
    truth = jnp.zeros(size).at[0].set(spike)

    def leading(key):
        noise = jax.random.normal(key, (size, size))
        noise = (noise + noise.T) * (s2 / (2 * size)) ** 0.5
        return jnp.linalg.eigh(noise + jnp.diag(truth))[1][:, -1]

    draws = jax.lax.map(leading, jax.random.split(jax.random.key(5), 16))
    with_truth = np.asarray(draws[:, 0]) ** 2
    gram = np.asarray(draws @ draws.T) ** 2
    between = gram[np.triu_indices(16, 1)]
    predicted = 1 - s2 / spike**2
    np.testing.assert_allclose(with_truth.mean(), predicted, atol=0.03)
    np.testing.assert_allclose(between.mean(), predicted**2, atol=0.04)


def test_layer_ridges_stand_in_order_on_one_axis(tmp_path):
    spectra = {"one": with_spikes([9.0]), "two": semicircle(), "three": semicircle()}
    ax = plot.layer_densities(spectra)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["three\nP = 1,000", "two\nP = 1,000", "one\nP = 1,000"]
    ridges = [np.asarray(x.get_ydata()) for x in ax.lines]
    for base, ridge in zip((2, 1, 0), ridges, strict=True):
        assert ridge.min() == base
        assert base + 0.5 < ridge.max() <= base + 0.9
    # Only the first has something at its right end.
    x = np.asarray(ax.lines[0].get_xdata())
    assert [r[np.argmin(np.abs(x - 9))] % 1 > 0 for r in ridges] == [True, False, False]
    ax.figure.savefig(tmp_path / "layers.png")


def test_no_pyplot_no_state():
    folder = pathlib.Path(plot.__file__).parent
    used = [p.name for p in folder.glob("*.py") if "import pyplot" in p.read_text()]
    used += [p.name for p in folder.glob("*.py") if "lib.pyplot" in p.read_text()]
    assert used == []


def test_bad_input():
    spectrum = semicircle()
    with pytest.raises(ValueError, match=r"linear_width is 0.0, and must be above 0"):
        plot.density(spectrum, linear_width=0.0)
    with pytest.raises(TypeError, match=r"EigenPairs, .* spectral_density returns"):
        plot.density(
            EigenPairs(jnp.ones(1), jnp.ones((1, 1)), jnp.zeros(1), 0)  # pyright: ignore
        )
    broken = spectrum._replace(nodes=spectrum.nodes * jnp.nan)
    with pytest.raises(ValueError, match=r"nodes that are not finite: nothing can be"):
        plot.density(broken)
    with pytest.raises(ValueError, match=r"spectra is empty: hand over at least one"):
        plot.layer_densities({})
    pairs = EigenPairs(jnp.ones(2), vectors(jax.random.key(0), 2), jnp.zeros(2), 0)
    with pytest.raises(
        TypeError, match=r"first is of type EigenPairs, .* swap the two"
    ):
        plot.eigenvector_overlap(pairs, pairs)
    other = pairs._replace(eigenvectors={"a": jnp.ones((2, 6))})
    with pytest.raises(ValueError, match=r"\[\(6,\)\] cannot be compared: both sides"):
        squared_overlaps(pairs, other)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in [x for x in sys.modules if x.startswith("rmtdamp.plot")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [x for x in sys.modules if x.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rmtdamp\[plot\]'"):
        importlib.import_module("rmtdamp.plot")
