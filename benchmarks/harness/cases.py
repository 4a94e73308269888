"""The products that are timed: matrix products and convolution layers of well-known networks."""

import numpy as np

_GEMMS = (  # M, K, N
    (256, 256, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (64, 512, 256),
    (256, 576, 64),
    (512, 1152, 128),
    (4096, 256, 64),
    (4096, 576, 64),
    (4096, 1152, 128),
    (1024, 2304, 256),
    (256, 4608, 512),
    (64, 4608, 1024),
    (256, 1024, 1024),
)

_CONVOLUTIONS = {  # name: batch, map, channels in, channels out, window, stride
    "alex2": (16, 27, 64, 192, 5, 1),
    "alex3": (16, 13, 192, 384, 3, 1),
    "alex4": (16, 13, 384, 256, 3, 1),
    "alex5": (16, 13, 256, 256, 3, 1),
    "r56": (8, 56, 64, 64, 3, 1),
    "r28": (8, 28, 128, 128, 3, 1),
    "r14": (8, 14, 256, 256, 3, 1),
    "r7": (8, 7, 512, 512, 3, 1),
    "r56s2": (8, 56, 64, 128, 3, 2),
    "p56": (8, 56, 64, 256, 1, 1),
    "p14": (8, 14, 1024, 256, 1, 1),
    "c32": (64, 32, 64, 64, 3, 1),
    "stem": (8, 224, 3, 64, 7, 2),
}

_DEPTHWISE = {"dw56": (8, 56, 128), "dw14": (8, 14, 512)}  # batch, map, channels; 3x3 stride 1


def gemms(quick: bool) -> list[dict]:
    sizes = ((32, 48, 16), (64, 32, 40)) if quick else _GEMMS
    return [
        {"work": "product", "kind": "gemm", "name": f"{m} x {k} x {n}", "m": m, "k": k, "n": n}
        for m, k, n in sizes
    ]


def convolutions(quick: bool) -> list[dict]:
    layers = {"tiny3x3": (1, 6, 16, 16, 3, 1), "tiny5x5s2": (1, 7, 3, 8, 5, 2)} if quick else _CONVOLUTIONS
    return [_convolution(name, *layer) for name, layer in layers.items()]


def depthwise(quick: bool) -> list[dict]:
    layers = {"tinydw": (1, 6, 16)} if quick else _DEPTHWISE
    return [
        _convolution(name, batch, size, channels, channels, 3, 1) | {"depthwise": True}
        for name, (batch, size, channels) in layers.items()
    ]


def _convolution(name, batch, size, cin, cout, window, stride) -> dict:
    return {
        "work": "product",
        "kind": "conv",
        "name": name,
        "batch": batch,
        "size": size,
        "in": cin,
        "out": cout,
        "window": window,
        "stride": stride,
    }


def is_3x3_stride_1(case: dict) -> bool:
    return case["kind"] == "conv" and case["window"] == 3 and case["stride"] == 1


def operations(case: dict) -> int:
    """Multiplications and additions of one of the three products."""
    x, w, y = shapes(case)
    depth = int(np.prod(w[:-1])) if case["kind"] == "conv" else x[1]
    return 2 * int(np.prod(y)) * depth


def shapes(case: dict) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of x, w and dy: (M, K), (K, N), (M, N), or NHWC, HWIO, NHWC."""
    if case["kind"] == "gemm":
        m, k, n = case["m"], case["k"], case["n"]
        return (m, k), (k, n), (m, n)
    size, window, batch = case["size"], case["window"], case["batch"]
    rows = (size + 2 * (window // 2) - window) // case["stride"] + 1
    fan_in = 1 if case.get("depthwise") else case["in"]
    return (
        (batch, size, size, case["in"]),
        (window, window, fan_in, case["out"]),
        (batch, rows, rows, case["out"]),
    )


def arrays(case: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 x, w and dy, the same in every process; x is a ReLU's output if the case says nonnegative."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in shapes(case))
    x = np.maximum(x, 0) if case.get("nonnegative") else x
    return x, w / np.float32(np.sqrt(np.prod(w.shape[:-1]))), dy * np.float32(1e-3)
