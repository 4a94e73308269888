"""Claim: fixed-point depthwise convolutions are exact and faster than float32's.

python benchmarks/depthwise_is_faster_than_float32.py [--help]
"""

import sys

from harness import cases, command, products


def main() -> None:
    args = command.options(__doc__ or "", rounds=7, block_ms=20)
    document = command.run(
        "depthwise_is_faster_than_float32",
        args,
        cases.depthwise(args.quick),
        products.contenders,
        products.rows_of,
    )
    print(products.full_table(document))
    products.must_be_exact(document)


if __name__ == "__main__":
    sys.exit(main())
