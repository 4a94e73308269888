"""Claim: a training step that keeps integer codes needs at most half the temporary memory of float32's.

    python benchmarks/activations_take_less_memory.py [--help]

XLA's own account of the compiled step; nothing is timed. jax_apt computes elementwise functions and products
of short sums again in the backward pass, "products" every product. "remat": float32 keeps only what products
return.
"""

from harness import command, networks, steps


def main() -> None:
    args = command.options(__doc__ or "", rounds=1, block_ms=1)
    cases = [case | {"memory_only": True} for case in networks.steps(args.quick)]

    def contenders(case):
        names = ["float32", "float32-remat", "apt-8", "apt-adaptive", "apt-adaptive-products"]
        return {"jax": names, "jax_ynn_off": ["float32", "float32-remat"]}

    document = command.run("activations_take_less_memory", args, cases, contenders, steps.memory_rows)
    print(steps.memory_table(document))


if __name__ == "__main__":
    main()
