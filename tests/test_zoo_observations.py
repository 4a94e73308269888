"""Figures of the paper's observations, and the command line beyond the digits."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_apt.zoo import cli, observations, tables
from jax_apt.zoo.compare import gradient_shares, overall, paired_difference
from jax_apt.zoo.precisions import Settings
from jax_apt.zoo.tasks import TASKS
from jax_apt.zoo.trainer import Trainer

pytestmark = pytest.mark.usefixtures("promotion_as_users_have_it", "quick_compilation")

QUICK = Settings(epochs=1, batch_size=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished comparison with gradients of 8 bits beside APT."""
    out = tmp_path_factory.mktemp("finished")
    options = ["--network", "mlp", "--network", "convnet", "--seeds", "2", "--epochs", "1"]
    options += ["--batch-size", "800", "--precision", "int8", "--out", str(out)]
    patch, recipe = pytest.MonkeyPatch(), replace(TASKS["digits"].recipe, timed_pairs=2)
    patch.setitem(TASKS, "digits", replace(TASKS["digits"], recipe=recipe))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main(["compare", *options]) == 0
    patch.undo()
    return out


def test_other_precisions_are_paired_with_float32(folder):
    results = json.loads((folder / "results.json").read_text())
    for entry in results["networks"]:
        assert set(entry["seeds"]) == {"float32", "apt", "int8"} and set(entry["others"]) == {"int8"}
        other = entry["others"]["int8"]
        expected = paired_difference(entry["seeds"]["float32"], entry["seeds"]["int8"])
        assert other["difference"] == expected
        assert gradient_shares(other["bits"]) == {"8": 1.0}
    means = [entry["difference"]["mean"] for entry in results["networks"]]
    assert results["overall"]["apt"]["mean"] == pytest.approx(np.mean(means))
    assert set(results["overall"]) == {"apt", "int8"} == set(overall(results["networks"]))
    assert results["overall"]["int8"]["networks"] == 2


def test_the_tables_have_a_row_per_network_and_name_command_and_machine(folder):
    results = json.loads((folder / "results.json").read_text())
    text = (folder / "results.md").read_text()
    origin = tables.describe_origin(results["command"], results["environment"])
    assert text == tables.markdown(results["networks"]) + origin
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for table in (rows[:4], rows[4:]):  # of float32 and APT, and of the other precisions
        assert len(table) == 4 and len({row.count("|") for row in table}) == 1
        assert table[2].startswith("| mlp |") and table[3].startswith("| convnet |")
    for word in (results["command"], results["environment"]["cpu"], "| mlp | digits (top-1) | 2 |"):
        assert word in text


def test_observe_draws_ranges_and_costs(folder, tmp_path, capsys):
    assert cli.main(["observe", "--results", str(folder), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ranges-mlp.png", "ranges-convnet.png", "costs.png"}
    assert "pictures are in" in capsys.readouterr().out
    assert cli.main(["observe", "--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "run jax-apt compare" in capsys.readouterr().err


def test_layer_gradients_are_those_of_the_outputs():
    """The last layer's is softmax minus the labels, by hand; the biases' are sums over the batch."""
    trainer = Trainer("mlp", QUICK)
    data = trainer.task.load(0)
    trained, _ = trainer.start(0, "float32", data)
    inputs, labels = next(data.batches(400, 0, 0))
    gradients = observations._layer_gradients(trainer)(trained, inputs, labels)
    logits = trainer.model.apply({"params": trained.params}, inputs)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(labels, 10)) / 400
    np.testing.assert_allclose(gradients[-1], expected, atol=1e-7)
    loss = jax.grad(lambda p: trainer.task.loss(trainer.model.apply({"params": p}, inputs), labels))
    biases = loss(trained.params)
    for i, g in enumerate(gradients):
        np.testing.assert_allclose(jnp.sum(g, 0), biases[f"Dense_{i}"]["bias"], atol=1e-6)


def test_errors_are_measured_and_correlated(tmp_path, monkeypatch):
    scores = {}

    def score(trainer, settings, layer, bits):
        return scores.setdefault((layer, bits), 90.0 - 100 / 4**bits)

    monkeypatch.setattr(observations, "_score_with_one_gradient", score)
    result = observations.correlate_errors("mlp", QUICK, lambda _: None, widths=(2, 4, 8))
    layers = [f"Dense_{i}" for i in range(3)]
    assert len(result["points"]) == 9 and set(scores) == {(x, bits) for x in layers for bits in (2, 4, 8)}
    for layer in layers:
        values = [p["elementwise"] for p in result["points"] if p["layer"] == layer]
        assert values[0] > values[1] > values[2] > 0
    assert result["rank_correlation"]["elementwise"] > 0.8
    observations.draw_correlation(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_one_gradient_of_two_bits_trains_worse_than_one_of_sixteen():
    settings = Settings(epochs=2, batch_size=200)
    trainer = Trainer("mlp", settings)
    coarse, fine = (
        observations._score_with_one_gradient(trainer, settings, "Dense_1", bits) for bits in (2, 16)
    )
    float32 = trainer.run(0, "float32", lambda: None)["score"]
    assert abs(fine - float32) < 2 and coarse != fine
    _, step = observations._step_with_one_gradient(trainer, settings, "Dense_1")
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("compare --task detection --network resnet18", ("resnet18", "task detection", "ssd300")),
        ("compare --all --network mlp", ("--all", "leave out --network")),
        ("train resnet99 --data .", ("'resnet99'", "resnet18-cifar10")),
        ("train resnet18-cifar10 --data .", ("data_batch_1",)),
    ],
)
def test_what_does_not_fit_is_named(command, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    output = capsys.readouterr()
    assert output.out == "" and all(word in output.err for word in words)
