"""Bad input gets an error that names the value, what is allowed, and the user's line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import normal, plain, two_layers

import jax_apt as apt


def test_errors_at_the_door():
    with pytest.raises(TypeError, match="takes a function, got int"):
        apt.apt_quantize(3)
    with pytest.raises(TypeError, match="takes the original function; this one is made by apt_quantize"):
        apt.apt_quantize(apt.apt_quantize(plain).apply)
    with pytest.raises(TypeError, match="rules must be Rule objects, got 'Dense'"):
        apt.apt_quantize(plain, ["Dense"])
    with pytest.raises(TypeError, match="config must be a Config"):
        apt.apt_quantize(plain, config={"alpha": 0.1})
    with pytest.raises(ValueError, match="one of auto, native, xla, emulate; got 'cuda'"):
        apt.apt_quantize(plain, backend="cuda")
    for rules in (apt.Rule("a"), None, {"a": 8}):
        with pytest.raises(TypeError, match=r"rules must be .*Rule.*, got .*; one rule is \[rule\]"):
            apt.apt_quantize(plain, rules)
    with pytest.raises(TypeError, match="pass the Config as config="):
        apt.apt_quantize(plain, apt.Config())


def test_state_missing_from_apply():
    p, x = two_layers(), normal(2, 4, 5)
    with pytest.raises(TypeError, match=r"apply\(variables, state, ...\): the state must be an AptState"):
        apt.apt_quantize(plain).apply(p, x)
    with pytest.raises(TypeError, match="must be an AptState"):
        apt.value_and_grad(lambda v, s: 0.0, apt.apt_quantize(plain))(p, x)


def test_arguments_in_the_wrong_place():
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain)
    state = q.init(p, x)
    for call, words in (
        (lambda: q.apply(state, p, x), r"apply\(variables, state, ...\): .* got dict"),
        (lambda: q.apply(p, x, state), r"apply\(variables, state, ...\): .* got ArrayImpl"),
        (lambda: q.apply(p, state, state), "argument 1 is an AptState"),
        (lambda: q.init(p, state, x), "argument 1 is an AptState"),
        (lambda: q.init(state, x), "variables is an AptState"),
        (lambda: q.update(q.taps(state), state), r"update\(state, taps\): .* got dict"),
        (lambda: q.taps(p), r"taps\(state\): .* got dict"),
        (lambda: q.with_taps(p), r"with_taps\(state, taps\): .* got dict"),
        (lambda: q.report(p), r"report\(state\): .* got dict"),
        (lambda: apt.value_and_grad(q, plain), "loss_fn must be a function, got AptFunction"),
        (lambda: apt.value_and_grad(plain, q.apply), "q must be made by apt_quantize, got method"),
        (lambda: apt.value_and_grad(plain, q)(state, p), r"takes \(variables, state, ...\): .* got dict"),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_state_of_another_model_is_named():
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain)
    other = {"a": {"kernel": normal(0, 5, 7)}, "c": {"kernel": normal(1, 7, 5)}}
    state = apt.apt_quantize(lambda p, x: x @ p["a"]["kernel"] @ p["c"]["kernel"]).init(other, x)
    with pytest.raises(ValueError, match=r"weight_shape is \(5, 5\) in the function and \(5, 7\)") as e:
        q.apply(p, state, x)
    assert "b: not in the state" in str(e.value)


def test_unsupported_dtypes_name_the_users_line():
    with pytest.raises(TypeError, match=r"layer w: dot_general at .*test_bad_input.py:\d+ .*complex64"):
        apt.apt_quantize(lambda p, x: x.astype(jnp.complex64) @ p["w"]).init(
            {"w": jnp.ones((3, 3), jnp.complex64)}, jnp.ones((2, 3))
        )
    with jax.enable_x64(True), pytest.raises(TypeError, match="has float64 values"):
        apt.apt_quantize(lambda p, x: x @ p["w"]).init({"w": np.ones((3, 3))}, np.ones((2, 3)))


def test_sums_that_64_bits_may_not_hold_name_the_line_and_the_product():
    rule = apt.Rule("", acts=24, weights=24)
    q = apt.apt_quantize(lambda p, x: x @ p["w"], [rule])
    p, x = {"w": jnp.ones((2**16 + 1, 1))}, jnp.ones((2, 2**16 + 1))
    message = (
        r"layer w: dot_general at .*test_bad_input.py:\d+ .*forward product sums 65537 terms of 24 x 24 bits"
    )
    with pytest.raises(ValueError, match=message):
        q.apply(p, q.init(p, x), x)
    q.apply({"w": p["w"][1:]}, q.init({"w": p["w"][1:]}, x[:, 1:]), x[:, 1:])  # 2**16 terms fit


def test_integer_product_is_left_alone_and_reported():
    def fn(p, x):
        return x @ p["w"] + (jnp.ones((2, 3), jnp.int32) @ jnp.ones((3, 3), jnp.int32)).astype(jnp.float32)

    q = apt.apt_quantize(fn)
    state = q.init({"w": jnp.ones((3, 3))}, jnp.ones((2, 3)))
    assert state.layout.names() == ("w",)
    assert state.layout.left_in_float[0].reason == "an integer product is exact already"


def test_integer_parameters_are_named():
    q = apt.apt_quantize(plain)
    p = two_layers() | {"steps": jnp.zeros((), jnp.int32)}
    x = normal(2, 4, 5)
    step = apt.value_and_grad(lambda v, s: jnp.sum(q.apply(v, s, x)), q)
    with pytest.raises(TypeError, match="steps is int32; gradients are taken with respect to float32"):
        step(p, q.init(p, x))


@jax.custom_vjp
def own_rule(x, w):
    return jnp.tanh(x @ w)


own_rule.defvjp(lambda x, w: (own_rule(x, w), (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

BODIES = {
    "product": plain,
    "jit": jax.jit(plain),
    "recurrent": lambda p, x: jax.lax.scan(lambda x, _: (plain(p, x), None), x, length=2)[0],
    "custom rule": lambda p, x: own_rule(x, p["a"]["kernel"]),
    "remat": jax.checkpoint(plain),
}


def refuses(derivative):
    with pytest.raises(TypeError, match=r"no forward-mode derivative .* use jax\.grad"):
        jax.jit(derivative).lower()


@pytest.mark.parametrize("body", BODIES)
def test_forward_mode_is_refused_in_every_body(body):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(BODIES[body], backend="xla")
    state = q.init(p, x)
    function = jax.jit(lambda x: q.apply(p, state, x))
    refuses(lambda: jax.jvp(function, (x,), (x,)))
    assert jax.eval_shape(jax.grad(lambda x: jnp.sum(function(x))), x).shape == x.shape


def test_forward_mode_is_refused_wherever_it_is_taken():
    """In words of this library; the reverse mode of the same goes through."""
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain, backend="xla")
    state = q.init(p, x)

    def apply(x):
        return q.apply(p, state, x)

    def scanned(x):
        return jax.lax.scan(lambda x, _: (apply(x), None), x, length=2)[0]

    for function in (apply, jax.jit(apply), scanned):
        refuses(lambda f=function: jax.jvp(f, (x,), (x,)))
    refuses(lambda: jax.jacfwd(jax.jit(apply))(x))
    refuses(lambda: jax.linearize(scanned, x)[1](x))
    refuses(lambda: jax.jvp(jax.vmap(apply), (x[:, None],), (x[:, None],)))
    for reverse in (jax.jacrev(apply), jax.vmap(jax.grad(lambda x: jnp.sum(apply(x[None]))))):
        jax.jit(reverse).lower(x)
    jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(apply)(x)))).lower(x[:, None])


def test_forward_mode_is_refused_as_it_runs():
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(plain, backend="xla")
    state = q.init(p, x)
    function = jax.jit(lambda x: q.apply(p, state, x))
    with pytest.raises(TypeError, match="no forward-mode derivative"):
        jax.jvp(function, (x,), (x,))
    linear, (pulled,) = jax.linearize(function, x)[1], jax.vjp(function, x)[1](jnp.ones_like(x))
    with pytest.raises(TypeError, match="no forward-mode derivative"):
        linear(x)
    (transposed,) = jax.linear_transpose(linear, x)(jnp.ones_like(x))
    np.testing.assert_array_equal(transposed, pulled)


def test_a_derivative_that_the_function_takes_itself_is_replayed():
    """A forward-mode derivative inside the function is ordinary products by the time they are swapped."""

    def fn(p, x):
        return jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (jnp.ones_like(x),))[1]

    p, x = {"w": normal(0, 5, 5)}, normal(1, 4, 5)
    wide = apt.Rule("", acts=24, weights=24, grads=24)
    q = apt.apt_quantize(fn, [wide], backend="xla")
    state = q.init(p, x)
    assert not state.layout.left_in_float and state.layout.layers
    np.testing.assert_allclose(jax.jit(q.apply)(p, state, x), fn(p, x), rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(q.apply(p, state, x) ** 2)))(p)
    np.testing.assert_allclose(
        gradient["w"], jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(p)["w"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("body", ["product", "recurrent"])  # one loop is differentiated as a whole
def test_second_derivatives_are_refused_rather_than_zero(body):
    p, x = two_layers(), normal(2, 4, 5)
    q = apt.apt_quantize(BODIES[body], backend="xla")
    state = q.init(p, x)

    def fn(x):
        return jnp.sum(q.apply(p, state, x))

    for second in (jax.hessian(fn), jax.grad(lambda x: jnp.sum(jax.grad(fn)(x) ** 2))):
        for derivative in (second, jax.jit(second)):
            words = r"no (second|forward-mode) derivative \(.*jax\.hessian"
            with pytest.raises(TypeError, match=words):
                jax.eval_shape(derivative, x)


def test_mixed_derivatives_are_refused_rather_than_zero():
    """The gradient of one product for x, differentiated by its weight, or by a factor behind it."""
    q = apt.apt_quantize(lambda w, x: x @ w, backend="xla")
    w, x, scale = normal(0, 5, 3), normal(1, 4, 5), normal(2, 4, 3)
    state = q.init(w, x)

    def penalty(w, scale):
        gradient = jax.grad(lambda x: jnp.sum(q.apply(w, state, x) * scale))(x)
        return jnp.sum(gradient**2)

    for argument in (0, 1):
        with pytest.raises(TypeError, match="no second derivative"):
            jax.eval_shape(jax.grad(penalty, argnums=argument), w, scale)


def test_native_that_cannot_run_is_an_error_and_auto_says_why(monkeypatch):
    monkeypatch.setattr("jax_apt.xla_ops.is_available", lambda: False)
    monkeypatch.setattr("jax_apt.xla_ops.unavailable_reason", lambda: "no library")
    p, x = two_layers(), normal(2, 4, 5)
    with pytest.raises(RuntimeError, match="backend 'native' cannot run here: no library"):
        apt.apt_quantize(plain, backend="native").init(p, x)
    layer = apt.apt_quantize(plain).init(p, x).layout.layers[0]
    assert (layer.backend, layer.reason) == ("xla", "native cannot run: no library")


def test_hidden_product_names_the_line():
    from jax.experimental import pallas as pl

    def kernel(x_ref, w_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    def fn(p, x):
        shape = jax.ShapeDtypeStruct((4, 5), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, p["w"])

    p, x = {"w": normal(0, 5, 5)}, normal(1, 4, 5)
    words = r"pallas_call at .*test_bad_input.py:\d+ .* leave it in float with Rule\('.*pallas_call'"
    with pytest.raises(NotImplementedError, match=words):
        apt.apt_quantize(fn).init(p, x)
    q = apt.apt_quantize(fn, [apt.Rule("pallas_call$", quantize=False)])
    state = q.init(p, x)
    assert [left.reason for left in state.layout.left_in_float] == ["rule 'pallas_call$'"]
    np.testing.assert_array_equal(q.apply(p, state, x), fn(p, x))
