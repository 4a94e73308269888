"""The page on many devices: its tables follow from what was counted, and counting counts."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
import traffic_grows_with_layers_only as benchmark
from traffic_grows_with_layers_only import Traffic

import jax_apt as apt

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "devices.md").read_text()
ROW = re.compile(r"\| (data|tensor) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) B \| (.*?) \| (.*?) \|")

PROGRAM = """
%quiet (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%measuring (p.1: f32[8]) -> f32[8] {
  %largest = f32[] all-reduce(%m), to_apply=%max
  ROOT %sums = (f32[], f32[3]{0}) all-reduce(%a, %b), to_apply=%add
}

%called (p.2: f32[8]) -> f32[8] {
  ROOT %gathered = s8[4,8]{1,0} all-gather(%c), dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %started = f32[16,2]{1,0} all-reduce-start(%w), to_apply=%add
  %finished = f32[16,2]{1,0} all-reduce-done(%started)
  %either = f32[8]{0} conditional(%i, %x, %x), branch_computations={%quiet, %measuring}
  ROOT %out = f32[8]{0} call(%x), to_apply=%called
}
"""


def test_collectives_of_a_program_are_added_up():
    """One that was started counts once; of a condition one branch."""
    assert benchmark.traffic(PROGRAM, min) == Traffic(128 + 32, 2)
    assert benchmark.traffic(PROGRAM, max) == Traffic(128 + 32 + 4 + 16, 4)


def cell(text):
    size, calls = re.fullmatch(r"([\d,]+) B in (\d+)", text).groups()
    return Traffic(int(size.replace(",", "")), int(calls))


def state_bytes(layers):
    params = [jnp.ones((2, 2))] * layers
    q = apt.apt_quantize(lambda params, x: sum(x @ w for w in params))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(q.init(params, jnp.ones((2, 2)))))


@pytest.fixture(scope="module")
def rows():
    """What was counted, read back from the page; states are those of this version."""
    (version, backend), states = re.search(r"of jax (\S+), backend (\w+)", PAGE).groups(), {}
    found = []
    for layout, devices, layers, width, plain, quiet, measuring in ROW.findall(PAGE):
        row = {"layout": layout, "devices": int(devices), "layers": int(layers), "width": int(width)}
        row |= {"quiet": cell(quiet), "measuring": cell(measuring), "jax": version, "backend": backend}
        row |= {"float32": Traffic(int(plain.replace(",", "")), 0)}
        row["state"] = states.setdefault(layers, state_bytes(int(layers)))
        found.append(row)
    return found


def test_the_page_follows_from_what_was_counted(rows):
    assert [r["devices"] for r in rows] == [d for d in benchmark.DEVICES for _ in benchmark.CASES]
    benchmark.check(rows)
    text = re.search(r"<!-- traffic -->\n(.*)\n<!-- end of traffic -->", PAGE, re.DOTALL)[1]
    assert text == benchmark.page(rows)


def test_the_prose_agrees_with_the_tables(rows):
    quiet, measuring = (benchmark.per_layer(rows, name) for name in ("quiet", "measuring"))
    assert quiet == (8, 2) and "adds two all-reduces of 4 bytes to every step" in PAGE
    assert measuring.calls - quiet.calls == 4 and "There are two more for each tensor that is\ndue" in PAGE
    assert f"would spend {quiet.calls * 2:.0f} ms for a quiet step" in PAGE  # 100 layers, 20 us
    assert f"{measuring.calls * 2:.0f} ms for one that measures everything" in PAGE
    split = {r["layers"]: r for r in rows if (r["layout"], r["devices"]) == ("tensor", 8)}
    calls = {name: (split[4][name].calls - split[2][name].calls) // 2 for name in ("quiet", "measuring")}
    assert calls == {"quiet": 1, "measuring": 5} and "it is one, and four more when all are due" in PAGE
    per_layer = benchmark.state_bytes(rows, 3) - benchmark.state_bytes(rows, 2)
    assert per_layer == 108 and "36 bytes for a tensor with three candidate widths" in PAGE
    assert f"{per_layer} for a layer" in PAGE
    q = apt.apt_quantize(lambda w, x: x @ w)
    (tap,) = jax.tree.leaves(q.taps(q.init(jnp.ones((2, 2)), jnp.ones((2, 2)))))
    assert tap.size == 3 * (3 + 3 + 253 * 3) and round(tap.nbytes / 1000) == 9
