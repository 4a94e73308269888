"""The report: every layer once, shares that add up, and plain data."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jax_apt as apt


def network(p, x):
    x = jnp.tanh(x @ p["first"]["kernel"])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"]["kernel"])[0]


@pytest.fixture(scope="module")
def report():
    p = {"first": {"kernel": jnp.eye(4)}, "stack": {"kernel": jnp.ones((3, 4, 4))}}
    x = jax.random.normal(jax.random.key(0), (5, 4))
    q = apt.apt_quantize(network, [apt.Rule("first", weights=6)], backend="xla")
    step = jax.jit(apt.value_and_grad(lambda p, s: jnp.sum(q.apply(p, s, x) ** 2), q))
    state = q.init(p, x)
    for _ in range(4):
        _, _, state = step(p, state)
    return q.report(state)


def test_it_is_plain_data(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == ["first", "stack"]
    first, stack = data["layers"]
    assert (first["rule"], stack["rule"]) == ("first", None)
    assert first["backend"] == "xla" and first["reason"] == "asked for"
    assert first["tensors"]["w"]["bits"] == 6 and len(stack["tensors"]["w"]["bits"]) == 3
    assert data["steps"] == 4 and data["left_in_float"] == [] and data["unused_rules"] == []


def test_shares_add_up_to_one(report):
    for tensors in report.tensors.values():
        for tensor in tensors.values():
            assert sum(tensor.share.values()) == pytest.approx(1.0)
            assert tensor.mean_interval == 1.0  # the initial phase: every step
    assert report.tensors["stack"]["x"].updates == 4 * 3


def test_the_text_names_layers_widths_and_reasons(report):
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert lines[1].split() == ["first", "dot_general", "xla", "'first'", "8", "6", "8", "1.0"]
    assert lines[2].split() == ["stack", "dot_general", "xla", "default", "8", "8", "8", "1.0"]
    assert "backend xla: asked for" in lines
    assert lines[-1] == "after 4 training steps"
