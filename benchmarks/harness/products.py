"""Rows of the product benchmarks: who takes part in a case, and the table of a document."""

from harness import cases
from harness.results import number, table

# jax_apt by the widths of X, W and dY, with the passes worth timing: the forward pass knows nothing of dY.
APT = {
    "apt-8-8-8": ["forward", "dX", "dW", "all"],
    "apt-8-8-16": ["dX", "dW", "all"],
    "apt-8-8-24": ["dX", "dW", "all"],
    "apt-16-8-8": ["forward"],
    "apt-24-8-8": ["forward"],
    "apt-16-16-16": ["forward"],
}
_OPERANDS = {"forward": (0, 1), "dX": (2, 1), "dW": (0, 2)}


def contenders(case: dict) -> dict[str, list[str]]:
    """Names by worker kind. Only a GEMM has wider forward products and the bare integer product."""
    names = list(APT) if case["kind"] == "gemm" else [n for n in APT if n.startswith("apt-8-8-")]
    peers = [] if case.get("depthwise") else ["qwix"]
    peers += ["aqt"] if case["kind"] == "gemm" else []
    return {
        "jax": ["float32", *names, *peers],
        "jax_ynn_off": ["float32"],
        "torch": ["float32", *(["int_mm"] if case["kind"] == "gemm" else [])],
    }


def group(case: dict) -> str:
    if case["kind"] == "gemm":
        return "gemm"
    if case.get("depthwise"):
        return "depthwise"
    return "conv 3x3 s1" if cases.is_3x3_stride_1(case) else "other conv"


def rows_of(case: dict, ms: dict, infos: dict) -> list[dict]:
    """One row for each pass, with what every contender took and how far it is from exact."""
    rows = []
    for one in ("forward", "dX", "dW", "all"):
        times = {name: value for (name, its), value in ms.items() if its == one}
        if not times:
            continue
        checks = {n: infos[n]["check"][one] for n in times if one in infos[n].get("check", {})}
        backends = {n: infos[n]["backend"] for n in times if "backend" in infos[n]}
        rows.append(
            {
                "group": group(case),
                "name": case["name"],
                "pass": one,
                "operations": cases.operations(case) * (3 if one == "all" else 1),
                "ms": times,
                "checks": checks,
                "backends": backends,
                "widths": {n: _widths(n, one) for n in times if "/apt-" in n and one != "all"},
            }
        )
    return rows


def _widths(name: str, one: str) -> tuple[int, int]:
    bits = [int(part) for part in name.split("-")[1:]]
    first, second = _OPERANDS[one]
    return bits[first], bits[second]


_COLUMNS = ("jax/float32", "jax_ynn_off/float32", "torch/float32")


def full_table(document: dict) -> str:
    """Every row of a document, one line for each contender of jax_apt or a quantized peer."""
    header = ["product", "pass", "contender", "ms", "XLA ms (default / off)", "PyTorch ms"]
    header += ["vs XLA", "vs PyTorch", "Gop/s", "ceiling", "integer error", "relative error"]
    lines = []
    for row in document["rows"]:
        xla = " / ".join(number(row["ms"].get(name), 3) for name in _COLUMNS[:2])
        for name in (n for n in row["ms"] if n not in _COLUMNS):
            ratio, check = row["ratios"][name], row["checks"].get(name, {})
            ceiling = (row.get("ceilings") or {}).get(name)
            lines.append(
                [
                    row["name"],
                    row["pass"],
                    name.partition("/")[2],
                    number(row["ms"][name], 3),
                    xla,
                    number(row["ms"].get("torch/float32"), 3),
                    number(ratio.get("xla")),
                    number(ratio.get("torch")),
                    number(row["gops"][name], 0),
                    number(ceiling["gops"], 0) if ceiling else "-",
                    number(check.get("integer_error"), 0),
                    f"{check['relative_error']:.1e}" if "relative_error" in check else "-",
                ]
            )
    return table(header, lines)


def must_be_exact(document: dict) -> None:
    """Raises if a result of jax_apt differs from the exact integers."""
    wrong = [
        f"{row['name']} {row['pass']} {name}: {check['integer_error']}"
        for row in document["rows"]
        for name, check in row["checks"].items()
        if "/apt-" in name and check["integer_error"] != 0
    ]
    if wrong:
        raise SystemExit("not exact:\n" + "\n".join(wrong))
