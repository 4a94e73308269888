"""A product's contenders in PyTorch: float32 (channels_last), and the bare product `torch._int_mm`."""

import os
import time
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from harness.cases import arrays
from harness.worker import Calls, UnavailableError


def build(case: dict, name: str) -> tuple[Calls, dict]:
    """Calls and info of a contender: float32, or int_mm on operands that are int8 already."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if name == "int_mm":
        return _int_mm(case)
    passes = _matrix_product(case) if case["kind"] == "gemm" else _convolution(case)
    return {one: passes[one] for one in case.get("passes", list(passes))}, {}


def _matrix_product(case: dict) -> Calls:
    x, w, dy = map(torch.from_numpy, arrays(case))
    wt, xt = w.T, x.T
    return {
        "forward": lambda: torch.mm(x, w),
        "dX": lambda: torch.mm(dy, wt),
        "dW": lambda: torch.mm(xt, dy),
        "all": lambda: (torch.mm(x, w), torch.mm(dy, wt), torch.mm(xt, dy)),
    }


def _convolution(case: dict) -> Calls:
    x, w, dy = arrays(case)
    x, dy = (_channels_last(np.transpose(a, (0, 3, 1, 2))) for a in (x, dy))
    w = _channels_last(np.transpose(w, (3, 2, 0, 1)))
    stride, pad = case["stride"], case["window"] // 2
    groups = case["in"] if case.get("depthwise") else 1
    backward = partial(
        torch.ops.aten.convolution_backward,
        *(dy, x, w, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups),
    )

    def forward():
        with torch.no_grad():
            return functional.conv2d(x, w, None, stride, pad, 1, groups)

    return {
        "forward": forward,
        "dX": lambda: backward([True, False, False]),
        "dW": lambda: backward([False, True, False]),
        "all": lambda: (forward(), backward([True, True, False])),
    }


def _channels_last(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.contiguous(memory_format=torch.channels_last)


def _int_mm(case: dict) -> tuple[Calls, dict]:
    """int8 x int8 -> int32, forward alone; the faster of the two layouts of its second operand."""
    if case["kind"] != "gemm":
        raise UnavailableError("torch._int_mm is a matrix product")
    rng = np.random.default_rng(0)
    shapes = (case["m"], case["k"]), (case["k"], case["n"])
    x, w = (rng.integers(-127, 128, shape, np.int8) for shape in shapes)
    left, right = torch.from_numpy(x), torch.from_numpy(w)
    layouts = [right, right.T.contiguous().T]
    try:
        exact = torch._int_mm(left, right).numpy()
    except RuntimeError as error:
        raise UnavailableError(str(error)) from None
    right = min(layouts, key=lambda layout: _seconds(left, layout))
    difference = np.abs(np.float64(x) @ np.float64(w) - exact).max()
    return {"forward": lambda: torch._int_mm(left, right)}, {
        "check": {"forward": {"integer_error": float(difference)}}
    }


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    torch._int_mm(left, right)
    start = time.perf_counter()
    for _ in range(5):
        torch._int_mm(left, right)
    return time.perf_counter() - start
