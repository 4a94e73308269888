"""Tasks: what is drawn is what the labels say, tests see held-out data, losses and predictions agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_apt.zoo.metrics import iou
from jax_apt.zoo.tasks import (
    TASKS,
    classification,
    default_boxes,
    detection,
    scenes,
    segmentation,
    translation,
)
from jax_apt.zoo.tasks.digits import split

pytestmark = pytest.mark.usefixtures("promotion_as_users_have_it", "quick_compilation")
STYLE = scenes.Style(size=48, digits=3, fragments=1, scale=(1.6, 3.0))


@pytest.fixture(scope="module")
def drawn():
    strokes, labels, *_ = split(0)
    return labels[:64], scenes.draw(strokes[:64], labels[:64], STYLE, np.random.default_rng(0))


# Scenes


def test_scenes_are_what_their_labels_say(drawn):
    labels, found = drawn
    assert found.images.shape == (64, 48, 48, 3) and found.images.dtype == np.float32
    np.testing.assert_array_equal(found.classes[:, 0], labels + 1)
    assert 0.4 < (found.classes[:, 1:] > 0).mean() < 0.8
    is_there = found.classes > 0
    assert (found.boxes[~is_there] == 0).all()
    sides = found.boxes[is_there][:, 2:] - found.boxes[is_there][:, :2]
    assert (sides > 0).all() and (sides <= 1).all()


def test_masks_lie_in_the_boxes_of_their_digits(drawn):
    _, found = drawn
    for mask, classes, boxes in zip(found.masks, found.classes, found.boxes, strict=True):
        assert set(np.unique(mask)) <= {0, *classes}
        inside = np.zeros_like(mask, bool)
        for box in boxes[classes > 0]:
            top, left, bottom, right = np.round(48 * box).astype(int)
            inside[top:bottom, left:right] = True
        assert not mask[~inside].any()
    # The digit painted last is not hidden: its box is as tight as its mask.
    for i in np.flatnonzero(found.classes[:, 2]):
        rows, columns = np.nonzero(found.masks[i] == found.classes[i, 2])
        top, left, bottom, right = np.round(48 * found.boxes[i, 2]).astype(int)
        assert rows.max() + 1 >= bottom and columns.max() + 1 >= right
        assert rows.min() <= top and columns.min() <= left


def test_digits_stand_out_from_the_background():
    strokes, labels, *_ = split(0)
    style = scenes.Style(size=32, digits=1, fragments=0, scale=(2.0, 2.0), noise=0.0)
    found = scenes.draw(strokes[:50], labels[:50], style, np.random.default_rng(1))
    for image, mask in zip(found.images, found.masks, strict=True):
        difference = image[mask > 0].mean(0) - image[mask == 0].mean(0)
        assert np.abs(difference).max() > 0.5  # of images whose colours have variance 1


def test_an_upright_stroke_is_sampled_bilinearly():
    ink = np.random.default_rng(0).random((1, 8, 8))
    points = np.array([[[2.0, 3.0], [2.5, 3.0], [2.25, 3.5], [-5.0, 0.0], [20.0, 3.0]]])
    a = ink[0]
    expected = [
        a[2, 3],
        (a[2, 3] + a[3, 3]) / 2,
        0.75 * (a[2, 3] + a[2, 4]) / 2 + 0.25 * (a[3, 3] + a[3, 4]) / 2,
        0,
        0,
    ]
    np.testing.assert_allclose(scenes._sample(ink, points)[0], expected)


@pytest.mark.parametrize("name", ["clutter", "detection", "segmentation"])
def test_scene_tasks_draw_anew_in_each_epoch_and_repeat_by_seed(name):
    data = TASKS[name].load(0)
    first, again, later = (next(data.batches(4, 0, epoch)) for epoch in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first[0], later[0])
    assert len(data) == 1611


def test_test_scenes_show_held_out_digits(monkeypatch):
    seen = []
    real = scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda s, *a: seen.append(s) or real(s, *a))
    data = classification.load(3)
    next(data.batches(4, 0, 0))
    test, train = ({stroke.tobytes() for stroke in strokes} for strokes in seen)
    assert test and train and not test & train


# Detection


def test_offsets_are_inverted():
    defaults = jnp.asarray(default_boxes.SMALL.centered())
    corners = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.4, (len(defaults), 4)), jnp.float32)
    corners = corners.at[:, 2:].add(corners[:, :2])
    decoded = default_boxes.decode(default_boxes.encode(corners, defaults), defaults)
    np.testing.assert_allclose(decoded, corners, atol=1e-5)


def test_default_boxes_are_as_many_as_published_and_as_the_network_gives():
    assert default_boxes.VOC300.centered().shape == (8732, 4)
    from jax_apt.zoo.networks import NETWORKS

    for geometry, model, size, outputs in (
        (default_boxes.VOC300, NETWORKS["ssd300"].published(21), 300, 21),
        (default_boxes.SMALL, NETWORKS["ssd300"].small(11), 48, 11),
    ):
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        (offsets, scores), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
        boxes = len(geometry.centered())
        assert offsets.shape == (1, boxes, 4) and scores.shape == (1, boxes, outputs)


def test_default_boxes_run_by_map_row_column_and_shape():
    boxes = default_boxes.SMALL.centered()
    np.testing.assert_allclose(boxes[0], [1 / 24, 1 / 24, 0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(boxes[4][:2], [1 / 24, 3 / 24], rtol=1e-6)  # the next column
    np.testing.assert_allclose(boxes[2][3] / boxes[2][2], 2, rtol=1e-5)


def test_every_true_box_has_a_default_box_and_good_overlaps_match():
    defaults = default_boxes.SMALL.centered()
    truth = np.float32([[0.1, 0.1, 0.4, 0.35], [0.5, 0.5, 0.53, 0.52], [0, 0, 0, 0]])
    classes = np.int32([3, 7, 0])
    corners, found = default_boxes.match(jnp.asarray(truth), jnp.asarray(classes), jnp.asarray(defaults))
    assert set(np.unique(found)) == {0, 3, 7}  # the tiny one overlaps none by half, yet has its best
    overlaps = iou(truth, np.asarray(default_boxes.to_corners(defaults)))
    np.testing.assert_array_equal(np.asarray(found) == 3, overlaps[0] >= 0.5)
    assert (np.asarray(corners)[np.asarray(found) == 7] == truth[1]).all()


@pytest.fixture(scope="module")
def detection_labels():
    strokes, labels, *_ = split(0)
    found = scenes.draw(strokes[:40], labels[:40], detection.STYLE, np.random.default_rng(3))
    return detection._example(found, None)[1]


def outputs_for(labels):
    """What a perfect network would answer."""
    defaults = jnp.asarray(default_boxes.SMALL.centered())
    match = jax.vmap(lambda c, k: default_boxes.match(c, k, defaults))
    corners, classes = match(jnp.asarray(labels["boxes"]), jnp.asarray(labels["classes"]))
    offsets = jnp.where((classes > 0)[..., None], default_boxes.encode(corners, defaults), 0.0)
    return offsets, 20.0 * jax.nn.one_hot(classes, detection.CLASSES)


def test_a_perfect_detector_has_no_loss_and_full_score(detection_labels):
    labels = detection_labels
    outputs, task = outputs_for(labels), TASKS["detection"]
    assert float(task.loss(outputs, labels)) < 1e-3
    predicted = jax.device_get(task.predict(lambda _: outputs, None))
    assert task.score(predicted, labels) > 99
    wrong = outputs[0], jnp.roll(outputs[1], 1, axis=-1)
    assert float(task.loss(wrong, labels)) > 5
    assert task.score(jax.device_get(task.predict(lambda _: wrong, None)), labels) < 5


def test_outputs_that_are_not_finite_detect_nothing(detection_labels):
    labels, task = detection_labels, TASKS["detection"]
    offsets, logits = outputs_for(labels)
    predicted = task.predict(lambda _: (offsets * np.nan, logits), None)
    assert task.score(jax.device_get(predicted), labels) == 0


def test_hard_negatives_are_three_per_match():
    losses = jnp.asarray(np.random.default_rng(0).random((2, 50)), jnp.float32)
    is_matched = jnp.zeros((2, 50), bool).at[0, :4].set(True)
    hard = np.asarray(detection._hardest(losses, is_matched))
    assert hard.sum(1).tolist() == [12, 0] and not hard[0, :4].any()
    others = np.asarray(losses[0, 4:])
    assert set(np.flatnonzero(hard[0]) - 4) == set(np.argsort(-others)[:12])


# Segmentation


def test_pixel_loss_ignores_what_does_not_count():
    logits = jnp.zeros((1, 2, 2, 11)).at[..., 3].set(30.0)
    masks = np.full((1, 4, 4), 3)
    masks[0, 0] = segmentation.IGNORED
    assert float(segmentation.pixel_cross_entropy(logits, jnp.asarray(masks))) < 1e-3
    masks[0, 1] = 5
    assert float(segmentation.pixel_cross_entropy(logits, jnp.asarray(masks))) == pytest.approx(
        30 / 3, rel=1e-3
    )


def test_predicted_pixels_are_enlarged_and_not_finite_ones_are_no_class():
    logits = jnp.zeros((1, 2, 2, 11)).at[0, 0, 0, 4].set(9.0).at[0, 1, 1, 0].set(9.0)
    predicted = np.asarray(segmentation.predict_pixels(lambda _: logits, jnp.zeros((1, 8, 8, 3))))
    assert predicted.shape == (1, 8, 8) and predicted[0, 0, 0] == 4 and predicted[0, 7, 7] == 0
    unknown = segmentation.predict_pixels(lambda _: logits * jnp.nan, jnp.zeros((1, 8, 8, 3)))
    assert (np.asarray(unknown) == -1).all()


# Translation


def test_words_of_both_languages():
    assert translation.english(342_017) == [
        "three",
        "hundred",
        "and",
        "forty",
        "two",
        "thousand",
        "and",
        "seventeen",
    ]
    assert translation.german(342_017) == ["drei", "hundert", "zwei", "und", "vierzig", "tausend", "siebzehn"]
    assert translation.german(1_000_021) == ["eine", "Million", "ein", "und", "zwanzig"]


def test_every_number_can_be_written():
    rng = np.random.default_rng(0)
    numbers = [*range(1, 121), *translation._draw(300, rng), 999_999_999, 777_777_777]
    known = set(translation.vocabulary())
    for number in numbers:
        for words in (translation.english(number), translation.german(number)):
            assert set(words) <= known and len(words) < translation.LENGTH - 1
    assert len(known) == TASKS["translation"].outputs


def test_numbers_are_held_out_and_inputs_are_targets_moved_by_one():
    data = translation.load(1)
    train, test = ({row.tobytes() for row in rows} for rows in (data.train_labels, data.test_labels))
    assert len(train) == translation.TRAIN and len(test) == translation.TEST and not train & test
    begun, ended = data.train_inputs[1], data.train_labels
    assert (begun[:, 0] == translation.START).all()
    is_word = ended > translation.END
    np.testing.assert_array_equal(
        (begun[:, 1:] * is_word[:, :-1])[is_word[:, :-1]], ended[:, :-1][is_word[:, :-1]]
    )


def test_some_words_of_the_source_are_lost_and_other_ones_in_each_epoch():
    data = translation.load(1)
    for source in (data.test_inputs[0], *(next(data.batches(1024, 1, epoch))[0][0] for epoch in (0, 1))):
        share = (source == translation.UNKNOWN).sum() / (source > translation.END).sum()
        assert 0.8 * translation.LOST_SHARE < share < 1.2 * translation.LOST_SHARE
    assert not (data.train_inputs[0] == translation.UNKNOWN).any()
    epochs = [next(data.batches(len(data), 1, epoch)) for epoch in (0, 1)]
    first, second = ({row.tobytes() for row in inputs[0]} for inputs, _ in epochs)
    assert len(first & second) < len(first) / 2
    for (_, begun), ended in epochs:
        assert not (begun == translation.UNKNOWN).any() and not (ended == translation.UNKNOWN).any()


def test_greedy_translation_follows_its_own_words():
    """An oracle that names the successor of the last token counts upwards until the end."""

    def count_up(inputs):
        _, begun = inputs
        following = jnp.where(begun == translation.START, 10, begun + 1)
        return jax.nn.one_hot(jnp.where(following > 14, translation.END, following), 70)

    inputs = (jnp.zeros((2, 18), jnp.int32), jnp.zeros((2, 18), jnp.int32))
    tokens = np.asarray(translation.translate(count_up, inputs))
    assert tokens[:, :6].tolist() == [[10, 11, 12, 13, 14, translation.END]] * 2
    expected = " ".join(translation.vocabulary()[10:15])
    assert translation.decode(tokens) == [expected] * 2


def test_token_loss_ignores_padding():
    target = jnp.array([[5, 2, 0, 0]])
    logits = 30.0 * jax.nn.one_hot(jnp.array([[5, 2, 9, 9]]), 70)
    assert float(translation.token_cross_entropy(logits, target)) < 1e-3
