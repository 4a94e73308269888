"""Many processes: the example's launcher, on this machine, with Gloo between them."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "multi_process"


def run(program, folder, *options):
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, EXAMPLE / program, "--run", folder, *options]
    done = subprocess.run(
        [str(word) for word in command],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return done.stdout, lines


def test_a_run_that_lost_a_process_goes_on_and_ends_as_one_process_does(tmp_path):
    """Four processes; one is killed at step 15; two go on from the checkpoint of step 10."""
    steps = ("--steps", 25, "--threshold", 0.003)  # low, so that gradients soon take 16 bits
    _, alone = run("train.py", tmp_path / "alone", *steps)
    killed = ("--processes", 4, 2, "--kill", 1, "--kill-at", 15)
    output, lines = run("launch.py", tmp_path / "many", *steps, *killed)
    assert [line for line in output.splitlines() if "attempt" in line] == [
        "attempt 1: 4 processes",
        "attempt 2: 2 processes",
    ]
    assert {line["step"] for line in lines if line["processes"] == 4} >= set(range(10))
    assert [line["step"] for line in lines if line["processes"] == 2] == list(range(10, 25))
    many = list({line["step"]: line for line in lines}.values())
    assert [line["bits"] for line in many] == [line["bits"] for line in alone]
    assert max(map(max, (line["bits"] for line in alone))) > 8  # some tensor was widened
    np.testing.assert_allclose([m["loss"] for m in many], [a["loss"] for a in alone], rtol=1e-4)
