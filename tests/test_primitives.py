"""The table of JAX's primitives: it knows all of the installed JAX, each gets what it says, the page is its.

`python tests/test_primitives.py` writes the page.
"""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.custom_derivatives import linear_call
from jax.experimental import io_callback, sparse
from jax.extend.core import Primitive
from small_networks import FASTEST, normal

import jax_apt as apt
from jax_apt.plan import make_plan
from jax_apt.primitives import BODIES, FAMILIES, FAMILY_OF, IN_KERNELS, KERNEL_PRODUCTS, WITHOUT_PRODUCT

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "primitives.md"
REPORTED = [name for name, family in FAMILY_OF.items() if family.reason]

LIST_PRIMITIVES = """
import gc, importlib, pkgutil, jax
from jax.extend.core import Primitive
scripts = ("_src", "tools", "jax2tf", "test", "colab", "mock", "__main__", "jax_to_ir", "collect_profile")
for module in pkgutil.walk_packages(jax.__path__, "jax.", onerror=lambda _: None):
    if not any(word in module.name for word in scripts):
        try:
            importlib.import_module(module.name)
        except ImportError:
            pass  # it wants a package that is not there
print(*{o.name for o in gc.get_objects() if isinstance(o, Primitive)})
"""


def test_every_primitive_of_the_installed_jax_has_a_place():
    command = [sys.executable, "-W", "ignore", "-c", LIST_PRIMITIVES]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(found) > 400 and {"dot_general", "csr_matmat", "pallas_call", "wgmma"} <= set(found)
    unknown = sorted(set(found) - set(FAMILY_OF))
    assert not unknown, f"jax {jax.__version__} has primitives that jax_apt/primitives.py does not know"
    assert sum(len(family.names) for family in FAMILIES.values()) == len(FAMILY_OF)


# What the plan makes of a primitive, by its name alone


def stand_in(name, dtype=None):
    """Calls a primitive of this name that keeps shapes; most of the true ones do not run on a CPU."""
    primitive = Primitive(name)

    @primitive.def_abstract_eval
    def _(x, **_):
        return x if dtype is None else x.update(dtype=dtype)

    return primitive.bind


def planned(fn):
    """The layout that is planned for a function of a (3, 3) matrix."""
    return make_plan(jax.make_jaxpr(fn)(jnp.ones((3, 3))), [None], (), "xla", True)[1]


def wrappers():
    return {
        "": lambda f: f,
        "jit": jax.jit,
        "scan": scanned,
        "cond": lambda f: lambda x: lax.cond(True, f, f, x),
    }


def scanned(f):
    return lambda x: lax.scan(lambda x, _: (f(x), None), x, length=2)[0]


@pytest.mark.parametrize("wrapper", wrappers())
def test_what_stays_in_float_is_reported_wherever_it_stands(wrapper):
    wrap = wrappers()[wrapper]
    for name in REPORTED:
        layout = planned(wrap(stand_in(name)))
        assert {left.primitive for left in layout.left_in_float} == {name}
        assert layout.left_in_float[0].reason == FAMILY_OF[name].reason
        assert not layout.layers


def test_what_has_no_product_is_not_mentioned():
    for name in (*IN_KERNELS, *WITHOUT_PRODUCT):
        assert planned(stand_in(name)).left_in_float == ()


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_not_replayed_hides_nothing(name):
    def call(body):
        jaxpr = jax.make_jaxpr(body)(jnp.ones((3, 3)))
        return planned(lambda x: stand_in(name)(x, jaxpr=jaxpr))

    assert call(jnp.sin).left_in_float == ()
    for hidden in (jnp.dot, *map(stand_in, KERNEL_PRODUCTS)):
        body = (lambda x: x @ x) if hidden is jnp.dot else hidden
        with pytest.raises(
            NotImplementedError, match=rf"{name} at .*test_primitives.py:\d+ .* hides a matrix"
        ):
            call(body)
    (left,) = call(stand_in("ffi_call")).left_in_float
    assert (left.name, left.reason) == (name, "ffi_call inside stays in float")


def test_a_primitive_that_nobody_knows_is_reported_if_it_may_hold_a_product():
    (left,) = planned(stand_in("their_fast_matmul")).left_in_float
    assert (left.primitive, left.reason) == (
        "their_fast_matmul",
        "unknown to jax_apt: whatever it computes stays as it is",
    )
    assert planned(stand_in("their_argmax", jnp.int32)).left_in_float == ()


# Programs that run on a CPU


def solver(p, x):
    w = p["w"]
    return lax.custom_linear_solve(lambda v: w @ v, x[0], lambda _, b: jnp.linalg.solve(w, b))[None] @ w


def callback(kind):
    def fn(p, x):
        return kind(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x) @ p["w"]

    return fn


