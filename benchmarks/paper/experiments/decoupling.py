"""arXiv 2010.04261: layer-wise Hessians as Kronecker products; a bound of errors."""

import functools
import itertools
import pathlib
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np

import rmtdamp.flax
from benchmarks.paper._experiment import Experiment
from benchmarks.shared import claims, report, training
from benchmarks.shared.claims import above, below, by, cells, ends, mean
from benchmarks.shared.models import build
from benchmarks.shared.optimizers import Method
from benchmarks.shared.runs import Row, rounded, runs_of
from rmtdamp import hessian, kronecker, pac_bayes
from rmtdamp.demo._train import cross_entropy

SEEDS, SECOND = range(5), 100  # what the second of two models adds to the seed
DATA, NAMES = ("mnist", "fashion-mnist"), {"mlp": "MLP", "lenet": "LeNet"}
MLP = {"model": "mlp", "width": 0.25, "num_train": 5000}
LENET = {"model": "lenet", "pool": 2, "num_train": 5000}
EXAMPLES = ((MLP, 1000), (LENET, 500))  # of the Hessians
ALL = {"model": "mlp", "width": 0.25, "pool": 2}  # the whole training set
SGD = {"learning_rate": 0.01, "damping": 0.0, "epochs": 10}
KS, TOP = (1, 2, 5, 10, 20), 10
OFF, HALF = 0.2, 0.5  # of the largest eigenvalue; of an overlap, or of a norm
LAYER_COLUMNS = {
    "lambda_1, estimate over true": ("ratio", 2),
    "overlap, k = 1": ("overlap_1", 2),
    "k = 10": ("overlap_10", 2),
    "k = 20": ("overlap_20", 2),
    "k = 10, sharing reduced": ("reduced_10", 2),
    "k = 10, random": ("random_10", 4),
    "first singular value": ("rank_one", 2),
    "of random matrices": ("random_rank_one", 2),
    "two models, k = 10": ("models_10", 3),
    "lambda_1(A) / Tr A": ("input_share", 2),
}
# Prior variances of a layer; how much the loss counts, over the number of examples.
PRIORS, WEIGHTS = 10.0 ** np.arange(-6, 1.05, 0.1), (0.2, 0.5, 1.0, 2.0)
DRAWS, FEWER, TRIAL = 4000, 1000, 100  # networks drawn: for the bound, to test, to try
ROWS = 250  # examples for each
BOUND_COLUMNS = {
    "bound": ("bound", 3),
    "error of Q, training": ("drawn_error", 3),
    "test": ("drawn_test_error", 3),
    "error of w, test": ("test_error", 3),
    "KL": ("kl", 0),
    "of hidden/0": ("kl_0", 0),
    "of hidden/1": ("kl_1", 0),
    "of out": ("kl_2", 0),
}


@functools.cache
def factors_fn_of(task: training.Task, shape, sharing="expand"):
    """What measures the exact Gauss-Newton factors."""
    model = build(task.model, 10, shape, task.width)
    options = {"fisher": "ggn", "sharing": sharing}
    return rmtdamp.flax.nnx_factors(model, cross_entropy, **options)


def trained(folder, task, seed, **numbers):
    made, by_hand = Method("sgd", "constant"), task.model == "lenet"
    numbers |= {"seed": seed, "by_hand": by_hand}
    return training.fit(folder, task, made, **numbers)


def factors_of(done, factors_fn, data, size):
    parts = [tuple(x[i : i + size] for x in data) for i in range(0, len(data[1]), size)]
    rest = {"loss_args": done.loss_args}
    at = done.params, parts, jax.random.key(0)
    return kronecker.dataset_factors(factors_fn, *at, **rest)


@functools.cache
def loss_of_part(loss_fn):
    """The loss as a function of a layer alone: its products spare the layers below."""

    def loss(part, batch, params, *loss_args):
        fill = lambda p, v: p if v is None else v
        return loss_fn(jax.tree.map(fill, params, part), batch, *loss_args)

    return loss


def true_eigenpairs(done, block, batch, key):
    """Of the Hessian of a layer."""
    part = kronecker.restrict_to_block(lambda v: v, done.params, block)[1]
    loss, rest = loss_of_part(done.network.loss_fn), (done.params, *done.loss_args)
    matvec = hessian.hessian_matvec(loss, part, batch, loss_args=rest)
    return hessian.eigsh(matvec, part, key, k=KS[-1], tol=1e-3)


def rank_one_share(matrices) -> float:
    """The squared share of the first singular value, a mean over matrices."""
    values = jnp.linalg.svd(matrices, compute_uv=False) ** 2
    return float((values[:, 0] / values.sum(1)).mean())


def as_matrices(block, part):
    """Vectors of a layer, (k, rows, columns)."""
    at = dict(zip(sorted(block.leaves), jax.tree.leaves(part), strict=True))
    one = lambda leaves: kronecker.to_matrix(block, leaves)[0]
    return jax.vmap(one)([at[place] for place in block.leaves])


