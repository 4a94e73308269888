"""Rows and tables of whole training steps, their memory and the cost of adaptation."""

from harness import results
from harness.results import number, table

EVERY_WIDTH = ["apt-8", "apt-16", "apt-24", "apt-adaptive", "apt-random", "qwix"]


def contenders(case: dict) -> dict[str, list[str]]:
    """Names by worker kind."""
    return {"jax": ["float32", *case["contenders"]], "jax_ynn_off": ["float32"], "torch": ["float32"]}


def rows_of(case: dict, ms: dict, infos: dict) -> list[dict]:
    times = {name: value for (name, one), value in ms.items() if one == "step"}
    about = {n: {k: v for k, v in info.items() if k != "passes"} for n, info in infos.items()}
    return [{"group": "step", "name": case["name"], "pass": "step", "ms": times, "about": about}]


def step_table(document: dict) -> str:
    header = ["step", "contender", "ms", "XLA ms (default / off)", "PyTorch ms", "vs XLA", "vs PyTorch"]
    header += ["gradients of each width", "compiling s (float32)"]
    lines = []
    for row in document["rows"]:
        xla = " / ".join(number(row["ms"].get(name), 1) for name in results.XLA)
        for name in (n for n in row["ms"] if n not in (*results.XLA, results.TORCH)):
            ratio, about = row["ratios"][name], row["about"][name]
            widths = about.get("gradient_widths", {})
            lines.append(
                [
                    row["name"],
                    name.partition("/")[2],
                    number(row["ms"][name], 1),
                    xla,
                    number(row["ms"].get(results.TORCH), 1),
                    number(ratio.get("xla")),
                    number(ratio.get("torch")),
                    ", ".join(f"{count} x {bits}" for bits, count in widths.items()) or "-",
                    f"{_seconds(about)} ({_seconds(row['about'].get(results.XLA[0], {}))})",
                ]
            )
    return table(header, lines)


def _seconds(about: dict) -> str:
    return number(about.get("compile_seconds"), 1)


# Memory


def memory_rows(case: dict, ms: dict, infos: dict) -> list[dict]:
    """Temporary memory of the compiled step: what lives beside parameters, optimizer state and batch."""
    memory = {name: info["memory"] for name, info in infos.items() if "memory" in info}
    temp = {name: sizes["temp"] for name, sizes in memory.items()}
    least = min(temp[name] for name in results.XLA if name in temp)
    return [
        {
            "group": "memory",
            "name": case["name"],
            "pass": "step",
            "ms": {},
            "memory": memory,
            "of_float32": {name: size / least for name, size in temp.items()},
        }
    ]


def memory_table(document: dict) -> str:
    header = ["step", "contender", "temporary MB", "of float32 (the better setting)", "arguments MB"]
    lines = [
        [
            row["name"],
            name,
            number(m["temp"] / 1e6, 1),
            number(row["of_float32"][name]),
            number(m["argument"] / 1e6, 1),
        ]
        for row in document["rows"]
        for name, m in row["memory"].items()
    ]
    return table(header, lines)


# Adaptation


def adaptation_rows(case: dict, ms: dict, infos: dict) -> list[dict]:
    """Cost of QEM and QPA: what a step always pays, and what its share of due tensors adds."""
    name = "jax/apt-adaptive"
    still, none, everything = (ms[name, one] for one in ("still", "none due", "all due"))
    rate = infos[name]["update_rate"]
    return [
        {
            "group": "adaptation",
            "name": case["name"],
            "pass": "step",
            "ms": {name: ms[name, "step"]},
            "passes_ms": {one: value for (_, one), value in ms.items()},
            "update_rate": rate,
            "counted_steps": infos[name]["counted_steps"],
            "gradient_widths": infos[name]["gradient_widths"],
            "always": none / still - 1,
            "cost": (none + rate * (everything - none)) / still - 1,
            "live": ms[name, "step"] / still - 1,
        }
    ]


def adaptation_table(document: dict) -> str:
    header = ["step", "without ms", "none due ms", "all due ms", "live ms", "tensors due per step"]
    header += ["always", "cost", "live cost"]
    lines = [
        [
            row["name"],
            *(number(row["passes_ms"][one], 1) for one in ("still", "none due", "all due", "step")),
            *(f"{100 * row[what]:.1f} %" for what in ("update_rate", "always", "cost", "live")),
        ]
        for row in document["rows"]
    ]
    return table(header, lines)
