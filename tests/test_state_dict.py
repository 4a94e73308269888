"""Checkpoints: a run that goes on bit for bit, layers found by name, and states that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jax_apt as apt
from jax_apt.state import Layer, Layout, initial_state

RULE = apt.Rule("", grads=apt.Adaptive(8, 16), rounding="stochastic")


def network(p, x):
    return jnp.tanh(x @ p["enc"]["one"]["kernel"]) @ p["head"]["kernel"]


def parameters():
    rng = np.random.default_rng(0)
    one, head = rng.normal(size=(3, 4)), rng.lognormal(0, 2, (4, 2))
    return jax.tree.map(jnp.float32, {"enc": {"one": {"kernel": one}}, "head": {"kernel": head}})


X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    """Through Orbax, with adaptive widths and gradients that are rounded at random."""
    config = apt.Config(steps_per_epoch=4, initial_fraction=0.25)
    q = apt.apt_quantize(network, [RULE], config=config, backend="xla")

    @jax.jit
    def step(p, state):
        loss = apt.value_and_grad(lambda p, s: jnp.mean(q.apply(p, s, X) ** 2), q)
        value, gradients, state = loss(p, state)
        return jax.tree.map(lambda w, g: w - 0.01 * g, p, gradients), state, value

    p, state = parameters(), q.init(parameters(), X)
    losses, kept = [], None
    for i in range(6):
        if i == 3:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "3", {"p": p, "precision": apt.to_state_dict(state)})
        p, state, value = step(p, state)
        losses.append(value)

    with ocp.StandardCheckpointer() as checkpointer:
        like = {"p": parameters(), "precision": apt.to_state_dict(q.init(parameters(), X))}
        kept = checkpointer.restore(tmp_path / "3", like)
    resumed_p, resumed = kept["p"], apt.from_state_dict(q.init(parameters(), X), kept["precision"])
    assert resumed.step == 3 and resumed.layout == state.layout
    for i in range(3, 6):
        resumed_p, resumed, value = step(resumed_p, resumed)
        assert value == losses[i]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, (resumed_p, resumed), (p, state)))
    assert len(set(map(float, losses))) == 6


# By name


def layer(name, shape=(3, 4), stack=(), widths=((8,), (8,), (8, 16, 24))):
    return Layer(name, "dot_general", stack, shape, widths, "xla", "asked for", None)


def trained(*layers):
    """A state whose every row is different."""
    state = initial_state(Layout(layers))
    count, most = state.precision.steps_at_width.shape
    rows = jnp.arange(count, dtype=jnp.int32)
    table = jnp.arange(count * most, dtype=jnp.int32).reshape(count, most)
    if layers:
        most = np.array([len(set(row)) for row in state.layout.candidates().tolist()])
        table = jnp.where(jnp.arange(table.shape[1])[None] < most[:, None], table, 0)
    precision = state.precision._replace(
        exponent=-rows, range_average=rows.astype(jnp.float32) + 0.5, updates=rows + 1, steps_at_width=table
    )
    return apt.AptState(jnp.int32(7), precision, None, state.layout)


def saved(*layers):
    return jax.tree.map(np.asarray, apt.to_state_dict(trained(*layers)))


def assert_same(a, b):
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_layers_are_found_by_name_and_not_by_place():
    old, new = (
        [layer("a"), layer("b", stack=(2,)), layer("c")],
        [layer("c"), layer("a"), layer("b", stack=(2,))],
    )
    state = apt.from_state_dict(initial_state(Layout(tuple(new))), saved(*old))
    for name in "abc":
        assert_same(state[name], trained(*old)[name])


def test_renamed_layers_and_modules():
    old = [layer("enc/one"), layer("enc/one#1"), layer("encoder"), layer("head")]
    new = [layer("trunk/one"), layer("trunk/one#1"), layer("encoder"), layer("top")]
    target = initial_state(Layout(tuple(new)))
    state = apt.from_state_dict(target, saved(*old), rename={"enc": "trunk", "head": "top"})
    for before, after in zip(old, new, strict=True):
        assert_same(state[after.name], trained(*old)[before.name])
    with pytest.raises(
        ValueError, match="'neck' is no saved layer; there are enc/one, enc/one#1, encoder, head"
    ):
        apt.from_state_dict(target, saved(*old), rename={"neck": "top"})
    with pytest.raises(ValueError, match="several saved layers would be called encoder"):
        apt.from_state_dict(target, saved(*old), rename={"head": "encoder"})


def test_added_layers_start_afresh_and_nothing_is_dropped_in_silence():
    wide = layer("wide", widths=((8,), (8,), (8, 14, 16, 24)))
    target = initial_state(Layout((layer("a"), wide, layer("head", (4, 5)))))
    old = saved(layer("a"), layer("gone"), layer("head"))
    everything = (
        r"\. wide: not in the saved state; head: weight_shape is \[4, 5\] in the function and \[3, 4\] in "
        r"the saved state; gone: saved, but no layer of the function"
    )
    with pytest.raises(ValueError, match="other rules" + everything + r".*rename=.*partial=True"):
        apt.from_state_dict(target, old)
    with pytest.warns(UserWarning, match="not everything was restored" + everything):
        state = apt.from_state_dict(target, old, partial=True)
    assert state.step == 7
    before = trained(layer("a"))["a"]
    for tensor in ("x", "w", "dy"):
        np.testing.assert_array_equal(state["a"][tensor].exponent, before[tensor].exponent)
        assert state["a"][tensor].steps_at_width.tolist()[:3] == before[tensor].steps_at_width.tolist()
    assert_same([state["wide"], state["head"]], [target["wide"], target["head"]])


def test_a_state_of_another_function_is_refused_by_name():
    target = initial_state(Layout((layer("a", widths=((8,), (16,), (8,))), layer("b", stack=(3,)))))
    with pytest.raises(ValueError) as error:
        apt.from_state_dict(target, saved(layer("a"), layer("b")), partial=True)
    assert "a: widths is [[8], [16], [8]] in the function and [[8], [8], [8, 16, 24]] in the" in str(
        error.value
    )
    assert "b: stack is [3] in the function and [] in the saved state" in str(error.value)
    assert "here no layer is the same" in str(error.value)


def test_a_function_without_layers():
    state = apt.from_state_dict(initial_state(Layout(())), saved())
    assert state.step == 7 and "precision" not in saved()


# Versions


def test_format_1_is_read():
    """As version 0.1.0 wrote it; a later version must go on reading it, or refuse it and say so."""
    text = (
        '[{"name": "a", "primitive": "dot_general", "stack": [], "weight_shape": [3, 4], '
        '"widths": [[8], [8], [8, 16]]}]'
    )
    written = {
        "format_version": np.int32(1),
        "layers": np.frombuffer(text.encode(), np.uint8),
        "step": np.int32(12),
        "precision": {
            "bits": np.array([8, 8, 16], np.int32),
            "exponent": np.array([-5, -6, -20], np.int32),
            "range_average": np.array([-5.0, -6.0, -19.5], np.float32),
            "next_update": np.array([40, 50, 13], np.int32),
            "updates": np.array([4, 4, 12], np.int32),
            "nonfinite": np.array([0, 0, 1], np.int32),
            "steps_at_width": np.array([[12, 0], [12, 0], [2, 10]], np.int32),
        },
    }
    target = initial_state(Layout((layer("a", widths=((8,), (8,), (8, 16))),)))
    state = apt.from_state_dict(target, written)
    assert state.step == 12
    assert_same(state.precision._asdict(), written["precision"])
    assert_same(apt.to_state_dict(state), written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format 2, and this jax_apt reads formats up to 1: update jax_apt"),
        ({"format_version": 0}, "damaged: its format_version is 0"),
        ({"layers": np.array([1, 2], np.uint8)}, "damaged: its layers are no JSON"),
        ({"precision": {"bits": np.zeros(3)}}, "damaged: its precision has the fields bits"),
        ({"precision": saved(layer("a"), layer("b"))["precision"]}, "damaged: bits has 6 rows, its layers 3"),
    ],
)
def test_what_cannot_be_read_is_refused(change, message):
    target = initial_state(Layout((layer("a"),)))
    with pytest.raises(ValueError, match=message):
        apt.from_state_dict(target, saved(layer("a")) | change)


def test_states_saved_without_a_format_are_refused():
    target = initial_state(Layout((layer("a"),)))
    old = {"step": 1, "precision": target.precision._asdict(), "taps": None}
    with pytest.raises(ValueError, match=r"no format_version: .* an early jax_apt .* start with init"):
        apt.from_state_dict(target, old)
    with pytest.raises(ValueError, match="no saved precision state: it has the keys params"):
        apt.from_state_dict(target, {"params": 1})
    with pytest.raises(TypeError, match="got an AptState"):
        apt.from_state_dict(target, target)
    with pytest.raises(TypeError, match="got list"):
        apt.from_state_dict(target, [])
    with pytest.raises(TypeError, match=r"to_state_dict\(state\)"):
        apt.to_state_dict({})
