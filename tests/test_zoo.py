"""`jax-apt compare`: paired runs that differ in the transform alone, kept safely and reported exactly."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from scipy import stats

import jax_apt as apt
from jax_apt.zoo import cli, environment, tables
from jax_apt.zoo.compare import Job, compare, finished_entries, in_order, merge_reports, paired_difference
from jax_apt.zoo.history import changes, per_step
from jax_apt.zoo.metrics import top1
from jax_apt.zoo.networks import NETWORKS
from jax_apt.zoo.precisions import PRECISIONS, Settings
from jax_apt.zoo.runs import Runs, write_whole
from jax_apt.zoo.tasks import TASKS
from jax_apt.zoo.tasks.digits import distort, load_digits
from jax_apt.zoo.trainer import Trainer, count_steps

pytestmark = pytest.mark.usefixtures("promotion_as_users_have_it", "quick_compilation")

ROOT = pathlib.Path(__file__).parents[1]
QUICK = Settings(epochs=1, batch_size=400)
QUICK_OPTIONS = ["--network", "mlp", "--seeds", "2", "--epochs", "1", "--batch-size", "400"]


def no_progress(*_):
    pass


def command_line(*arguments, **environ):
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_apt.zoo.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environ,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished comparison, and the process that made it."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, command_line("compare", "--json", *QUICK_OPTIONS, "--out", str(folder))


@pytest.fixture(scope="module")
def trainer():
    return Trainer("mlp", QUICK)


# Tasks


def test_digits_split_holds_out_another_tenth_for_each_seed():
    folds = [load_digits(seed) for seed in range(3)]
    sizes = {(d.train_inputs.shape, d.test_inputs.shape, d.test_labels.shape) for d in folds}
    assert len(sizes) == 1  # one compilation serves all seeds
    assert all(not np.array_equal(folds[0].test_labels, d.test_labels) for d in folds[1:])


def test_digits_never_test_on_a_training_image(monkeypatch):
    monkeypatch.setattr("jax_apt.zoo.tasks.digits.distort", lambda images, rng: images)
    for seed in (0, 9):
        data = load_digits(seed)
        both = np.concatenate([data.train_inputs, data.test_inputs])
        train = {image.tobytes() for image in data.train_inputs}
        test = {image.tobytes() for image in data.test_inputs}
        assert both.min() == 0 and both.max() == 1
        assert not train & test


def test_digits_repeat_from_the_tenth_seed_on():
    np.testing.assert_array_equal(load_digits(0).test_inputs, load_digits(10).test_inputs)


def test_distort_moves_by_at_most_a_pixel(monkeypatch):
    monkeypatch.setattr("jax_apt.zoo.tasks.digits.NOISE", 0.0)
    image = np.zeros((200, 8, 8, 1), np.float32)
    image[:, 4, 4] = 1
    _, rows, columns, _ = np.nonzero(distort(image, np.random.default_rng(0)))
    assert len(rows) == 200 and set(rows) == set(columns) == {3, 4, 5}


def test_score_of_outputs_that_are_not_finite_is_zero():
    logits, labels = np.eye(4, dtype=np.float32), np.arange(4)
    assert top1(logits, labels) == 100
    assert top1(logits * np.nan, labels * 0) == 0


@pytest.mark.parametrize("name", TASKS["digits"].networks)
def test_every_network_is_quantized_as_a_whole(name):
    data, model = TASKS["digits"].load(0), NETWORKS[name].small(10)
    example = data.train_inputs[:4]
    variables = jax.eval_shape(model.init, jax.random.key(0), example)
    report = apt.apt_quantize(model.apply, backend="xla")
    layout = report.init(variables, example).layout
    kernels = [p for p, _ in jax.tree_util.tree_leaves_with_path(variables) if "kernel" in str(p)]
    assert len(layout.layers) == len(kernels) > 0
    assert layout.left_in_float == ()


# Pairs


def test_pairs_start_from_the_same_values_and_see_the_same_batches(trainer):
    data = trainer.task.load(3)
    starts = [trainer.start(3, precision, data)[0] for precision in PRECISIONS]
    jax.tree.map(np.testing.assert_array_equal, *starts)
    first, second = (list(trainer.task.load(3).batches(400, 3, 0)) for _ in PRECISIONS)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert len(first) == trainer.steps_per_epoch == count_steps(QUICK)


def test_seeds_and_epochs_differ(trainer):
    data = trainer.task.load(0)
    batches = [next(data.batches(64, *at))[0] for at in ((0, 0), (0, 1), (1, 0))]
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])
    starts = [jax.tree.leaves(trainer.start(seed, "float32", data)[0].params) for seed in (0, 1)]
    assert any(not np.array_equal(a, b) for a, b in zip(*starts, strict=True))


def test_precisions_differ_in_the_transform_alone(monkeypatch):
    """With every layer left in float, the APT run is the float32 run, bit for bit."""
    in_float = apt.Rule("", quantize=False)
    monkeypatch.setattr(apt, "Rule", lambda *_, **__: in_float)
    trainer = Trainer("mlp", QUICK)
    plain, replayed = (trainer.run(0, precision, no_progress) for precision in PRECISIONS)
    assert replayed["report"]["layers"] == []
    assert plain["losses"] == replayed["losses"]
    assert plain["scores"] == replayed["scores"]


def test_precisions_do_differ(trainer):
    plain, quantized = (trainer.run(0, precision, no_progress) for precision in PRECISIONS)
    assert plain["losses"] != quantized["losses"]
    assert plain["losses"] == pytest.approx(quantized["losses"], rel=0.05)


def test_a_run_repeats_exactly_and_counts_its_steps(trainer):
    steps = []
    first = trainer.run(1, "apt", lambda: steps.append(1))
    assert len(steps) == trainer.steps_per_epoch
    assert trainer.run(1, "apt", no_progress) == first


def test_each_step_is_compiled_once_for_all_seeds(trainer):
    for seed in (0, 1):
        for precision in PRECISIONS:
            trainer.run(seed, precision, no_progress)
    assert [trainer.steps[precision]._cache_size() for precision in PRECISIONS] == [1, 1]


def test_history_ends_with_the_state_and_starts_with_the_first_step(trainer):
    result = trainer.run(0, "apt", no_progress)
    layers = {layer["name"]: layer["tensors"]["dy"] for layer in result["report"]["layers"]}
    assert list(result["history"]) == list(layers) and result["steps"] == trainer.steps_per_epoch
    for name, kept in result["history"].items():
        bits, exponents = per_step(kept, result["steps"])
        assert len(bits) == len(exponents) == result["steps"]
        assert (bits[-1], exponents[-1]) == (layers[name]["bits"], layers[name]["exponent"])


def test_changes_are_undone():
    bits, exponents = np.array([8, 8, 8, 16, 16, 16]), np.array([-3, -3, -2, -10, -10, -9])
    kept = changes(bits, exponents)
    assert kept == {"steps": [0, 2, 3, 5], "bits": [8, 8, 16, 16], "exponent": [-3, -2, -10, -9]}
    np.testing.assert_array_equal(per_step(kept, 6), [bits, exponents])


def test_a_diverged_run_is_still_json(tmp_path):
    settings = Settings(epochs=2, batch_size=800, learning_rate=1e30)
    job = Job(settings, ["mlp"], PRECISIONS, Runs(tmp_path, {"settings": settings.to_dict()}))
    (entry,) = compare([job], 1, no_progress)
    assert json.loads(json.dumps(entry, allow_nan=False))["float32"] == 0
    assert None in entry["curves"]["float32"]["losses"][0]


def test_every_network_has_a_pair_before_any_has_two():
    """And the other precisions come after the pairs."""
    jobs = [Job(QUICK, names, ("float32", "apt", "int8"), None) for names in (["a", "b"], ["c"])]
    runs = [(run.seed, run.network, run.precision) for run in in_order(jobs, 2)]
    pairs = [(seed, n, p) for seed in (0, 1) for n in "abc" for p in ("float32", "apt")]
    assert runs == pairs + [(seed, n, "int8") for seed in (0, 1) for n in "abc"]


def test_step_times_are_ordered_quartiles(trainer):
    times = trainer.step_times(pairs=5)
    assert times["pairs"] == 5
    for precision in PRECISIONS:
        quartiles = times[precision]
        assert 0 < quartiles["low"] <= quartiles["median"] <= quartiles["high"]


# Statistics


def test_interval_is_that_of_scipy():
    rng = np.random.default_rng(0)
    float32, quantized = rng.normal(95, 1, 7), rng.normal(94, 1, 7)
    expected = stats.ttest_rel(quantized, float32).confidence_interval(0.95)
    difference = paired_difference(float32, quantized)
    assert (difference["low"], difference["high"]) == pytest.approx(expected)
    assert difference["mean"] == pytest.approx(np.mean(quantized) - np.mean(float32))


def test_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.302653 over sqrt(3).
    difference = paired_difference([10, 10, 10], [11, 12, 13])
    assert difference["low"] == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6)
    assert difference["high"] == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6)


def test_interval_of_equal_differences_is_a_point_and_of_one_pair_unknown():
    assert paired_difference([1, 2], [2, 3])["low"] == paired_difference([1, 2], [2, 3])["high"] == 1
    assert paired_difference([1], [3]) == {"mean": 2, "low": None, "high": None, "each": [2]}
    assert tables.format_difference(paired_difference([1], [3])) == "+2.00 [needs 2 seeds]"


def test_merged_reports_are_means_over_the_seeds():
    def report(share, interval, nonfinite):
        tensor = {"share": share, "mean_interval": interval, "nonfinite": nonfinite, "bits": 8}
        layer = {"name": "a", "backend": "xla", "reason": "why", "tensors": {"dy": tensor}}
        return {"layers": [layer]}

    first, second = report({"8": 1.0, "16": 0.0}, 2.0, 1), report({"8": 0.5, "16": 0.5}, 4.0, 2)
    merged = merge_reports([first, second])["a"]["tensors"]["dy"]
    assert merged["share"] == {"8": 0.75, "16": 0.25}
    assert (merged["mean_interval"], merged["nonfinite"]) == (3.0, 3)
    assert merged["final_bits"] == [8, 8]


# Finished runs, whatever made them


def finished_run(score):
    tensor = {"share": {"8": 1.0}, "mean_interval": 2.0, "nonfinite": 0, "bits": 8}
    layer = {"name": "a", "backend": "xla", "reason": "", "tensors": {"dy": tensor}}
    report = {"layers": [layer], "left_in_float": []}
    curves = {"scored_epochs": [1], "scores": [score], "losses": [1.0], "steps": 3}
    return {"score": score, **curves, "report": report, "history": {}}


def keep(folder, origin, task, network, **scores):
    """`float32=[...]`: scores by seed."""
    about = {"cpu": origin, "cores": 2, "isa": "avx2", "versions": {"jax": "1"}, "jax_apt": {"digest": "d"}}
    runs = Runs(folder, {"settings": {"task": task}, "environment": about})
    for precision, values in scores.items():
        for seed, score in enumerate(values):
            runs.save(finished_run(score), network=network, seed=seed, precision=precision)


def test_what_has_finished_is_compared_over_the_seeds_that_are_there(tmp_path):
    keep(tmp_path, "now", "clutter", "vgg16", float32=[50.0, 60.0, 70.0], apt=[51.0, 62.0], int8=[40.0])
    keep(tmp_path, "before", "clutter", "vgg16", float32=[0.0], apt=[0.0])  # fewer runs: do not count
    keep(tmp_path, "now", "digits", "mlp", float32=[90.0], apt=[89.0])
    keep(tmp_path, "now", "clutter", "alexnet", float32=[30.0])  # has no pair yet
    mlp, vgg = finished_entries(tmp_path)
    assert (mlp["name"], vgg["name"]) == ("mlp", "vgg16")
    assert vgg["difference"] == paired_difference([50.0, 60.0], [51.0, 62.0])
    assert (vgg["float32"], vgg["apt"], vgg["float32_spread"]) == (55.0, 56.5, 20.0)
    assert vgg["others"]["int8"]["difference"]["each"] == [-10.0]
    assert {origin["environment"]["cpu"] for origin in vgg["origins"]} == {"now"}
    assert tables.describe_origins([mlp, vgg]) == "- `jax-apt compare`; now, 2 cores, avx2; jax 1; code d\n"
    text = tables.markdown([mlp, vgg])
    assert "| mlp | digits (top-1) | 1 |" in text and "-1.00 [needs 2 seeds]" in text
    assert "mean over 2 networks: +0.25" in text and "mean over 1 networks: -10.00" in text


def test_runs_of_several_versions_count_together_if_asked_for(tmp_path):
    keep(tmp_path, "now", "clutter", "vgg16", float32=[50.0, 60.0], apt=[51.0])
    about = {"cpu": "later", "cores": 2, "isa": "amx", "versions": {}, "jax_apt": {"digest": "e"}}
    runs = Runs(tmp_path, {"settings": {"task": "clutter"}, "environment": about})
    runs.save(finished_run(62.0), network="vgg16", seed=1, precision="apt")
    other = Runs(tmp_path, {"settings": {"task": "clutter", "epochs": 1}, "environment": about})
    other.save(finished_run(0.0), network="vgg16", seed=2, precision="float32")
    (entry,) = finished_entries(tmp_path)
    assert entry["difference"]["each"] == [1.0]
    (entry,) = finished_entries(tmp_path, across_versions=True)
    assert entry["difference"]["each"] == [1.0, 2.0]
    assert "code d" in tables.describe_origins([entry]) and "code e" in tables.describe_origins([entry])


@pytest.mark.parametrize(
    ("mean", "spread", "verdict"),
    [(-1.4, 0, "paper's range"), (-2, 3, "float32's spread"), (2, 3, "float32's spread"), (-2, 1, "neither")],
)
def test_the_table_says_where_a_difference_lies(mean, spread, verdict):
    assert tables.describe_verdict({"difference": {"mean": mean}, "float32_spread": spread}) == verdict


def test_results_command_writes_the_table_between_marks(tmp_path, capsys):
    keep(tmp_path / "runs", "now", "digits", "mlp", float32=[90.0, 91.0], apt=[89.0, 91.0])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- networks -->\nold\n<!-- end of networks -->\nafter\n")
    assert cli.main(["results", str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert tables.markdown(finished_entries(tmp_path / "runs")) in text
    assert json.loads((tmp_path / "results.json").read_text())["networks"][0]["name"] == "mlp"
    readme = tmp_path / "readme.md"
    readme.write_text("<!-- networks in brief -->\n<!-- end of networks -->\n")
    assert cli.main(["results", str(tmp_path), "--into", str(readme), "--into", str(page)]) == 0
    assert "| mlp | digits (top-1) | 90.50 | 90.00 | -0.50 [-6.85, +5.85] (2) | - |" in readme.read_text()
    assert page.read_text() == text
    page.write_text("no marks")
    assert cli.main(["results", str(tmp_path), "--into", str(page)]) == 2
    assert cli.main(["results", str(tmp_path / "none")]) == 2
    errors = capsys.readouterr().err
    assert "must have the marks" in errors and "no network has a finished pair" in errors


# Runs on disk


def test_a_run_is_found_again_by_equal_settings_alone(tmp_path):
    which = {"network": "mlp", "seed": 0, "precision": "apt"}
    Runs(tmp_path, Settings().to_dict()).save({"score": 1.5}, **which)
    assert Runs(tmp_path, Settings().to_dict()).load(**which) == {"score": 1.5}
    others = {
        "epochs": 1,
        "batch_size": 1,
        "learning_rate": 1.0,
        "mode": "restart",
        "widths": (8, 16),
        "backend": "xla",
        "initial_fraction": 0.1,
        "warmup": 0.5,
    }
    assert set(others) == set(Settings().to_dict()) - {"task"}
    for name, value in others.items():
        assert Runs(tmp_path, Settings(**{name: value}).to_dict()).load(**which) is None
    for name, value in (("network", "convnet"), ("seed", 1), ("precision", "float32")):
        assert Runs(tmp_path, Settings().to_dict()).load(**which | {name: value}) is None


def damage_by_cutting(text):
    return text[: len(text) // 2]


def damage_a_digit(text):
    return text.replace("12.5", "13.5")


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_a_digit, lambda _: "", lambda _: "[]"])
def test_damaged_files_do_not_count(tmp_path, damage):
    runs = Runs(tmp_path, {})
    runs.save({"score": 12.5}, seed=0)
    path = runs.path(seed=0)
    path.write_text(damage(path.read_text()))
    assert runs.load(seed=0) is None
    assert runs.damaged == [path]


def test_damaged_bytes_do_not_count(tmp_path):
    runs = Runs(tmp_path, {})
    runs.path(seed=0).write_bytes(b"\xff\xfe\x00")
    assert runs.load(seed=0) is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"


# Command line


def check_entry(entry, seeds):
    assert {"name", "task", "float32", "apt", "difference", "bits"} <= set(entry)
    assert 0 <= entry["float32"] <= 100 and 0 <= entry["apt"] <= 100
    difference = entry["difference"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert difference["mean"] == pytest.approx(entry["apt"] - entry["float32"], abs=1e-6)
    assert len(entry["seeds"]["float32"]) == len(entry["seeds"]["apt"]) == seeds
    for layer in entry["bits"].values():
        assert layer["backend"] in ("native", "xla") and set(layer["tensors"]) == {"x", "w", "dy"}
        for tensor in layer["tensors"].values():
            assert sum(tensor["share"].values()) == pytest.approx(1)


def test_json_is_one_object_and_nothing_else(finished):
    _, process = finished
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    (entry,) = results["networks"]
    check_entry(entry, seeds=2)
    assert entry["name"] == "mlp" and entry["task"] == "digits"


def test_the_folder_holds_results_and_a_picture(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    check_entry(results["networks"][0], seeds=2)
    assert results["settings"]["seeds"] == 2
    assert results["command"].startswith("jax-apt compare --json --network mlp")
    assert results["config"]["steps_per_epoch"] == count_steps(QUICK)
    assert {"cpu", "isa", "versions"} <= set(results["environment"])
    assert (folder / "mlp.png").read_bytes().startswith(b"\x89PNG")


def test_the_environment_names_versions_that_are_installed():
    versions = environment.describe()["versions"]
    assert versions["jax"] == jax.__version__
    assert json.dumps(environment.describe())


def test_everything_finished_is_reused(finished, capsys):
    folder, process = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert cli.main(["compare", *QUICK_OPTIONS, "--json", "--out", str(folder)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    output = capsys.readouterr()
    assert "reused 4 of 4 runs" in output.err
    (now,), (then,) = json.loads(output.out)["networks"], json.loads(process.stdout)["networks"]
    assert now.pop("reused_runs") == 4 and then.pop("reused_runs") == 0
    assert now == then


def test_tables_name_scores_interval_widths_and_times(finished, capsys):
    folder, _ = finished
    assert cli.main(["compare", *QUICK_OPTIONS, "--out", str(folder)]) == 0
    text = capsys.readouterr().out
    for word in ("95 % CI", "float32 step", "APT step", "int8", "int24", "dY", "first 4 steps"):
        assert word in text


def test_a_damaged_run_is_trained_again_and_the_others_are_not(finished, tmp_path, capsys):
    folder, _ = finished
    kept = {path.name: path.read_text() for path in (folder / "runs").iterdir()}
    (tmp_path / "runs").mkdir()
    for name, text in kept.items():
        cut = "seed-1" in name or "mlp-1-apt" in name
        (tmp_path / "runs" / name).write_text(text[:99] if cut else text)
    assert cli.main(["compare", *QUICK_OPTIONS, "--json", "--out", str(tmp_path)]) == 0
    assert "was damaged" in (errors := capsys.readouterr().err)
    assert "reused 3 of 4 runs" in errors
    assert kept == {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}


def test_fresh_forgets_finished_runs(finished, tmp_path, capsys, monkeypatch):
    kept = json.loads(next((finished[0] / "runs").glob("mlp-1-apt-*")).read_text())["result"]
    times = {p: {"median": 1.0} for p in PRECISIONS}
    monkeypatch.setattr(Trainer, "run", lambda self, seed, precision, on_step: kept | {"score": 12.0})
    monkeypatch.setattr(Trainer, "step_times", lambda self, precisions: times)
    (tmp_path / "runs").mkdir()
    for path in (finished[0] / "runs").iterdir():
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    options = ["compare", *QUICK_OPTIONS, "--json", "--fresh", "--out", str(tmp_path)]
    assert cli.main(options) == 0
    (entry,) = json.loads(capsys.readouterr().out)["networks"]
    assert entry["reused_runs"] == 0 and entry["float32"] == 12


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_comparison_goes_on(tmp_path, kind, capsys):
    options = ["compare", "--json", *QUICK_OPTIONS, "--out", str(tmp_path)]
    options[options.index("2")] = "40"
    process = subprocess.Popen(
        [sys.executable, "-m", "jax_apt.zoo.cli", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("runs/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(kind)
    output, errors = process.communicate(timeout=300)
    assert output == ""
    if kind == signal.SIGINT:
        assert process.returncode == 130 and "interrupted" in errors
        assert "Traceback" not in errors
    finished = len(list(tmp_path.glob("runs/*.json")))
    assert 3 <= finished < 80
    assert cli.main([o if o != "40" else "2" for o in options]) == 0
    reused = json.loads(capsys.readouterr().out)["networks"][0]["reused_runs"]
    assert reused == min(finished, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--seeds 0", ("'0'", "whole number >= 1")),
        ("--seeds 1.5", ("'1.5'", "whole number >= 1")),
        ("--epochs x", ("'x'", "whole number >= 1")),
        ("--batch-size -3", ("'-3'", "whole number >= 1")),
        ("--batch-size 5000", ("5000", "1611 training examples")),
        ("--learning-rate nan", ("'nan'", "finite number > 0")),
        ("--learning-rate 0", ("'0'", "finite number > 0")),
        ("--initial-fraction 2", ("'2'", "0..1")),
        ("--mode shrink", ("'shrink'", "'grow'", "'restart'")),
        ("--backend gpu", ("'gpu'", "'native'", "'xla'", "'emulate'")),
        ("--network vgg", ("'vgg'", "'convnet'", "'mlp'", "'resnet'")),
        ("--task mnist", ("'mnist'", "'digits'")),
        ("--widths 16,8", ("'16,8'", "ascend")),
        ("--widths 8,99", ("'8,99'", "2..24")),
        ("--widths ,8", ("',8'", "8,16,24")),
        ("--speed", ("--speed",)),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(options, words, capsys, tmp_path):
    arguments = ["compare", *options.split(), "--out", str(tmp_path / "out")]
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    output = capsys.readouterr()
    assert status == 2 and output.out == ""
    for word in (options.split()[0], *words):
        assert word in output.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("jax_apt.plan._native_obstacle", lambda: "no such processor")
    assert cli.main(["compare", "--backend", "native", "--out", str(tmp_path)]) == 2
    assert "argument --backend: backend 'native' cannot run here: no such processor" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("package", cli.EXTRA_PACKAGES)
def test_a_missing_package_names_the_extra(package, tmp_path, capsys, monkeypatch):
    """Everything of the zoo is imported anew while the package cannot be."""
    import jax_apt

    monkeypatch.setattr(jax_apt, "zoo", None)  # set again by the import; undone after the test
    for name in [name for name in sys.modules if name.startswith(("jax_apt.zoo", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["compare", "--epochs", "1", "--out", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert f"{package!r} is missing" in output.err and "pip install 'jax-apt[cli]'" in output.err
    assert output.out == "" and not list(tmp_path.glob("runs/*"))
