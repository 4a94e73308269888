"""Readers on small files in the true formats, streams that resume, and trainings that go on."""

import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from jax_apt.zoo.data import augmentation, streams
from jax_apt.zoo.data.cifar10 import Cifar10
from jax_apt.zoo.data.image_folder import ImageFolder
from jax_apt.zoo.data.parallel_text import ParallelText, build_vocabulary
from jax_apt.zoo.data.pascal_voc import VocDetection, VocSegmentation
from jax_apt.zoo.data.recipes import RECIPES
from jax_apt.zoo.data.training import Options, _Run, train
from jax_apt.zoo.networks import NETWORKS, Network
from jax_apt.zoo.networks.resnet import ResNet

pytestmark = pytest.mark.usefixtures("promotion_as_users_have_it", "quick_compilation")

PER_BATCH = 8  # images in each CIFAR file here; 10,000 in the real ones


# CIFAR-10


def cifar_batch(k):
    rng = np.random.default_rng(k)
    return rng.integers(0, 256, (PER_BATCH, 3072), np.uint8), rng.integers(0, 10, PER_BATCH).tolist()


def write_cifar(folder, is_binary):
    for k in range(6):
        rows, labels = cifar_batch(k)
        name = f"data_batch_{k + 1}" if k < 5 else "test_batch"
        if is_binary:
            records = b"".join(
                struct.pack("B", n) + row.tobytes() for n, row in zip(labels, rows, strict=True)
            )
            (folder / f"{name}.bin").write_bytes(records)
        else:
            content = {b"data": rows, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a.png"]}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("is_binary", [True, False])
def test_cifar_is_read_from_both_formats(tmp_path, is_binary):
    write_cifar(tmp_path, is_binary)
    train, test = Cifar10(tmp_path, True), Cifar10(tmp_path, False)
    assert len(train) == 5 * PER_BATCH and len(test) == PER_BATCH
    rows, labels = cifar_batch(2)
    example = train[2 * PER_BATCH + 3]
    assert example["label"] == labels[3]
    assert example["image"].shape == (32, 32, 3) and example["image"].dtype == np.uint8
    assert example["image"][4, 7].tolist() == [rows[3][plane * 1024 + 4 * 32 + 7] for plane in range(3)]


def test_damaged_cifar_is_refused(tmp_path):
    write_cifar(tmp_path, True)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 24583 bytes.*3073"):
        Cifar10(tmp_path, True)
    (tmp_path / "test_batch.bin").write_bytes(bytes([11]) + bytes(3072))
    with pytest.raises(ValueError, match=r"labels outside 0..9"):
        Cifar10(tmp_path, False)
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        Cifar10(tmp_path / "empty", True)


def test_a_cifar_pickle_cannot_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Attack(), b"labels": [1]}))
    with pytest.raises(ValueError, match="asks for"):
        Cifar10(tmp_path, False)
    assert not (tmp_path / "made").exists()


# Folders of images


def save_image(path, color, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


def test_folders_are_classes_in_order(tmp_path):
    save_image(tmp_path / "n02" / "b.JPEG", (250, 0, 0))
    save_image(tmp_path / "n01" / "a.png", (0, 250, 0))
    save_image(tmp_path / "n01" / "gray.jpg", (9, 9, 9), mode="L")
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    source = ImageFolder(tmp_path)
    assert source.classes == ["n01", "n02"] and [int(source[i]["label"]) for i in range(3)] == [0, 0, 1]
    assert source[0]["image"].shape == (30, 40, 3) and source[1]["image"].shape == (30, 40, 3)
    assert source[2]["image"][15, 20, 0] > 200
    (tmp_path / "none" / "x").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no folders with images"):
        ImageFolder(tmp_path / "none")


# Pascal VOC

ANNOTATION = """<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>
<size><width>50</width><height>40</height><depth>3</depth></size><segmented>1</segmented>
<object><name>dog</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
<bndbox><xmin>11</xmin><ymin>5</ymin><xmax>30</xmax><ymax>24</ymax></bndbox>
<part><name>head</name><bndbox><xmin>12</xmin><ymin>6</ymin><xmax>15</xmax><ymax>9</ymax></bndbox></part></object>
<object><name>{other}</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object></annotation>"""


def write_voc(folder, names, sets, other="person"):
    palette = [0] * 768
    palette[3:6] = [128, 0, 0]
    for name in names:
        save_image(folder / "JPEGImages" / f"{name}.jpg", (90, 120, 30), size=(50, 40))
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(ANNOTATION.format(name=name, other=other))
        mask = np.zeros((40, 50), np.uint8)
        mask[4:24, 10:30], mask[0] = 12, 255
        image = Image.fromarray(mask, mode=None)
        image.putpalette(palette)
        (folder / "SegmentationClass").mkdir(exist_ok=True)
        image.save(folder / "SegmentationClass" / f"{name}.png")
    for kind, name in sets:
        (folder / "ImageSets" / kind).mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / kind / f"{name}.txt").write_text("\n".join(names) + "\n")


