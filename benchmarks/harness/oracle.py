"""Exact products of integer codes in float64: every sum of a benchmark's sizes stays below 2**53.

Another algorithm than the kernels': one matrix product for each tap of the filter.
"""

import numpy as np


def products(case: dict, x, w, dy) -> dict[str, np.ndarray]:
    """forward, dX and dW of integer-valued arrays, as float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    if case["kind"] == "gemm":
        return {"forward": x @ w, "dX": dy @ w.T, "dW": x.T @ dy}
    return _convolution(case, x, w, dy)


def _convolution(case: dict, x, w, dy) -> dict[str, np.ndarray]:
    """NHWC x HWIO; groups are 1 or the number of channels."""
    window, stride = case["window"], case["stride"]
    pad, (rows, columns) = window // 2, dy.shape[1:3]
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out, d_padded, d_w = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(w.shape)
    for i, j in np.ndindex(window, window):
        place = np.s_[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        seen = padded[place]
        if case.get("depthwise"):
            out += seen * w[i, j, 0]
            d_padded[place] += dy * w[i, j, 0]
            d_w[i, j, 0] = (seen * dy).sum((0, 1, 2))
        else:
            out += seen @ w[i, j]
            d_padded[place] += dy @ w[i, j].T
            d_w[i, j] = np.tensordot(seen, dy, ((0, 1, 2), (0, 1, 2)))
    size = x.shape[1]
    return {"forward": out, "dX": d_padded[:, pad : pad + size, pad : pad + size], "dW": d_w}
