"""Claim: after the initial phase, measuring errors and adjusting widths costs at most 3 % of a step.

    python benchmarks/adaptation_costs_little.py [--help]

Four steps of one network at the widths it has reached: without any statistics; with the machinery, no tensor
due; all tensors due; and live, as training goes on. `cost` weighs the third by the share of tensors that was
due in steps after the initial phase; `live` times them as they come, with the noise of when they come.
"""

from harness import command, networks, steps


def main() -> None:
    args = command.options(__doc__ or "", rounds=9, block_ms=200)
    chosen = [case for case in networks.steps(args.quick) if "batch 64" not in case["name"]]
    cases = [case | {"adaptation": 4 if args.quick else 40} for case in chosen]

    def contenders(case):
        return {"jax": ["apt-adaptive"]}

    document = command.run("adaptation_costs_little", args, cases, contenders, steps.adaptation_rows)
    print(steps.adaptation_table(document))


if __name__ == "__main__":
    main()