def layer_eigenspaces(folder: pathlib.Path, *, task, examples, seed, **numbers) -> Row:
    """Top eigenspaces of each layer: true, estimated, and those of a second model."""
    task = training.Task(**task)
    pair = [trained(folder, task, seed + more, **numbers) for more in (0, SECOND)]
    batch = tuple(x[:examples] for x in pair[0].data[0])
    key, shape = jax.random.key(seed), batch[0].shape[1:]
    fns = [factors_fn_of(task, shape, sharing) for sharing in ("expand", "reduce")]
    factors = [factors_of(pair[0], fn, batch, 250) for fn in fns]
    layers = []
    for block, *both in zip(fns[0].blocks, *factors, strict=True):
        true, other = (true_eigenpairs(done, block, batch, key) for done in pair)
        of = functools.partial(kronecker.top_eigenpairs, block, k=KS[-1])
        bases = map(kronecker.eigenbasis, both)
        found, reduced = (of(basis, pair[0].params) for basis in bases)
        size, inputs = block.rows * block.columns, jnp.linalg.eigvalsh(both[0].inputs)
        vectors = as_matrices(block, true.leading(TOP).eigenvectors)
        ratio = float(found.eigenvalues[0] / true.eigenvalues[0])
        layer = {"layer": block.name, "convolution": len(block.shapes[0]) > 2}
        sides = {"overlap": found, "reduced": reduced, "models": other}
        for name, side in sides.items():
            squared = hessian.squared_overlaps(true, side)
            layer |= {f"{name}_{k}": squared[:k, :k].sum() / k for k in KS}
        layer |= {f"random_{k}": k / size for k in KS}
        layer |= {"ratio": ratio, "off": abs(ratio - 1)}
        layer["rank_one"] = rank_one_share(vectors)
        layer["random_rank_one"] = rank_one_share(jax.random.normal(key, vectors.shape))
        layer["input_share"] = float(inputs[0, -1] / inputs.sum())
        layer["true"] = rounded(true.eigenvalues)
        layer["estimate"] = rounded(found.eigenvalues)
        layers.append(layer)
    return {"layers": layers, "test_error": pair[0].curves["test_error"][-1]}


@functools.partial(jax.jit, static_argnames=("network", "blocks"))
def _errors(network, blocks, params, loss_args, bases, variances, keys, data):
    """The mean error of networks drawn from Q, each on some examples."""

    def one(key):
        first, second = jax.random.split(key)
        drawn = pac_bayes.draw(first, params, blocks, bases, variances)
        rows = jax.random.randint(second, (ROWS,), 0, len(data[1]))
        some = tuple(x[rows] for x in data)
        return training.judge(network, drawn, loss_args, some)[1] / ROWS

    return jax.lax.map(one, keys).mean()


def generalization_bound(folder: pathlib.Path, *, task, seed, **numbers) -> Row:
    """PAC-Bayes bounds of a network: layer-wise variances, and one for each layer."""
    task = training.Task(**task)
    done = trained(folder, task, seed, **numbers)
    train, test = done.data
    num, shape = len(train[1]), train[0].shape[1:]
    factors_fn = factors_fn_of(task, shape)
    blocks, start = factors_fn.blocks, training.initial(task, 10, shape, seed)[0]
    some = tuple(x[:20_000] for x in train)
    bases = [kronecker.eigenbasis(x) for x in factors_of(done, factors_fn, some, 2000)]
    moved = jax.tree.leaves(
        jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), done.params, start)
    )
    far = [float(sum(moved[place] for place in block.leaves)) for block in blocks]
    curved = [x.input_values[:, :, None] * x.output_values[:, None] for x in bases]
    flat = [jnp.full_like(h, h.mean()) for h in curved]
    keys = jax.random.split(jax.random.key(seed), 3)

    def layers_of(eigenvalues, weight):
        pairs = zip(eigenvalues, far, strict=True)
        return [pac_bayes.best_gaussian(*pair, weight * num, PRIORS) for pair in pairs]

    def error(key, layers, data, draws):
        at = done.params, done.loss_args, bases, [x.variances for x in layers]
        return float(
            _errors(done.network, blocks, *at, jax.random.split(key, draws), data)
        )

    def bound(observed, layers):
        kl, choices = sum(float(x.kl) for x in layers), len(PRIORS) ** len(layers)
        options = {"num_draws": DRAWS, "num_priors": choices}
        return float(pac_bayes.error_bound(observed, kl, num, **options))

    posteriors = []
    for name, eigenvalues in (("layer-wise", curved), ("isotropic", flat)):
        # The loss's weight is chosen by draws of its own, which cost the bound nothing.
        made = [layers_of(eigenvalues, weight) for weight in WEIGHTS]
        tried = [bound(error(keys[0], layers, train, TRIAL), layers) for layers in made]
        best = int(np.argmin(tried))
        layers = made[best]
        observed = error(keys[1], layers, train, DRAWS)
        row = {"posterior": name, "weight": WEIGHTS[best], "drawn_error": observed}
        row["drawn_test_error"] = error(keys[2], layers, test, FEWER)
        row["bound"] = bound(observed, layers)
        row |= {f"kl_{i}": float(x.kl) for i, x in enumerate(layers)}
        row["kl"] = sum(float(x.kl) for x in layers)
        row["prior_variances"] = rounded([x.prior_variance for x in layers])
        posteriors.append(row)
    errors = {n: done.curves[n][-1] for n in ("train_error", "test_error")}
    return {"posteriors": posteriors, "distances_squared": rounded(far), **errors}


