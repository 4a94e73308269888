"""Metrics against their definitions, computed by hand or by another algorithm."""

import numpy as np
import pytest

from jax_apt.zoo.metrics import Boxes, bleu, iou, mean_iou, suppress, voc_map


def boxes(*corners, classes=None, scores=None, difficult=None):
    corners = np.array(corners, float).reshape(-1, 4)
    classes = np.ones(len(corners), int) if classes is None else np.array(classes)
    return Boxes(
        corners,
        classes,
        None if scores is None else np.array(scores, float),
        None if difficult is None else np.array(difficult, bool),
    )


A, B, FAR = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)


def test_overlap_by_hand():
    # 10 x 10 boxes that share 5 x 5: 25 of 175.
    pair = iou(np.array([A], float), np.array([[5, 5, 15, 15], A, FAR], float))
    np.testing.assert_allclose(pair, [[25 / 175, 1, 0]])


def test_perfect_detections_have_full_precision():
    truth = [boxes(A, B, classes=[1, 2]), boxes(FAR, classes=[1])]
    predicted = [boxes(A, B, classes=[1, 2], scores=[0.9, 0.8]), boxes(FAR, classes=[1], scores=[0.7])]
    assert voc_map(predicted, truth) == pytest.approx(100)
    assert voc_map(predicted, truth, use_eleven_points=True) == pytest.approx(100)


def test_average_precision_by_hand():
    # By falling score: right, wrong, right; two true boxes. Precision 1 up to recall 1/2, then 2/3.
    truth = [boxes(A, B)]
    predicted = [boxes(A, FAR, B, scores=[0.9, 0.8, 0.7])]
    assert voc_map(predicted, truth) == pytest.approx(100 * (0.5 * 1 + 0.5 * 2 / 3))
    # Recalls 0 to 0.5 (six of eleven points) at precision 1, the other five at 2/3.
    assert voc_map(predicted, truth, use_eleven_points=True) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


def test_scores_order_detections_across_images():
    truth = [boxes(A), boxes(A)]
    good_first = [boxes(A, scores=[0.9]), boxes(FAR, scores=[0.1])]
    bad_first = [boxes(A, scores=[0.1]), boxes(FAR, scores=[0.9])]
    assert voc_map(good_first, truth) == pytest.approx(50)
    assert voc_map(bad_first, truth) == pytest.approx(25)


def test_a_box_is_found_once_and_repetitions_are_wrong():
    predicted = [boxes(A, A, B, scores=[0.9, 0.8, 0.7])]
    assert voc_map(predicted, [boxes(A, B)]) == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))


def test_difficult_boxes_neither_help_nor_hurt():
    truth = [boxes(A, B, difficult=[False, True])]
    with_it = [boxes(B, A, scores=[0.9, 0.8])]
    without = [boxes(A, scores=[0.8])]
    assert voc_map(with_it, truth) == voc_map(without, truth) == pytest.approx(100)
    assert voc_map([boxes(B, scores=[0.5])], [boxes(B, difficult=[True])]) == 0


def test_threshold_and_classes_count():
    half = [boxes((0, 0, 10, 5), scores=[0.9])]  # overlap exactly 0.5
    assert voc_map(half, [boxes(A)]) == pytest.approx(100)
    assert voc_map(half, [boxes(A)], threshold=0.51) == 0
    assert voc_map([boxes(A, classes=[2], scores=[1.0])], [boxes(A, classes=[1])]) == 0
    assert voc_map([boxes()], [boxes()]) == 0
    with pytest.raises(ValueError, match="2 images with predictions, 1 with true boxes"):
        voc_map([boxes(), boxes()], [boxes()])


def naive_average_precision(scores, hits, total):
    """Area under the interpolated curve by summing over every true box's recall."""
    order = np.argsort(-np.asarray(scores))
    hits = np.asarray(hits)[order]
    points = [(hits[: i + 1].sum(), hits[: i + 1].mean()) for i in range(len(hits))]
    best = [max((p for found, p in points if found >= k), default=0.0) for k in range(1, total + 1)]
    return 100 * sum(best) / total


def test_average_precision_of_random_detections_is_that_of_another_algorithm():
    rng = np.random.default_rng(0)
    for _ in range(20):
        grid = [(20 * i, 0, 20 * i + 10, 10) for i in range(8)]
        is_true = rng.random(8) < 0.6
        is_true[0] = True
        scores, guessed = rng.random(8), rng.random(8) < 0.7
        truth = [boxes(*[g for g, t in zip(grid, is_true, strict=True) if t])]
        chosen = [g for g, t in zip(grid, guessed, strict=True) if t]
        predicted = [boxes(*chosen, scores=scores[guessed])]
        expected = naive_average_precision(scores[guessed], is_true[guessed], is_true.sum())
        assert voc_map(predicted, truth) == pytest.approx(expected)


def test_suppression_keeps_the_best_of_overlapping_boxes():
    corners = np.array([(0, 0, 10, 10), (0, 1, 10, 11), (30, 30, 40, 40), (0, 4, 10, 14)], float)
    kept = suppress(corners, np.array([0.8, 0.9, 0.1, 0.7]), 0.45)
    # The first and the last share more than 0.45 with the second (9/11 and 7/13).
    assert kept.tolist() == [1, 2]
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


def test_mean_iou_by_hand():
    truth = np.array([[0, 0, 1, 1], [0, 255, 1, 2]])
    predicted = np.array([[0, 1, 1, 1], [0, 2, 0, 2]])
    # class 0: 2 of 4 (one missed, one wrong); class 1: 2 of 4; class 2: 1 of 1; the pixel 255 is not seen.
    assert mean_iou(predicted, truth, 4) == pytest.approx(100 * (2 / 4 + 2 / 4 + 1) / 3)


def test_mean_iou_of_values_that_are_no_class_is_zero():
    truth = np.array([0, 1, 1])
    assert mean_iou(np.full(3, -1), truth, 2) == 0
    assert mean_iou(truth, truth, 2) == 100
    assert mean_iou(truth, np.full(3, 255), 2) == 0


def test_bleu_by_hand():
    # One wrong word of six: precisions 5/6, 3/5, 1/4, 1/6 smoothed by nothing; no brevity penalty.
    truth, predicted = "a b c d e f", "a b c d x f"
    expected = 100 * np.exp(np.mean(np.log([5 / 6, 3 / 5, 2 / 4, 1 / 3])))
    assert bleu([predicted], [truth]) == pytest.approx(expected, abs=1e-6)
    assert bleu([truth], [truth]) == pytest.approx(100)
