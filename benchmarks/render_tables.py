"""Writes the markdown tables of all results, one set of columns for each processor.

python benchmarks/render_tables.py               prints them
python benchmarks/render_tables.py README.md     replaces what stands between the markers
                                                 <!-- benchmarks:begin --> and <!-- benchmarks:end -->
"""

import pathlib
import sys

from harness import results
from harness.results import number, table

_BEGIN, _END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

# Label, group, pass, contender of the geometric means.
_MEANS = (
    ("GEMM int8", "gemm", "forward", "jax/apt-8-8-8"),
    ("GEMM int16 x int8", "gemm", "forward", "jax/apt-16-8-8"),
    ("GEMM int24 x int8", "gemm", "forward", "jax/apt-24-8-8"),
    ("GEMM int16 x int16", "gemm", "forward", "jax/apt-16-16-16"),
    ("GEMM int8, forward + dX + dW", "gemm", "all", "jax/apt-8-8-8"),
    ("GEMM AQT int8", "gemm", "forward", "jax/aqt"),
    ("GEMM Qwix int8", "gemm", "forward", "jax/qwix"),
    ("GEMM torch._int_mm, operands already int8", "gemm", "forward", "torch/int_mm"),
    ("convolution 3x3 stride 1, f + dX + dW, int8", "conv 3x3 s1", "all", "jax/apt-8-8-8"),
    ("convolution 3x3 stride 1, int16 gradients", "conv 3x3 s1", "all", "jax/apt-8-8-16"),
    ("other convolutions, f + dX + dW, int8", "other conv", "all", "jax/apt-8-8-8"),
    ("other convolutions, int16 gradients", "other conv", "all", "jax/apt-8-8-16"),
    ("depthwise 3x3, f + dX + dW, int8", "depthwise", "all", "jax/apt-8-8-8"),
    ("depthwise 3x3, int16 gradients", "depthwise", "all", "jax/apt-8-8-16"),
)
_STEPS = {"jax/apt-8": "int8 gradients", "jax/apt-16": "int16", "jax/apt-24": "int24"}
_STEPS |= {
    "jax/qwix": "Qwix int8",
    "jax/apt-adaptive": "widths by APT, to nearest",
    "jax/apt-random": "widths by APT, at random",
}
_RECOMPUTED = {"jax/apt-adaptive": "", "jax/apt-adaptive-products": ", products again"}  # of memory
_ALLOCATORS = {"": "", "@tcmalloc_minimal": ", tcmalloc"}


def _means(documents: dict[str, dict]) -> dict[str, str]:
    """Label -> "vs XLA (least) / vs PyTorch (least)" of one processor."""
    found = {
        (m["group"], m["pass"], m["contender"], m["against"]): m
        for document in documents.values()
        for m in document["means"]
    }
    cells = {}
    for label, *key in _MEANS:
        pair = [found.get((*key, against)) for against in ("xla", "torch")]
        if any(pair):
            cells[label] = " / ".join(
                f"{number(m['geometric_mean'])} ({number(m['least'])})" if m else "-" for m in pair
            )
    return cells


def _steps(documents: dict[str, dict]) -> dict[str, str]:
    cells = {}
    for variant, where in _ALLOCATORS.items():
        document = documents.get(f"training_step_is_faster_than_float32{variant}", {})
        for row in document.get("rows", []):
            for name, label in _STEPS.items():
                if name in row["ratios"]:
                    ratio = row["ratios"][name]
                    cells[f"step {row['name']}, {label}{where}"] = (
                        f"{number(ratio.get('xla'))} / {number(ratio.get('torch'))}"
                    )
    return cells


def _memory_and_adaptation(documents: dict[str, dict]) -> dict[str, str]:
    cells = {}
    for row in documents.get("activations_take_less_memory", {}).get("rows", []):
        for name, label in _RECOMPUTED.items():
            if name in row["of_float32"]:
                cells[f"temporary memory of float32's, {row['name']}{label}"] = number(
                    row["of_float32"][name]
                )
    for row in documents.get("adaptation_costs_little", {}).get("rows", []):
        cells[f"cost of adaptation, {row['name']}"] = f"{100 * row['cost']:.1f} %"
    return cells


def _plain(documents: dict[str, dict]) -> dict[str, dict]:
    """Timings at the default settings: variants carry an @ in their file's name, accuracies no ceilings."""
    return {name: d for name, d in documents.items() if "@" not in name and "ceilings" in d}


def render(everything: dict[str, dict[str, dict]]) -> str:
    """The summary of all processors, then how each was measured."""
    columns, about = {}, []
    for key, every in everything.items():
        if documents := _plain(every):
            columns[key] = _means(documents) | _steps(every) | _memory_and_adaptation(documents)
            about.append(_about(key, documents))
    labels = list(dict.fromkeys(label for cells in columns.values() for label in cells))
    lines = [[label, *(cells.get(label, "-") for cells in columns.values())] for label in labels]
    note = (
        "How many times as fast as XLA's float32 (the better of two settings, row by row) / as PyTorch's; "
        "geometric means with the least row in parentheses. In rows with tcmalloc all contenders have it."
    )
    return "\n\n".join([note, table(["work", *columns], lines), "\n".join(about)])


def _about(key: str, documents: dict[str, dict]) -> str:
    newest = max(documents.values(), key=lambda document: (bool(document["ceilings"]), document["when"]))
    machine, versions = newest["machine"], newest["machine"]["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch") if versions.get(name))
    held = " (all contenders held to AVX2)" if newest.get("settings", {}).get("avx2") else ""
    ceilings = ", ".join(f"{name} {gops:.0f}" for name, gops in newest["ceilings"].items())
    return (
        f"- `{key}`: {machine['cpu']}, {machine['threads']} threads, ISA {machine['isa']}{held}, {software}, "
        f"{newest['when'][:10]}. Ceilings in Gop/s: {ceilings or 'not measured'}."
    )


def main(argv: list[str]) -> None:
    text = render(results.load_all())
    if not argv:
        print(text)
        return
    path = pathlib.Path(argv[0])
    before, begin, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{path} lacks the markers {_BEGIN} and {_END}")
    path.write_text(f"{before}{_BEGIN}\n\n{text}\n\n{_END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
