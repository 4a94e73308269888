"""Frameworks: examples train, the code of the page runs, and models of installed libraries run unmodified."""

import importlib.util
import pathlib
import re

import pytest
from flax import nnx
from foreign_models_run_unmodified import measure, misses, newest, with_table
from harness.foreign_models import CASES

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "frameworks.md").read_text()
pytestmark = pytest.mark.usefixtures("promotion_as_users_have_it")


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_trained(losses, report, steps):
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert report.steps == steps
    assert not report.layout.left_in_float
    assert all(t["dy"].updates > 0 for t in report.tensors.values())


def test_linen_example_trains():
    """BatchNorm as a mutable collection, dropout's keys, and a scan over rematerialized layers."""
    losses, _, report = example("train_linen").train(steps=30)
    assert_trained(losses, report, 30)
    assert report.layout.names() == ("Conv_0", "Dense_0", "ScanCheckpointBlock_0/Dense_0", "Dense_1")
    assert len(report.tensors["ScanCheckpointBlock_0/Dense_0"]["dy"].bits) == 3


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_nnx_example_trains(graph):
    with nnx.set_graph_mode(graph):
        losses, accuracy, report = example("train_nnx").train(steps=30)
    assert_trained(losses, report, 30)
    assert report.layout.names() == ("conv", "hidden", "head")
    assert accuracy > 0.3  # with BatchNorm's moving averages, which start far from the data's


def test_haiku_example_trains():
    losses, _, report = example("train_haiku").train(steps=30)
    assert_trained(losses, report, 30)
    assert report.layout.names() == ("conv2_d", "mlp/~/linear_0", "mlp/~/linear_1")


def test_equinox_example_trains():
    losses, _, report = example("train_equinox").train(steps=30)
    assert_trained(losses, report, 30)
    assert report.layout.names() == ("conv", "mlp/layers/0", "mlp/layers/1")


def test_plain_example_trains():
    losses, _, report = example("train_plain").train(steps=60)
    assert_trained(losses, report, 60)
    assert report.layout.names() == ("input", "hidden", "head")


@pytest.mark.parametrize("accumulate", ["multisteps", "taps"])
def test_optax_loops_train(accumulate):
    losses, accuracy, report = example("optax_loops").train(steps=60, accumulate=accumulate)
    assert_trained(losses, report, 60)
    assert accuracy > 0.3  # of the average of the weights


def test_the_pages_code_runs(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "frameworks.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "after 1 training steps" in printed and "head    dot_general" in printed


# Models of installed libraries


@pytest.mark.parametrize(
    "name",
    [
        "linen.MultiHeadDotProductAttention, causal, dropout",
        "nnx.RNN of LSTMCell",
        "nets.MobileNetV1, training",
        "nn.MultiheadAttention, rotary, dropout",
        "Llama, grouped queries",
    ],
)
def test_model_runs_unmodified(name):
    """Found layers, gradients as in float32 at 24 bits, and one trace while bits change."""
    (case,) = [case for case in CASES if case.name == name]
    row = measure(case)
    assert misses(row) == []
    assert set(row["left"]) <= {"nothing is summed: it multiplies element by element"}
    error = {bits: of["relative"] for bits, of in row["errors"].items()}
    assert error["24"] < error["16"] < error["8"] and error["16"] < 0.05


def test_a_wrong_gradient_and_a_second_trace_are_seen():
    row = newest()["rows"][0]
    assert misses(row) == []
    for change, words in (
        ({"errors": {"24": {"relative": 0.1}}}, "24 bits is off by 1.0e-01"),
        ({"traces": 2}, "2 traces and 1 compilations"),
        ({"quantized": 0}, "no layer changed its width"),
    ):
        assert [words in found for found in misses(row | change)] == [True]


def test_the_page_quotes_the_kept_results():
    rows = newest()["rows"]
    assert with_table(PAGE, newest()) == PAGE
    assert [row["model"] for row in rows] == [case.name for case in CASES] and len(rows) >= 10
    assert [miss for row in rows for miss in misses(row)] == []
    assert {"flax", "equinox", "dm-haiku", "transformers"} <= {row["package"] for row in rows}
    with pytest.raises(ValueError, match="has 0 tables"):
        with_table("# nothing", newest())