def test_voc_boxes(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / year, ["000001", "000002"], [("Main", "trainval")])
    source = VocDetection([tmp_path / "VOC2007", tmp_path / "VOC2012"], "trainval")
    assert len(source) == 4
    example = source[3]
    assert example["image"].shape == (40, 50, 3)
    assert example["classes"].tolist() == [12, 15] and example["is_difficult"].tolist() == [False, True]
    # Pixels 11..30 and 5..24, counted from 1: 10 to 30 of 50 and 4 to 24 of 40.
    np.testing.assert_allclose(example["boxes"], [[0.1, 0.2, 0.6, 0.6], [0, 0, 1, 1]], rtol=1e-6)


def test_voc_masks(tmp_path):
    write_voc(tmp_path, ["a"], [("Segmentation", "train")])
    mask = VocSegmentation(tmp_path, "train")[0]["mask"]
    assert mask[10, 15] == 12 and mask[0, 0] == 255 and mask[30, 5] == 0 and mask.dtype == np.int32
    Image.new("RGB", (50, 40)).save(tmp_path / "SegmentationClass" / "a.png")
    with pytest.raises(ValueError, match="mode RGB"):
        VocSegmentation(tmp_path, "train")[0]


def test_bad_annotations_name_the_file_and_the_class(tmp_path):
    write_voc(tmp_path, ["a"], [("Main", "test")], other="unicorn")
    with pytest.raises(ValueError, match=r"a.xml: class 'unicorn' is none of aeroplane"):
        VocDetection(tmp_path, "test")[0]
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation></annotation>")
    with pytest.raises(ValueError, match=r"a.xml: <annotation> has no size/height"):
        VocDetection(tmp_path, "test")[0]


# Text


def write_text(folder):
    lines = [f"the number {i} is small" for i in range(20)]
    for part in ("train", "test"):
        (folder / f"{part}.src").write_text("\n".join([*lines, "", "x " * 99]))
        (folder / f"{part}.tgt").write_text("\n".join([line[::-1] for line in lines] + ["y", "z"]))


def test_parallel_text(tmp_path):
    write_text(tmp_path)
    source = ParallelText(tmp_path / "train.src", tmp_path / "train.tgt", length=8)
    assert len(source) == 20  # the empty and the overlong pair are left out
    example = source[3]
    assert source.decode(example["target"]) == "llams si 3 rebmun eht"
    assert source.decode(example["source"]) == "the number 3 is small"
    assert example["begun"][0] == 1 and example["begun"][1:6].tolist() == example["target"][:5].tolist()
    assert example["target"][5:].tolist() == [2, 0, 0]
    (tmp_path / "train.tgt").write_text("one line")
    with pytest.raises(ValueError, match=r"train.src has 22 lines, .*train.tgt has 1"):
        ParallelText(tmp_path / "train.src", tmp_path / "train.tgt")


def test_vocabulary_holds_the_most_frequent_tokens():
    words = build_vocabulary([["b", "a", "c"], ["b", "a"], ["b"]], 6)
    assert words == ("<pad>", "<start>", "<end>", "<unk>", "b", "a")


# Augmentation


