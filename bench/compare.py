"""Seconds an iteration of takuma and of PyTorch, measured in turns in one run on one machine.

Called by bench/run.sh. Machines are noisy, so every contender runs once a round, in rounds (A B C, A B C, ...),
each time in fresh processes; the figure is the median over all its measured iterations. takuma runs as its users
run it: `takuma up`, `takuma run submit`, and `step_s` from the run's metrics.jsonl.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

HERE = pathlib.Path(__file__).resolve().parent
TAKUMA = HERE.parent / "target" / "release" / "takuma"
IMAGES = 2048
READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
# Generous for a slow machine at 20 s an iteration; a hang still ends.
SECONDS_PER_STEP_AT_MOST = 30
NEVER = "1000000"


class BenchError(Exception):
    """One sentence for the person at the terminal."""


@dataclass
class Contender:
    """One row: a way to run the same iteration on the same two cores."""

    name: str
    program: str
    processes: int
    threads: int
    variant: str = ""
    steps_s: list = field(default_factory=list)


def contenders():
    return [
        Contender("takuma, 1 worker x 2 threads", "takuma", 1, 2),
        Contender("PyTorch eager naive, 2 threads", "torch", 1, 2, "naive"),
        Contender("PyTorch eager tuned, 2 threads", "torch", 1, 2, "tuned"),
        Contender("takuma, 2 workers x 1 thread", "takuma", 2, 1),
        Contender("PyTorch DDP+Gloo naive, 2 x 1 thread", "torch", 2, 1, "naive"),
        Contender("PyTorch DDP+Gloo tuned, 2 x 1 thread", "torch", 2, 1, "tuned"),
    ]


def run(command, env, timeout_s):
    """Standard output of `command`; a BenchError with the end of its messages when it fails."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{' '.join(map(str, command))} took longer than {timeout_s} s") from error
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise BenchError(f"{' '.join(map(str, command))} ended with code {done.returncode}:\n{said}")
    return done.stdout


