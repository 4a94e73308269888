"""Claim: whole training steps in fixed point, at the widths that APT chooses, are faster than float32's.

python benchmarks/training_step_is_faster_than_float32.py [--help]
"""

from harness import command, networks, steps


def main() -> None:
    args = command.options(__doc__ or "", rounds=7, block_ms=100)
    cases = networks.steps(args.quick)
    if args.every_width:
        cases = [case | {"contenders": steps.EVERY_WIDTH} for case in cases]
    document = command.run(
        "training_step_is_faster_than_float32", args, cases, steps.contenders, steps.rows_of
    )
    print(steps.step_table(document))


if __name__ == "__main__":
    main()