def test_boxes_move_with_what_they_surround():
    image = np.full((60, 80, 3), 120, np.uint8)
    image[20:40, 30:60] = (255, 0, 0)
    example = {"image": image, "boxes": np.float32([[1 / 3, 3 / 8, 2 / 3, 3 / 4]]), "classes": np.int32([5])}
    for seed in range(30):
        sample, labels = augmentation.ssd_sample(example, np.random.default_rng(seed), 120)
        assert sample.shape == (120, 120, 3) and labels["classes"].tolist() == [5] + [0] * 63
        red = sample[..., 0] - sample[..., 1] > 2
        rows, columns = np.nonzero(red)
        found = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / 120
        np.testing.assert_allclose(labels["boxes"][0], found, atol=0.04)


def test_windows_keep_image_and_mask_together():
    mask = np.random.default_rng(0).integers(0, 21, (30, 50)).astype(np.int32)
    image = np.repeat(mask[..., None], 3, -1).astype(np.uint8)
    for seed in range(10):
        window, labels = augmentation.random_window(
            {"image": image, "mask": mask}, np.random.default_rng(seed), 40
        )
        assert window.shape == (40, 40, 3) and labels.shape == (40, 40)
        values = np.round((window * augmentation.DEVIATION + augmentation.MEAN) * 255)
        counts = labels != 255
        assert counts.sum() == 30 * 40
        np.testing.assert_array_equal(values[counts][:, 0], labels[counts])


def test_crops_have_the_size_that_is_asked_for():
    example = {"image": np.zeros((31, 70, 3), np.uint8), "label": np.int32(4)}
    for crop in (
        augmentation.center_crop(example, 28),
        augmentation.random_resized_crop(example, np.random.default_rng(0), 28),
    ):
        assert crop[0].shape == (28, 28, 3) and crop[0].dtype == np.float32 and crop[1] == 4


# Streams


class Numbers:
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"value": np.int32(i)}


def noisy(example, rng):
    return example["value"], rng.random(dtype=np.float32)