def torch_steps(contender, args):
    """Seconds of each measured iteration of PyTorch."""
    command = [sys.executable, HERE / "peer.py", "--variant", contender.variant]
    options = {
        "processes": contender.processes,
        "threads": contender.threads,
        "batch": args.batch,
        "steps": args.steps,
        "warmup": args.warmup,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    timeout_s = 120 + SECONDS_PER_STEP_AT_MOST * (args.steps + args.warmup)
    return json.loads(run(command, dict(os.environ), timeout_s).splitlines()[-1])["steps_s"]


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def wait_for_workers(contender, env, up, log):
    """Returns once all workers have joined."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if up.poll() is not None:
            raise BenchError(f"takuma up ended with code {up.returncode}:\n{log.read_text()[-2000:]}")
        listed = subprocess.run(
            [TAKUMA, "worker", "ls", "-o", "json"], env=env, capture_output=True, text=True, timeout=READY_TIMEOUT_S
        )
        if listed.returncode == 0 and len(json.loads(listed.stdout)) >= contender.processes:
            return
        time.sleep(0.2)
    raise BenchError(f"{contender.processes} workers did not join in {READY_TIMEOUT_S} s:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def cluster(contender, folder, env):
    """A running `takuma up` whose store is `folder`; stopped at the end."""
    log = folder.with_suffix(".log")
    address = free_address()
    env = env | {"TAKUMA_COORDINATOR": address}
    command = [TAKUMA, "up", "--workers", str(contender.processes), "--threads", str(contender.threads)]
    command += ["--store", folder.as_uri(), "--listen", address]
    with log.open("w") as sink:
        up = subprocess.Popen(command, env=env, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
        try:
            wait_for_workers(contender, env, up, log)
            yield env
        finally:
            up.send_signal(signal.SIGINT)
            try:
                up.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                print(f"warning: takuma up did not stop in {STOP_TIMEOUT_S} s and was killed", file=sys.stderr)
                up.kill()
                up.wait()


def takuma_steps(contender, args, folder, data, env):
    """`step_s` of each measured iteration of a run through a real cluster."""
    folder.mkdir()
    steps = args.steps + args.warmup
    submit = [TAKUMA, "run", "submit", "dcgan-celeba", "--data", data, "--steps", str(steps)]
    submit += ["--global-batch", str(args.batch), "--workers", str(contender.processes), "--name", "bench"]
    submit += ["--sample-every", NEVER, "--checkpoint-every", NEVER, "-y", "--wait"]
    with cluster(contender, folder, env) as inside:
        run(submit, inside, 120 + SECONDS_PER_STEP_AT_MOST * steps)
    found = sorted(folder.glob("runs/*/metrics.jsonl"))
    if len(found) != 1:
        raise BenchError(f"expected one runs/*/metrics.jsonl in {folder}, found {len(found)}")
    lines = [json.loads(line) for line in found[0].read_text().splitlines()]
    if len(lines) != steps:
        raise BenchError(f"{found[0]} has {len(lines)} lines for {steps} steps")
    return [line["step_s"] for line in lines[args.warmup :]]


def measure_all(rows, args):
    """Fill `steps_s` of every row, in rounds."""
    with tempfile.TemporaryDirectory(prefix="takuma-bench-") as made:
        temporary = pathlib.Path(made)
        # The context saved by `takuma up` belongs to the user: keep this run's apart.
        env = dict(os.environ) | {"HOME": made, "XDG_CONFIG_HOME": made, "XDG_STATE_HOME": made, "NO_COLOR": "1"}
        data = (temporary / "faces").as_uri()
        if any(row.program == "takuma" for row in rows):
            run([TAKUMA, "dataset", "synth", data, "--count", str(IMAGES)], env, 300)
        for number in range(args.rounds):
            for index, row in enumerate(rows):
                if row.program == "takuma":
                    steps = takuma_steps(row, args, temporary / f"store-{number}-{index}", data, env)
                else:
                    steps = torch_steps(row, args)
                row.steps_s += steps
                print(f"round {number + 1}/{args.rounds}  {row.name:38s} {statistics.median(steps):.3f} s", file=sys.stderr)


def ratio(row, peer_steps):
    return f"{statistics.median(peer_steps) / statistics.median(row.steps_s):.2f}x"


def table(rows, args):
    """The rows, and how many times faster takuma is than each peer with the same processes."""
    lines = [f"dcgan-celeba, batch {args.batch}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores; "]
    lines[0] += f"median of {args.rounds} rounds x {args.steps} iterations, {args.warmup} before each"
    lines.append(f"{'':38s} {'s/it':>8s} {'min':>8s} {'it/s':>8s} {'img/s':>8s}")
    for row in rows:
        median = statistics.median(row.steps_s)
        figures = f"{median:8.3f} {min(row.steps_s):8.3f} {1 / median:8.3f} {args.batch / median:8.1f}"
        lines.append(f"{row.name:38s} {figures}")
    for row in (row for row in rows if row.program == "takuma"):
        for peer in rows:
            if peer.program != "takuma" and peer.processes == row.processes:
                lines.append(f"{row.name} is {ratio(row, peer.steps_s)} as fast as {peer.name}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured iterations a round")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before them")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", default="", help="only contenders whose name holds this text")
    parser.add_argument("--out", type=pathlib.Path, help="also write all figures as JSON to this file")
    args = parser.parse_args()
    rows = [row for row in contenders() if args.only in row.name]
    if not rows:
        parser.error(f"--only {args.only!r} matches none of: {', '.join(row.name for row in contenders())}")
    try:
        measure_all(rows, args)
    except BenchError as error:
        sys.exit(f"error: {error}")
    print(table(rows, args))
    if args.out:
        figures = [{"name": row.name, "median_s": statistics.median(row.steps_s), "steps_s": row.steps_s} for row in rows]
        at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"at": at, "machine": platform.platform(), "cores": os.cpu_count(), "batch": args.batch, "rows": figures}
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
