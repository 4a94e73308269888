"""The networks at their published sizes, and what the transform finds in the small ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_apt.zoo.networks import NETWORKS, layers, seq2seq, transformer

pytestmark = pytest.mark.usefixtures("promotion_as_users_have_it", "quick_compilation")


def count(model, inputs):
    """Parameters of a model, without computing anything."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def image(size):
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


TOKENS = (jax.ShapeDtypeStruct((1, 5), jnp.int32), jax.ShapeDtypeStruct((1, 7), jnp.int32))


@pytest.mark.parametrize(
    ("name", "outputs", "size", "published"),
    [
        ("alexnet", 1000, 227, 60_965_224),
        ("vgg16", 1000, 224, 138_357_544),
        ("inception-bn", 1000, 224, 11_295_240),
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet50", 1000, 224, 25_557_032),
        ("resnet152", 1000, 224, 60_192_808),
        ("mobilenet-v2", 1000, 224, 3_504_872),
        ("ssd300", 21, 300, 26_285_486),
        ("deeplab-largefov", 21, 321, 20_505_429),
    ],
)
def test_published_sizes(name, outputs, size, published):
    assert count(NETWORKS[name].published(outputs), image(size)) == published


def test_transformer_base_is_the_published_body_and_one_embedding():
    # 44,138,496: six layers on each side as in other implementations of the paper; 65 M with the embedding.
    model = NETWORKS["transformer"].published(37_000)
    assert count(model, TOKENS) == 44_138_496 + 37_000 * 512
    assert count(model, TOKENS) == pytest.approx(65e6, rel=0.04)


def test_recurrent_stacks_are_the_published_ones():
    """384 M parameters with 160,000 and 80,000 words (1409.3215), and attention's 3 M beside them."""
    model = seq2seq.Seq2Seq(80_000, source_vocabulary=160_000)
    attention = 1000 * 1000 + 2000 * 1000
    biases = 80_000
    assert count(model, TOKENS) - attention - biases == pytest.approx(384e6, rel=1e-3)
    gru = count(seq2seq.Seq2Seq(80_000, source_vocabulary=160_000, cell="gru"), TOKENS)
    gates = 8 * (2 * 1000 * 1000 + 1000)  # one gate fewer in each of the eight layers
    assert count(model, TOKENS) - gru == gates - 8 * 1000  # whose candidate has a second bias


def test_local_response_normalization_is_its_formula():
    x = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    expected = np.empty_like(x)
    for c in range(7):
        squares = (x[..., max(0, c - 2) : c + 3] ** 2).sum(-1)
        expected[..., c] = x[..., c] / (2.0 + 1e-4 * squares) ** 0.75
    np.testing.assert_allclose(layers.local_response_normalization(jnp.asarray(x)), expected, rtol=1e-6)


def test_positions_are_sines_and_cosines():
    table = np.asarray(transformer.positions(5, 8))[0]
    assert table[0].tolist() == [0, 1] * 4
    np.testing.assert_allclose(table[3, 2:4], [np.sin(3 / 10), np.cos(3 / 10)], rtol=1e-6)


def test_padding_receives_no_attention_and_no_token_sees_later_ones():
    for name in ("seq2seq-lstm", "seq2seq-gru", "transformer"):
        model = NETWORKS[name].small(20)
        source, target = jnp.array([[3, 4, 5, 0, 0]]), jnp.array([[1, 6, 7, 8]])
        variables = jax.jit(model.init)(jax.random.key(0), (source, target))
        apply = jax.jit(model.apply)
        out = apply(variables, (source, target))
        shorter = apply(variables, (source[:, :3], target))
        np.testing.assert_allclose(out, shorter, atol=1e-5)
        changed = apply(variables, (source, target.at[0, 2].set(9)))
        np.testing.assert_allclose(out[:, :2], changed[:, :2], atol=1e-6)
        assert np.abs(out[:, 2:] - changed[:, 2:]).max() > 1e-3


def test_no_network_mentions_quantization():
    import pathlib

    folder = pathlib.Path(layers.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text().lower().replace("none of them mentions quantization", "")
        assert "quantiz" not in text and "jax_apt as" not in text and "fixed point" not in text, path
