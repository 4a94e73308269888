"""The benchmark for accelerators, tried on a CPU: it sees integer products, differences and what is timed."""

import accelerator_equals_cpu as benchmark
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import jax_steps, networks

PRODUCT = benchmark.products(quick=True)[0]


@pytest.fixture(scope="module")
def step():
    return benchmark.run(PRODUCT, (8, 8, 16), jax.devices("cpu")[0])


def test_integer_products_are_found_in_a_compiled_program(step):
    assert set(benchmark.integer_products(step[1])) == {"dot"}
    in_float = jax.jit(jnp.matmul).lower(jnp.ones((8, 8)), jnp.ones((8, 8))).compile().as_text()
    assert "dot(" in in_float and benchmark.integer_products(in_float) == []


def test_integer_products_of_accelerators_are_known():
    """As XLA writes them for a GPU's library and for a TPU; products of floats and of int32 are others."""
    text = """
  %a = s8[64,32]{1,0} parameter(0)
  %b = s8[32,16]{1,0} parameter(1)
  %w = s32[32,16]{1,0} convert(%b)
  %f = f32[32,16]{1,0} convert(%b)
  %cublas = (s32[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  ROOT %tpu = s32[64,16]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
  %wide = s32[64,16]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %float = (f32[64,16]{1,0}, s8[4096]{0}) custom-call(%f, %f), custom_call_target="__cublas$gemm"
  %sort = s32[64,16]{1,0} custom-call(%a, %b), custom_call_target="__cub$DeviceRadixSort"
"""
    assert benchmark.integer_products(text) == ["__cublas$gemm", "convolution"]


def test_one_different_element_fails_and_so_does_a_program_without_integers(step, monkeypatch, capsys):
    results, text = step
    assert results["bits"].tolist() == [8, 8, 16]  # the outlier was seen
    other = results | {"dw": results["dw"] * np.where(np.arange(64).reshape(8, 8) == 3, 1 + 2.0**-23, 1)}
    assert benchmark.differences(results, results) == []
    assert benchmark.differences(other, results) == ["dw (1 of 64)"]
    monkeypatch.setattr(benchmark, "products", lambda quick: [PRODUCT])
    answers = iter([(results, text), (results, text), (other, text), (results, text)])
    monkeypatch.setattr(benchmark, "run", lambda *_: next(answers))
    assert benchmark.main(["--quick", "--steps"]) == 0
    assert "1 products on cpu equal the CPU's" in capsys.readouterr().out
    assert benchmark.main(["--quick", "--steps"]) == 1
    assert "matrix product, 8 x 8 x 16 bits: differs from the CPU in dw (1 of 64)" in capsys.readouterr().out
    row = {"name": "a", "differences": [], "integer_products": []}
    assert benchmark.misses([row], is_accelerator=True) == ["a: no integer product"]
    assert benchmark.misses([row], is_accelerator=False) == []


def test_without_an_accelerator_nothing_is_claimed(capsys):
    assert benchmark.main([]) == 2
    assert "no accelerator here" in capsys.readouterr().err


def test_contenders_compute_as_they_are_called(monkeypatch, promotion_as_users_have_it):
    """float32 to the last bit, tf32, and bfloat16 copies of weights that stay float32."""
    (case,) = (case for case in networks.steps(quick=True) if case["name"].startswith("MLP"))
    seen = {}

    def compile_(step, carry, case):
        seen["text"] = jax.jit(step).lower(carry, *networks.batches(case, 1)[0]).as_text()
        (kernel, *_) = jax.tree.leaves(carry)
        seen["dtype"] = kernel.dtype
        return lambda carry, x, y: (carry, jnp.zeros(())), {}

    monkeypatch.setattr(jax_steps, "_compile", compile_)
    for name, words in (
        ("float32", "precision = [HIGHEST, HIGHEST]"),
        ("tf32", "precision = [HIGH, HIGH]"),
        ("bfloat16", "-> tensor<2x32xbf16>"),
    ):
        benchmark._build(case, name)
        products = [line for line in seen["text"].splitlines() if "dot_general" in line]
        assert any(words in line for line in products), (name, products)
        assert seen["dtype"] == jnp.float32
