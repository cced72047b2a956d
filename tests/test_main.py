"""The main job as a user meets it: options, report, resuming, broken files."""

import gzip
import io
import json
import struct
import sys

import numpy as np
import pytest
import rich.console
from sklearn.datasets import load_digits

from rmtdamp.__main__ import main
from rmtdamp.demo import _train
from rmtdamp.demo._data import DataError, load_digits as digits, load_idx, read_idx
from rmtdamp.demo._report import table
from rmtdamp.demo._train import DEFAULT_METHODS, METHODS

pytestmark = pytest.mark.usefixtures("standard_promotion")

QUICK = ["--epochs", "2", "--seeds", "2", "--width", "8", "--every", "5"]
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array):
    """An array in the idx format, by its specification."""
    array = np.asarray(array, np.uint8)
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """Digits as if they were MNIST: gzipped idx files."""
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target
    parts = images[:300], labels[:300], images[300:400], labels[300:400]
    where = tmp_path / "small-mnist"
    where.mkdir()
    for name, part in zip(NAMES, parts, strict=True):
        (where / f"{name}.gz").write_bytes(gzip.compress(idx(part)))
    return where


def test_report_on_digits_and_resume(tmp_path, capsys, monkeypatch):
    out = tmp_path / "report"
    assert main([*QUICK, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for method in _train.DEFAULT_METHODS:
        assert method in printed
    assert "digits: mean ± standard error of 2 seeds, last epoch" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["data"] == "digits"
    assert set(report["summary"]) == set(_train.DEFAULT_METHODS)
    learned = report["runs"]["auto-adam"]
    assert len(learned) == 2
    assert [r["epoch"] for r in learned[0]] == [1, 2]
    assert learned[0][-1]["measured_variance"] is None  # its rule looks elsewhere
    fast = report["runs"]["auto-adam-fast"]
    assert fast[0][-1]["damping"] > 3 * learned[0][-1]["damping"] > 3e-8
    final = report["summary"]["adam"]["test_loss"]["mean"]
    assert 0 < final < np.log(10)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    # A lost run is made again, with the same numbers; the others are not.
    trained = []
    original = _train.train
    spy = lambda data, method, settings, seed, kept: (
        trained.append((method, seed)) or original(data, method, settings, seed, kept)
    )
    monkeypatch.setattr(sys.modules["rmtdamp.__main__"], "train", spy)
    (out / "runs" / "auto-adam-1.json").unlink()
    assert main([*QUICK, "--out", str(out)]) == 0
    assert trained == [("auto-adam", 1)]
    again = json.loads((out / "report.json").read_text())["runs"]["auto-adam"]
    timeless = lambda runs: [
        [{k: v for k, v in r.items() if k != "steps_per_second"} for r in run]
        for run in runs
    ]
    assert timeless(again) == timeless(learned)

    assert main([*QUICK, "--epochs", "3", "--out", str(out)]) == 2
    assert "made with other options (epochs)" in capsys.readouterr().err
    (out / "runs" / "adam-0.json").write_text("{")
    assert main([*QUICK, "--out", str(out)]) == 2
    assert "adam-0.json is damaged: delete it" in capsys.readouterr().err


def test_one_seed_has_no_standard_error():
    run = [_train.Record(1, 0.5, 0.6, 0.9, 0.8, None, None, 100.0)]
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(table({"adam": [run]}, "digits"))
    printed = console.file.getvalue()
    assert "digits: one seed, last epoch" in printed
    assert "±" not in printed


def test_an_interrupt_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    original = _train.train

    def interrupted(data, method, settings, seed, kept):
        if seed == 1:
            raise KeyboardInterrupt
        yield from original(data, method, settings, seed, kept)

    monkeypatch.setattr(sys.modules["rmtdamp.__main__"], "train", interrupted)
    options = [*QUICK, "--methods", "adam", "--out", str(tmp_path)]
    assert main(options) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["adam-0.json"]


@pytest.mark.parametrize("rule", _train.RULES)
def test_idx_folder_and_options(folder, tmp_path, rule):
    out = tmp_path / "report"
    options = ["--data", str(folder), "--train-size", "256", "--form", "shrinkage"]
    options += ["--rule", rule, "--methods", "auto-adam", "--out", str(out)]
    assert main([*QUICK, *options]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["data"] == "small-mnist (256 examples)"
    assert report["settings"]["rule"] == rule
    variance = report["runs"]["auto-adam"][0][-1]["measured_variance"]
    assert (variance is None) == (rule == "stability-floor")


def test_idx_round_trip_gzipped_or_not(folder):
    data = load_idx(folder)
    path = folder / f"{NAMES[0]}.gz"
    plain = folder / NAMES[0]
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    np.testing.assert_array_equal(read_idx(plain), read_idx(path))
    path.unlink()
    np.testing.assert_array_equal(load_idx(folder).train[0], data.train[0])
    assert data.train[0].shape == (300, 64)
    assert data.num_classes == 10
    np.testing.assert_allclose(data.train[0].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(data.train[0].std(), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: gzip.compress(raw)[:200], "is damaged: .*; fetch it again"),
        (lambda raw: b"not gzip at all", "is damaged: Not a gzipped file"),
        (lambda raw: gzip.compress(raw[:-1]), "is truncated .* fetch it again"),
        (lambda raw: gzip.compress(raw + b"x"), "has too much in it"),
        (
            lambda raw: gzip.compress(b"GIF89a"),
            "not an idx file .* begins with 47494638",
        ),
        (lambda raw: gzip.compress(b""), "begins with nothing"),
        (lambda raw: gzip.compress(raw[:6]), "is truncated"),
        (lambda raw: gzip.compress(idx([1, 2])), "do not belong together"),
    ],
    ids=["cut", "plain", "short", "long", "gif", "empty", "header", "shape"],
)
def test_broken_data_files(folder, tmp_path, capsys, damage, message):
    path = folder / f"{NAMES[0]}.gz"
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(DataError, match=f"{NAMES[0]}.*{message}"):
        load_idx(folder)
    assert main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rmtdamp: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_data(folder, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_idx(tmp_path / "nowhere")
    with pytest.raises(DataError, match="missing does not exist"):
        read_idx(tmp_path / "missing")
    (folder / f"{NAMES[3]}.gz").unlink()
    with pytest.raises(DataError, match=f"holds no {NAMES[3]}.gz"):
        load_idx(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "'0' is not a whole number of at least 1"),
        (["--epochs", "many"], "'many' is not a whole number"),
        (["--learning-rate", "0"], "'0' is not a number above 0"),
        (["--damping", "nan"], "'nan' is not a number of at least 0"),
        (["--floor", "-1"], "'-1' is not a number of at least 0"),
        (["--methods", "lion"], "invalid choice: 'lion'"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--batch-size", "5000"], "--batch-size is 5000, and digits has 1280"),
        (["--train-size", "5000"], "--train-size is 5000, and digits has 1280"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options_get_one_line_and_exit_code_2(tmp_path, capsys, options, message):
    try:
        code = main([*options, "--out", str(tmp_path / "out")])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_report_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot write the report to" in capsys.readouterr().err


def test_unknown_method():
    with pytest.raises(ValueError, match="method is 'lion': choose from sgd, adam"):
        _train.transformation("lion", _train.Settings(), (4, 3), 1)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in _train.Settings._fields:
        assert "--" + field.replace("_", "-") in text
    assert "%%" not in text


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(METHODS) - set(DEFAULT_METHODS)))
def test_other_learners_train(method):
    """From a loss of log 10, in 20 epochs of 14 steps, at a learning rate for them."""
    settings = _train.Settings(
        epochs=20,
        width=16,
        # Its steps are as long as the damping lets them be, and the floor's is large.
        learning_rate=3e-2 if method == "auto-spectral" else 1e-2,
        damping=0.1,
        floor=0.1,
        every=5,
    )
    *_, last = _train.train(digits(), method, settings, seed=0)
    assert last.train_loss < 1.0
    if method == "adam-region":  # no damping
        assert last.damping is None
    else:
        assert float(last.damping or 0) > (0 if method == "kfac" else settings.floor)
