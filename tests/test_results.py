"""What the README quotes: the kept results of the digits, within their limits, and nothing typed by hand."""

import copy
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PATH = ROOT / "benchmarks" / "digits_accuracy_equals_float32.py"
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_quotes_the_kept_results(benchmark):
    assert benchmark.with_table(README, benchmark.newest()) == README


def test_differences_lie_within_the_limits(benchmark):
    document = benchmark.newest()
    assert benchmark.misses(document) == []
    for mode in ("grow", "restart"):
        run = document["modes"][mode]
        assert [entry["name"] for entry in run["networks"]] == ["convnet", "mlp", "resnet"]
        assert all(len(entry["difference"]["each"]) >= 5 for entry in run["networks"])
        assert run["settings"]["mode"] == mode and run["command"].startswith("jax-apt compare")


@pytest.mark.parametrize(("each", "mean"), [([0.0, -1.5], -0.1), ([0.4, 0.8], 0.6)])
def test_a_loss_beyond_the_limits_is_seen(benchmark, each, mean):
    document = copy.deepcopy(benchmark.newest())
    document["modes"]["grow"]["networks"][0]["difference"] |= {"each": each, "mean": mean}
    assert benchmark.misses(document)[0].startswith("convnet (grow)")


def test_data_chose_the_widths(benchmark):
    """Under one configuration some gradients end at 8 bits and others above."""
    networks = benchmark.newest()["modes"]["restart"]["networks"]
    final = [
        bits
        for entry in networks
        for layer in entry["bits"].values()
        for bits in layer["tensors"]["dy"]["final_bits"]
    ]
    assert 8 in final and max(final) > 8


def test_a_readme_without_marks_is_refused(benchmark):
    with pytest.raises(ValueError, match="has 0 tables"):
        benchmark.with_table("# nothing", benchmark.newest())


@pytest.mark.parametrize("page", ["docs/results.md", "README.md"])
def test_the_page_of_results_is_that_of_the_kept_runs(page):
    from jax_apt.zoo import tables
    from jax_apt.zoo.compare import finished_entries

    folder = ROOT / "benchmarks" / "results" / "networks"
    entries = finished_entries(folder / "runs", across_versions=True)
    text = (ROOT / page).read_text()
    assert entries and tables.put(entries, text) == text