def linear(p, x):
    return linear_call(lambda m, x: x @ m, lambda m, y: y @ m.T, 2 * jnp.eye(4), x) @ p["w"]


EYE = np.eye(4, dtype=np.float32)
CSR, COO = sparse.CSR.fromdense(EYE), sparse.COO.fromdense(EYE)
BCSR, BCOO = sparse.BCSR.fromdense(EYE), sparse.BCOO.fromdense(EYE)
EXPORTED = export.export(jax.jit(jnp.matmul))(
    *[jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 4), (4, 4))]
)
IN_FLOAT = {
    "csr_matvec": lambda p, x: (CSR @ x[0])[None] @ p["w"],
    "csr_matmat": lambda p, x: CSR @ p["w"] @ p["w"],
    "coo_matvec": lambda p, x: (COO @ x[0])[None] @ p["w"],
    "coo_matmat": lambda p, x: COO @ p["w"] @ p["w"],
    "bcsr_dot_general": lambda p, x: BCSR @ p["w"] @ p["w"],
    "bcoo_dot_general": lambda p, x: BCOO @ p["w"] @ p["w"],
    "custom_linear_solve": solver,
    "cholesky": lambda p, x: x @ jnp.linalg.cholesky(p["w"]),
    "pure_callback": callback(jax.pure_callback),
    "io_callback": callback(io_callback),
    "call_exported": lambda p, x: EXPORTED.call(x, p["w"]) @ p["w"],
}


@pytest.mark.parametrize("name", IN_FLOAT)
def test_a_program_with_a_part_in_float(name):
    p, x = {"w": 2 * jnp.eye(4)}, normal(0, 3, 4)
    q = apt.apt_quantize(IN_FLOAT[name], [apt.Rule(acts=16, weights=16)], backend=FASTEST)
    state = q.init(p, x)
    left = [entry for entry in state.layout.left_in_float if entry.primitive == name]
    assert left and left[0].reason == FAMILY_OF[name].reason
    assert state.layout.names() == ("w",)
    assert f"left in float: {left[0].name} ({name}): {left[0].reason}" in str(q.report(state))
    out, expected = jax.jit(q.apply)(p, state, x), jax.jit(IN_FLOAT[name])(p, x)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)


def test_a_custom_call_is_reported_from_within_a_loop():
    def fn(p, x):
        def step(x, _):
            return jax.ffi.ffi_call("not_there", jax.ShapeDtypeStruct(x.shape, x.dtype))(x) @ p["w"], None

        return lax.scan(step, x, length=2)[0]

    state = apt.apt_quantize(fn).init({"w": jnp.eye(4)}, normal(0, 3, 4))
    assert [(left.primitive, left.reason) for left in state.layout.left_in_float] == [
        ("ffi_call", "not a JAX program: whatever it computes stays as it is")
    ]


def test_a_linear_call_is_an_error_or_left_in_float_by_a_rule():
    p, x = {"w": jnp.eye(4)}, normal(0, 3, 4)
    with pytest.raises(NotImplementedError, match=r"linear_call at .*test_primitives.py:\d+ .*\(linear\)"):
        apt.apt_quantize(linear).init(p, x)
    q = apt.apt_quantize(linear, [apt.Rule("linear_call$", quantize=False)], backend=FASTEST)
    state = q.init(p, x)
    assert (state.layout.names(), state.layout.left_in_float[0].primitive) == (("w",), "linear_call")
    out, expected = jax.jit(q.apply)(p, state, x), jax.jit(linear)(p, x)
    np.testing.assert_allclose(out, expected, rtol=0.05, atol=0.05)


# The page


def render():
    lines = [
        "# What happens with each JAX primitive",
        "",
        "`apt_quantize` replays the program that JAX traced, primitive by primitive. Written from",
        "`jax_apt/primitives.py` by `python tests/test_primitives.py`; the tests hold each row to what the",
        "transform does, and fail when an installed JAX (0.10.2 or newer) has a primitive that is not here.",
        "A primitive of another library is reported as left in float if it takes and gives floats; a product",
        "in a body of it is an error that names your line.",
        "",
        "## Primitives that can hold a product",
        "",
        "| primitive | what happens |",
        "|---|---|",
    ]
    plain = ("Other instructions of Pallas kernels", "Without a product")
    for title, family in FAMILIES.items():
        reason = f' ("{family.reason}")' if family.reason else ""
        rows = [f"| `{name}` | {family.outcome}{reason} |" for name in sorted(family.names)]
        lines += [] if title in plain else rows
    for title in plain:
        lines += ["", f"## {title}", "", ", ".join(f"`{name}`" for name in sorted(FAMILIES[title].names))]
    return "\n".join([*lines, ""])


def test_the_page_is_written_from_the_table():
    assert PAGE.read_text() == render(), "python tests/test_primitives.py writes it anew"


if __name__ == "__main__":
    PAGE.write_text(render())
