"""Starts the processes of a run on this machine; after one dies, stops the others and starts again.

    python launch.py --run /tmp/run --processes 4            four processes
    python launch.py --run /tmp/run --processes 4 2          if one dies, go on with two from the checkpoint
    python launch.py --run /tmp/run --processes 4 2 --kill 1 --kill-at 25      see it happen

A process that died cannot rejoin `jax.distributed`, and the others would wait for it: all start anew. On many
machines a scheduler (SLURM, Kubernetes) plays this part; see docs/devices.md. Other options go to `train.py`.
"""

import argparse
import pathlib
import socket
import subprocess
import sys
import time

TRAIN = pathlib.Path(__file__).with_name("train.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="folder for checkpoint and log")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="of each attempt in turn")
    parser.add_argument("--kill", type=int, default=0, help="process that dies in the first attempt")
    parser.add_argument("--kill-at", type=int, help="step at which it dies")
    args, rest = parser.parse_known_args()
    args.run.mkdir(parents=True, exist_ok=True)
    for attempt, count in enumerate(args.processes):
        victim = args.kill if attempt == 0 and args.kill_at is not None else None
        print(f"attempt {attempt + 1}: {count} processes", flush=True)
        if run(start(args.run, count, rest, victim, args.kill_at)):
            return 0
    print("no attempts are left", flush=True)
    return 1


def start(folder, count: int, rest: list[str], victim: int | None, kill_at) -> list[subprocess.Popen]:
    coordinator = f"127.0.0.1:{free_port()}"
    processes = []
    for i in range(count):
        command = [sys.executable, TRAIN, "--run", folder, "--process", i, "--processes", count]
        command += ["--coordinator", coordinator, *rest, *(["--kill-at", kill_at] if i == victim else [])]
        processes.append(subprocess.Popen([str(word) for word in command]))
    return processes


def run(processes: list[subprocess.Popen]) -> bool:
    """Waits until all are done, True, or one has failed, False."""
    try:
        while True:
            codes = [p.poll() for p in processes]
            failed = [i for i, code in enumerate(codes) if code]
            if failed:
                print(f"process {failed[0]} ended with {codes[failed[0]]}", flush=True)
                return False
            if all(code == 0 for code in codes):
                return True
            time.sleep(0.05)
    finally:
        for p in processes:
            p.kill()
            p.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
