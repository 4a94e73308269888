"""A few steps of one network of each kind: state and dropout go through, gradients are close to float32's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_apt as apt
from jax_apt.zoo.networks import NETWORKS, resnet, ssd, transformer, vgg
from jax_apt.zoo.networks.deeplab import DeepLab
from jax_apt.zoo.networks.seq2seq import Seq2Seq
from jax_apt.zoo.networks.ssd import Ssd
from jax_apt.zoo.precisions import ALL_PRECISIONS, Settings, Variant, adaptive, make_precision
from jax_apt.zoo.steps import make_forward, make_predictor, make_step, start
from jax_apt.zoo.tasks import TASKS, default_boxes, detection, segmentation, translation
from jax_apt.zoo.trainer import schedule, settings_for

pytestmark = pytest.mark.usefixtures("promotion_as_users_have_it", "quick_compilation")

BATCH = 8
TOKENS = np.random.default_rng(0).integers(3, 70, (BATCH, 6)).astype(np.int32)
GEOMETRY = default_boxes.Geometry((8, 4), (0.3, 0.5, 0.8), ((2,), (2,)))


def images(size):
    return np.random.default_rng(1).standard_normal((BATCH, size, size, 3), np.float32)


def box_labels():
    boxes = np.tile(np.float32([[[0.1, 0.1, 0.5, 0.5], [0.4, 0.5, 0.9, 0.9]]]), (BATCH, 1, 1))
    return {"boxes": boxes, "classes": np.tile(np.int32([[3, 7]]), (BATCH, 1))}


def tiny_ssd():
    return Ssd(11, ((8,), (8,), (8,)), 1, 16, 2, (), (4, 4), is_normalized=True)


def detect(outputs, labels):
    return detection.multibox_loss(GEOMETRY, outputs, labels)


# One network of each kind: (network, inputs, labels, loss, predictions)
KINDS = {
    "classification": (
        lambda: resnet.ResNet((1, 1), False, 10, 8, False),
        images(16),
        np.arange(BATCH, dtype=np.int32) % 10,
        TASKS["clutter"].loss,
        TASKS["clutter"].predict,
    ),
    "detection": (
        tiny_ssd,
        images(16),
        box_labels(),
        detect,
        lambda apply, x: detection.predict_boxes(GEOMETRY, apply, x),
    ),
    "segmentation": (
        lambda: DeepLab(11, ((8,), (8,)), (2, 1), 16, 2, 0.2, True),
        images(16),
        np.random.default_rng(2).integers(0, 11, (BATCH, 16, 16)).astype(np.int32),
        segmentation.pixel_cross_entropy,
        segmentation.predict_pixels,
    ),
    "recurrent": (
        lambda: Seq2Seq(70, layers=1, hidden=16),
        (TOKENS, TOKENS),
        TOKENS,
        translation.token_cross_entropy,
        translation.translate,
    ),
    "attention": (
        lambda: transformer.Transformer(70, 1, 16, 32, 2),
        (TOKENS, TOKENS),
        TOKENS,
        translation.token_cross_entropy,
        translation.translate,
    ),
}


def relative_distance(a, b):
    a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_close_to_those_of_float32(kind):
    make, inputs, labels, loss, _ = KINDS[kind]
    model = make()
    forward, key = make_forward(model), jax.random.key(0)
    variables = dict(jax.jit(model.init)(key, inputs))
    params = variables.pop("params")

    def gradients(apply):
        def loss_fn(params):
            return loss(apply(params)[0], labels)

        return jax.jit(jax.grad(loss_fn))(params)

    exact = gradients(lambda p: forward(p, variables, key, inputs, True))

    def distance(bits):
        rule = apt.Rule("", acts=bits, weights=bits, grads=bits)
        q = apt.apt_quantize(forward, [rule])
        state = q.init(params, variables, key, inputs, True)
        assert state.layout.left_in_float == () and state.layout.layers
        return relative_distance(
            gradients(lambda p: q.apply(p, q.with_taps(state), variables, key, inputs, True)), exact
        )

    # A rounding step is 2^-(n - 1) of the largest value, which is up to some tens of the typical one, and
    # passes through a few layers; a relu that flips at a value near 0 weighs more than its rounding.
    fine = distance(16)
    assert 0 < fine < 0.02
    if kind == "attention":
        assert 10 * fine < distance(8) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_loss_and_predictions_use_what_was_learnt(kind):
    make, inputs, labels, loss, predict = KINDS[kind]
    model = make()
    optimizer = optax.adam(1e-2)
    config = apt.Config(steps_per_epoch=10, initial_fraction=1.0)
    precision = adaptive(make_forward(model), Variant(), config, "auto")
    key = jax.random.key(1)
    trained, state = start(model, precision, optimizer, key, inputs)
    step = jax.jit(make_step(precision, loss, optimizer))
    losses, before = [], trained
    for number in range(6):
        trained, state, value = step(trained, state, key, jnp.int32(number), inputs, labels)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1
    for collection in before.model_state:
        old, new = before.model_state[collection], trained.model_state[collection]
        assert relative_distance(new, old) > 0.01, collection
    if kind not in ("detection", "attention"):  # those with the other ways to predict
        return
    predictor = jax.jit(make_predictor(precision, predict))
    first = predictor(trained.params, trained.model_state, state, inputs)
    again = predictor(trained.params, trained.model_state, state, inputs)
    jax.tree.map(np.testing.assert_array_equal, first, again)  # nothing is dropped, nothing updated


def test_dropout_is_that_of_the_step_and_equal_at_all_precisions():
    """In float, through the replay: the same key drops the same units, another step's others."""
    make, inputs, *_ = KINDS["attention"]
    model = make()
    forward, key = make_forward(model), jax.random.key(0)
    params = jax.jit(model.init)(key, inputs)["params"]
    q = apt.apt_quantize(forward, [apt.Rule("", quantize=False)])
    state = q.init(params, {}, key, inputs, True)

    def both(number):
        dropout = jax.random.fold_in(key, number)
        plain = jax.jit(lambda p: forward(p, {}, dropout, inputs, True)[0])(params)
        return plain, jax.jit(lambda p: q.apply(p, state, {}, dropout, inputs, True)[0])(params)

    plain, replayed = both(3)
    np.testing.assert_array_equal(plain, replayed)
    assert np.abs(np.asarray(both(4)[0] - plain)).max() > 1e-3