def test_a_stream_shows_everything_in_each_epoch_in_another_order():
    stream = streams.training_stream(Numbers(), noisy, 5, seed=1)
    epochs = [np.concatenate([next(stream)[0], next(stream)[0]]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_stream_resumes_at_the_very_batch():
    stream = streams.training_stream(Numbers(), noisy, 3, seed=2)
    next(stream)
    place = stream.get_state()
    expected = [next(stream) for _ in range(4)]
    other = streams.training_stream(Numbers(), noisy, 3, seed=2)
    other.set_state(place)
    jax.tree.map(np.testing.assert_array_equal, [next(other) for _ in range(4)], expected)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="at most the 10 examples, got 11"):
        streams.training_stream(Numbers(), noisy, 11, seed=0)


def test_evaluation_sees_each_example_once():
    batches = list(streams.evaluation_batches(Numbers(), lambda e: e["value"], 4))
    assert [count for _, count in batches] == [4, 4, 2]
    assert np.concatenate([batch[:count] for batch, count in batches]).tolist() == list(range(10))
    assert len({batch.shape for batch, _ in batches}) == 1


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_networks_and_train_their_parameters(name):
    recipe = RECIPES[name]
    assert NETWORKS[recipe.network].published is not None
    optimizer = recipe.optimizer(steps_per_epoch=100)
    params = {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}
    gradients = jax.tree.map(np.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert all((np.asarray(moved[k]) < params[k]).all() for k in params)
    schedule, last = recipe.schedule(5600), 5600 * recipe.epochs - 1
    rates = [float(schedule(part * last // 20)) for part in range(21)]
    assert max(rates) > 2 * rates[-1] > 0


def test_rates_fall_when_published():
    """Over the first rate, by epoch: Luong's halving after the eighth, MobileNet's 0.98, SSD's drops."""

    def rates(name, epochs):
        recipe = RECIPES[name]
        schedule = recipe.schedule(100)
        return [float(schedule(100 * epoch + 50)) / recipe.learning_rate for epoch in epochs]

    assert rates("seq2seq-lstm-text", (0, 7, 8, 9, 11)) == pytest.approx([1, 1, 1, 0.5, 0.125])
    assert rates("mobilenet-v2-imagenet", (0, 1, 10)) == pytest.approx([1, 0.98, 0.98**10])
    assert rates("ssd300-voc", (153, 156, 190, 196)) == pytest.approx([1, 0.1, 0.1, 0.01])


def test_warmup_is_that_of_its_formula():
    rate = RECIPES["transformer-text"].schedule(100)
    for step in (1, 1000, 4000, 50_000):
        assert float(rate(step - 1)) == pytest.approx(
            512**-0.5 * min(step**-0.5, step * 4000**-1.5), rel=1e-5
        )


# Training


def tiny(outputs):
    return ResNet((1,), False, outputs, channels=8, is_stem_strided=False)


def options(data, out, **others):
    common = {"recipe": "resnet18-cifar10", "size": "small", "batch_size": 8, "backend": "xla"}
    return Options(data=data, out=out, **(common | others))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with small CIFAR files, to be learnt by a tiny network."""
    write_cifar(tmp_path, True)
    monkeypatch.setitem(NETWORKS, "resnet18", Network(tiny))
    return tmp_path


def test_a_training_goes_on_where_it_stopped(cifar):
    whole = train(options(cifar, cifar / "whole", epochs=2), print)

    def interrupt(_):
        raise RuntimeError("interrupted")  # after the first epoch, step 5; the checkpoint is of step 3

    with pytest.raises(RuntimeError, match="interrupted"):
        train(options(cifar, cifar / "parts", epochs=2, save_every=3), interrupt)
    again = train(options(cifar, cifar / "parts", epochs=2, save_every=3), print)
    assert whole["steps"] == again["steps"] == 10
    assert again["losses"][-1] == pytest.approx(whole["losses"][-1], rel=1e-6)
    assert again["report"] == whole["report"]
    assert whole["report"]["layers"] and 0 <= again["score"] <= 100


def test_checkpoints_hold_layers_by_name_and_others_are_refused(cifar):
    """A state of other layers, of another precision, and files of before layers were saved by name."""
    started = options(cifar, cifar / "out", epochs=1)
    run = _Run(started)
    run.step = 1  # one that was trained need not be
    run.save()
    run.close()
    folder = cifar / "out" / "checkpoints" / "1"
    saved = ocp.StandardCheckpointer().restore(folder / "precision")
    names = [layer["name"] for layer in json.loads(np.asarray(saved["layers"]).tobytes())]
    assert saved["format_version"] == 1 and names == list(run.state.layout.names())
    with pytest.raises(
        ValueError, match=rf"{names[0]}: widths is .*\[16\]\] in the function and .*\[8, 16, 24"
    ):
        _Run(replace(started, precision="int16"))
    with pytest.raises(ValueError, match="trained in fixed point, not in float32: give another"):
        _Run(replace(started, precision="float32"))
    (folder / "precision").rename(folder.parent / "kept")
    with pytest.raises(ValueError, match="trained in float32, not in fixed point"):
        _Run(started)
    (folder / "trained").rename(folder / "arrays")
    with pytest.raises(ValueError, match=r"checkpoints/1 was written by an earlier jax_apt, .* by position"):
        _Run(started)


TWO_DEVICES = """
import json, pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
sys.path.insert(0, sys.argv[1])
import test_zoo_data as own
own.NETWORKS["resnet18"] = own.Network(own.tiny)
assert jax.device_count() == 2
folder = pathlib.Path(sys.argv[2])
result = own.train(own.options(folder, folder / "two", epochs=1), lambda line: None)
print(json.dumps({"losses": result["losses"], "report": result["report"]}))
"""


def test_two_devices_train_as_one(cifar):
    one = train(options(cifar, cifar / "one", epochs=1), print)
    command = [sys.executable, "-c", TWO_DEVICES, str(pathlib.Path(__file__).parent), str(cifar)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    two = json.loads(process.stdout)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    bits = [
        [[t["bits"] for t in layer["tensors"].values()] for layer in run["report"]["layers"]]
        for run in (one, two)
    ]
    assert bits[0] == bits[1]
