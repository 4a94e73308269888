"""NaN and infinite values make results NaN, are counted, and leave the precision state alone."""

import jax
import jax.numpy as jnp
import pytest
from small_networks import BACKENDS, normal, plain, two_layers

import jax_apt as apt


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_nonfinite_values_propagate_and_leave_the_state_alone(backend, bad):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain, backend=backend)

    def loss_fn(v, s, x):
        y = q.apply(v, s, x)
        return jnp.sum(y[1:] ** 2), y

    step = jax.jit(apt.value_and_grad(loss_fn, q, has_aux=True))
    (_, y), _, good = step(p, q.init(p, x), x)
    assert jnp.all(jnp.isfinite(y))
    (_, y), grads, after = step(p, good, x.at[0, 2].set(bad))
    float32 = plain(p, x.at[0, 2].set(jnp.nan))  # an infinity becomes NaN: codes have one mark for both
    assert jnp.array_equal(jnp.isfinite(y), jnp.isfinite(float32))
    assert after["a"]["x"].nonfinite == 1
    for field in ("bits", "exponent", "range_average", "updates"):
        assert getattr(after["a"]["x"], field) == getattr(good["a"]["x"], field)
    assert after["a"]["x"].next_update <= after.step  # looked at again at once
    assert "1 NaN or infinite values in x" in str(q.report(after))
    assert not jnp.all(jnp.isfinite(grads["a"]["kernel"]))
    (_, y), _, again = step(p, after, x)
    assert jnp.all(jnp.isfinite(y)) and again["a"]["x"].updates == 2


@pytest.mark.parametrize("tensor", ["x", "w", "dy"])
def test_nonfinite_values_of_each_tensor_are_counted_and_keep_its_format(tensor):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain, backend=BACKENDS[-1])

    def loss_fn(p, state, x, weight):
        return jnp.sum(q.apply(p, state, x) * weight)

    step = jax.jit(apt.value_and_grad(loss_fn, q))
    weight = normal(3, 4, 5)
    _, _, good = step(p, q.init(p, x), x, weight)
    values = {"x": x, "w": p["b"]["kernel"], "dy": weight}
    values[tensor] = values[tensor].at[1, 1].set(jnp.nan).at[2, 3].set(jnp.inf)
    bad = p | {"b": {"kernel": values["w"]}}
    _, _, after = step(bad, good, values["x"], values["dy"])
    layer = "a" if tensor == "x" else "b"
    assert after[layer][tensor].nonfinite == 2
    for field in ("bits", "exponent", "range_average", "updates"):
        assert getattr(after[layer][tensor], field) == getattr(good[layer][tensor], field)
    assert f"{layer}: 2 NaN or infinite values in {tensor}" in str(q.report(after))
    loss, grads, again = step(p, after, x, weight)
    assert jnp.isfinite(loss) and jax.tree.all(jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), grads))
    assert again[layer][tensor].updates == 2 and again[layer][tensor].nonfinite == 2