def test_precisions_differ_in_the_gradients():
    """In their widths and rounding."""
    settings, found = Settings(backend="xla"), {}
    for name in ALL_PRECISIONS:
        precision = make_precision(name, lambda params, x: x @ params["w"], settings, 10)
        state = precision.init({"w": jnp.ones((6, 1))}, jnp.eye(6))
        if state is not None:
            (layer,) = state.layout.layers
            assert layer.widths[:2] == ((8,), (8,))
            found[name] = layer.widths[2], layer.rounding
    assert found == {
        "apt": ((8, 16, 24), "stochastic"),
        "apt-nearest": ((8, 16, 24), "nearest"),
        "apt-14": ((8, 14, 16, 24), "stochastic"),
        "int8": ((8,), "stochastic"),
        "int8-nearest": ((8,), "nearest"),
        "int16": ((16,), "stochastic"),
    }


def test_the_learning_rate_rises_then_falls():
    rate = schedule(Settings(epochs=10, learning_rate=0.5, warmup=0.1), 10)
    assert float(rate(0)) == 0 and float(rate(10)) == pytest.approx(0.5) and float(rate(99)) < 1e-3
    assert float(schedule(Settings(learning_rate=0.5), 10)(0)) == pytest.approx(0.5)


def test_every_task_has_networks_and_its_own_recipe():
    covered = {name for task in TASKS.values() for name in task.networks}
    assert covered == set(NETWORKS)
    for name, task in TASKS.items():
        settings = settings_for(name, epochs=3, learning_rate=None)
        assert settings.epochs == 3 and settings.learning_rate == task.recipe.learning_rate
    assert vgg.small(10).is_normalized and ssd.small(11).is_normalized