def _eigenspace_runs():
    runs = []
    for (network, examples), data in itertools.product(EXAMPLES, DATA):
        config = {**SGD, "task": {"dataset": data, **network}, "examples": examples}
        runs += runs_of(layer_eigenspaces, config, seed=SEEDS)
    return runs


def _bound_runs():
    tasks = [{"dataset": data, **ALL} for data in DATA]
    return runs_of(generalization_bound, SGD, task=tasks, seed=SEEDS)


def _checks(found):
    checks, rows = [], [row for of in found.values() for row in of]
    for kind, wanted in (("Linear layers", False), ("Convolutions", True)):
        seeds = by([r for r in rows if r["convolution"] == wanted], itemgetter("seed"))
        of = lambda name, seeds=seeds: [mean(ends(x, name)) for x in seeds.values()]
        ten = "the ten sharpest directions"
        said = [
            "the largest eigenvalue of the estimate is off by less than 20 %",
            f"more than half of {ten} lies in the estimate's ten",
            "the overlap falls from ten dimensions to twenty",
            f"the first singular value holds more than half of {ten}, as matrices",
            f"{ten} of two models overlap by more than ten times what random ones do",
            f"{ten} of two models overlap by more than half",
        ]
        said = [f"{kind}: {text}" for text in said]
        checks += [
            below(said[0], of("off"), OFF),
            above(said[1], of("overlap_10"), HALF),
            claims.less(said[2], of("overlap_20"), of("overlap_10")),
            above(said[3], of("rank_one"), HALF),
            claims.more(said[4], of("models_10"), [10 * x for x in of("random_10")]),
            above(said[5], of("models_10"), HALF),
        ]
    return checks


def _bound_checks(found):
    checks = []
    for data in DATA:
        of = lambda name, posterior, data=data: ends(found[data, posterior], name)
        ours, flat = of("bound", "layer-wise"), of("bound", "isotropic")
        unseen = of("drawn_test_error", "layer-wise")
        checks += [
            below(f"{data}: the bound is not vacuous, below guessing's 0.9", ours, 0.9),
            claims.less(f"{data}: it is lower than with isotropic layers", ours, flat),
            claims.less(f"{data}: Q's error on test images is below it", unseen, ours),
        ]
    return checks


def _over_k(rows):
    """Overlaps against k: with the estimate, and of two models."""
    of_layer = lambda row: f"{NAMES[row['task']['model']]} {row['layer']}"
    found = by(rows, of_layer)
    titles = {"overlap": "true and estimated", "models": "of two models"}
    for name, title in titles.items():
        lines = []
        for (label, of), (field, style) in itertools.product(
            found.items(), (("random", ":"), (name, "o-"))
        ):
            means = [mean(ends(of, f"{field}_{k}")) for k in KS]
            lines.append(report.Line(label, KS, means, style))
        axes = {"xlabel": "k", "xscale": "log", "ylim": (0, 1)}
        yield report.curves(
            lines, **axes, title=f"eigenspaces {title} (dotted: random)"
        )


_each_layer = lambda rows: [row | x for row in rows for x in row["layers"]]
_each_posterior = lambda rows: [row | x for row in rows for x in row["posteriors"]]
_layer = lambda row: {
    "data": row["task"]["dataset"],
    "network": NAMES[row["task"]["model"]],
    "layer": row["layer"],
}
_posterior = lambda row: {"data": row["task"]["dataset"], "posterior": row["posterior"]}
_layer_line = lambda key, found: cells(found[key], LAYER_COLUMNS)
_bound_line = lambda key, found: cells(found[key], BOUND_COLUMNS)
BOUNDS = [("linear", "bound", "error of Q, training", "test", "error of w, test")]
EXPERIMENTS = [
    Experiment(
        "decoupling", _eigenspace_runs, _layer, _layer_line, _checks, [_over_k],
        each=_each_layer,
    ),
    Experiment(
        "decoupling_bound", _bound_runs, _posterior, _bound_line, _bound_checks, BOUNDS,
        each=_each_posterior,
    ),
]  # fmt: skip
