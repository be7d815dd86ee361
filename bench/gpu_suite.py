"""The device suite's driver: runs every check on a GPU machine and prints one table. See .ci/gpu.sh.

Needs the packed programs beside this file, a driver, and torch 2.11.0. A check that has no time left is told as left out.
With --rehearse it runs on a processor in a tiny size: that shows that the driver works, and nothing else.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
# Whoever lends a GPU ends a command after ten minutes.
BUDGET_S = 480.0
PEERS = ("eager", "tuned", "graph", "compile", "compile-graph")


class Suite:
    def __init__(self, arguments):
        self.rehearses = arguments.rehearse
        self.device = "cpu" if self.rehearses else "cuda:0"
        self.ends_at = time.monotonic() + arguments.seconds
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="takuma-gpu-"))
        self.address = None
        self.started = []
        self.has_failed = False

    def row(self, check, figure, failed=False):
        self.has_failed |= failed
        print(f"| {check} | {figure} |", flush=True)

    def run(self, command, limit_s, **more):
        """The finished process; None if its time, or all of it, is over."""
        limit_s = min(limit_s, self.ends_at - time.monotonic())
        if limit_s <= 1:
            return None
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, **more)
        except subprocess.TimeoutExpired:
            return None

    def takuma(self, *arguments, limit_s=60):
        return self.run([HERE / "takuma", "--coordinator", self.address, *arguments], limit_s)

    def json(self, *arguments):
        ran = self.takuma(*arguments, "-o", "json")
        return json.loads(ran.stdout) if ran and ran.returncode == 0 else None

    def wait(self, what, poll, limit_s):
        until = min(time.monotonic() + limit_s, self.ends_at)
        while time.monotonic() < until:
            found = poll()
            if found:
                return found
            time.sleep(0.2)
        raise TimeoutError(f"{what}: not within {limit_s:.0f} s")

    def start(self, name, *command):
        log = open(self.home / f"{name}.log", "w")
        process = subprocess.Popen(command, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def start_cluster(self, name, devices):
        """A coordinator and a worker on each of `devices` that is idle, so that no run pays for loading CUDA."""
        file, store = self.home / f"{name}.address", self.home / name
        self.start(f"{name}-coordinator", HERE / "takuma-coordinator", "--listen", "127.0.0.1:0",
                   "--store", store, "--address-file", file)
        self.address = self.wait("the coordinator", lambda: file.exists() and file.read_text().strip(), 20)
        processes = [
            self.start(f"{name}-{number}", HERE / "takuma-worker", "--coordinator", self.address, "--device",
                       device, "--name", f"w{number}")
            for number, device in enumerate(devices)
        ]
        def idle():
            known = self.json("worker", "ls") or []
            return sum(worker["status"] == "idle" for worker in known) == len(devices)
        self.wait("idle workers", idle, 90)
        return store, processes

    def stop_cluster(self):
        for process in self.started:
            process.send_signal(signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        self.started = []

    def last_words(self, *names):
        """The ends of logs, for whoever has to find out."""
        for name in names:
            lines = (self.home / f"{name}.log").read_text(errors="replace").splitlines()
            print("\n".join(f"{name}: {line}" for line in lines[-6:]), file=sys.stderr)


def machine(suite):
    card = suite.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], 20) \
        if not suite.rehearses else None
    suite.row("card", card.stdout.strip() if card else suite.device)
    listed = suite.run([HERE / "takuma-worker", "devices", "--json"], 90)
    seen = json.loads(listed.stdout) if listed and listed.returncode == 0 else {"devices": [], "cuda": {}}
    usable = any(one["name"] == suite.device and one["usable"] for one in seen["devices"])
    said = f"{seen['cuda'].get('driver')} / {seen['cuda'].get('runtime')}" if usable else json.dumps(seen["cuda"])
    suite.row("load order: the worker sees the device (driver's and runtime's CUDA)", said, failed=not usable)
    return usable


def tests(suite):
    listed = suite.run([HERE / "device-suite", "--list"], 60)
    names = [line.removesuffix(": test") for line in (listed.stdout if listed else "").splitlines() if line.endswith(": test")]
    if not names:
        suite.row("device suite", f"lists no test: {listed.stderr.strip() if listed else 'no answer'}", failed=True)
    environment = {**os.environ, "TAKUMA_DEVICE_SUITE": "" if suite.rehearses else "required"}
    for name in names:
        ran = suite.run([HERE / "device-suite", "--exact", name, "--nocapture"], 90, env=environment)
        if ran is None:
            suite.row(name, "not ended in its time", failed=True)
            continue
        well = "skipped" if "skipped: " in ran.stdout + ran.stderr else "ok"
        suite.row(name, well if ran.returncode == 0 else "FAILED", failed=ran.returncode != 0)
        for line in ran.stdout.splitlines():
            if line.startswith("| "):
                print(line, flush=True)
        if ran.returncode != 0:
            told = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
            print("\n".join(told[:12]), file=sys.stderr)


def cards(suite):
    """How many GPUs the workers see."""
    listed = suite.run([HERE / "takuma-worker", "devices", "--json"], 90)
    devices = json.loads(listed.stdout)["devices"] if listed and listed.returncode == 0 else []
    return sum(one["name"].startswith("cuda:") and one["usable"] for one in devices)


def pair(suite, data, name, check, devices, steps):
    """Two workers train together; one is killed, the other goes on."""
    try:
        _, workers = suite.start_cluster(name, devices)
        submitted = suite.takuma("run", "submit", "dcgan-tiny", "--name", name, "--data", data, "--steps", str(steps),
                                 "--workers", "2", "-y", "-d")
        if not submitted or submitted.returncode != 0:
            raise RuntimeError(submitted.stderr.strip() if submitted else "no answer")
        suite.wait("step 30", lambda: (suite.json("run", "show", name) or {}).get("step", 0) >= 30, 60)
        workers[1].kill()
        if (suite.json("run", "show", name) or {}).get("status") == "succeeded":
            raise RuntimeError(f"{steps} steps were over before anybody was killed")
        ended = suite.takuma("run", "wait", name, limit_s=90)
        audited = suite.takuma("run", "audit", name)
        well = all(ran and ran.returncode == 0 for ran in (ended, audited))
        suite.row(check, f"{steps} steps, audit clean" if well else "FAILED", failed=not well)
        if not well:
            suite.last_words(f"{name}-coordinator", f"{name}-0")
    except (TimeoutError, RuntimeError) as error:
        suite.row(check, f"FAILED: {error}", failed=True)
        suite.last_words(f"{name}-coordinator", f"{name}-0", f"{name}-1")
    finally:
        suite.stop_cluster()


def exact_on_one_card(suite, data):
    """Exact mode by one worker and by two that share the card."""
    recipe = "dcgan-tiny" if suite.rehearses else "dcgan-celeba"
    check = f"exact mode, 20 steps of {recipe}: one worker and two on one GPU"
    try:
        suite.start_cluster("exact", [suite.device] * 2)
        digests = []
        for workers in ("1", "2"):
            name = f"exact-{workers}"
            ran = suite.takuma("run", "submit", recipe, "--name", name, "--data", data, "--steps", "20", "--exact",
                               "--workers", workers, "-y", "--wait", limit_s=60)
            if not ran or ran.returncode != 0:
                raise RuntimeError(ran.stderr.strip() if ran else "no answer")
            digests.append((suite.json("run", "show", name) or {}).get("weights_sha256"))
        same = digests[0] and digests[0] == digests[1]
        suite.row(check, f"one SHA-256, {digests[0][:16]}..." if same else f"FAILED: {digests}", failed=not same)
    except (TimeoutError, RuntimeError) as error:
        suite.row(check, f"FAILED: {error}", failed=True)
        suite.last_words("exact-coordinator", "exact-0", "exact-1")
    finally:
        suite.stop_cluster()


def full_run(suite, store, data, precision, limit_s):
    name, steps = f"full-{precision}", "20" if suite.rehearses else "6330"
    recipe = "dcgan-tiny" if suite.rehearses else "dcgan-celeba"
    check = f"{steps} iterations of {recipe}, {precision}"
    ran = suite.takuma("run", "submit", recipe, "--name", name, "--data", data, "--steps", steps, "--precision",
                       precision, "--workers", "1", "-y", "--wait", limit_s=limit_s)
    if ran is None or ran.returncode != 0:
        suite.takuma("run", "stop", name)
        suite.row(check, "not ended in its time" if ran is None else "FAILED", failed=True)
        print((ran.stderr if ran else "")[-800:], file=sys.stderr)
        return
    view, folder = suite.json("run", "show", name), store / "runs" / name
    grids = len(list(folder.glob("samples/step-*.png")))
    checkpoints = len(list(folder.glob("checkpoints/step-*/manifest.json")))
    suite.row(check, f"{view['elapsed_s']:.1f} s, {grids} grids, {checkpoints} checkpoints")


def peers(suite):
    """PyTorch on the same card. Its compiler needs a C compiler; where one is missing the variant is told as left out."""
    for variant in PEERS:
        command = [sys.executable, HERE / "gpu_peers.py", "--variants", variant]
        if suite.rehearses:
            command = [sys.executable, HERE / "gpu_peers.py", "--self-test", "--variants", "eager"]
        ran = suite.run(command, 75)
        told = ran.stdout.strip().splitlines()[-1:] if ran and ran.returncode == 0 else None
        reason = "no time" if ran is None else (ran.stderr.strip().splitlines() or ["no word"])[-1][:160]
        suite.row(f"PyTorch, {variant}", told[0] if told else f"not measured: {reason}")
        if suite.rehearses:
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=BUDGET_S)
    parser.add_argument("--rehearse", action="store_true", help="on a processor, in a tiny size")
    suite = Suite(parser.parse_args())
    print("| check | figure |\n|---|---|")
    try:
        if not machine(suite):
            return 1
        tests(suite)
        data, images = suite.home / "faces", "640" if suite.rehearses else "202599"
        drawn = suite.run([HERE / "takuma", "dataset", "synth", data, "--count", images], 120)
        if not drawn or drawn.returncode != 0:
            suite.row("dataset", "FAILED" if drawn else "not drawn in its time", failed=True)
            return 1
        check = "two workers on one GPU over the ring; one is killed, the other goes on"
        pair(suite, data, "pair", check, [suite.device] * 2, 300)
        check = "two GPUs hand over whole steps; one's worker is killed, the other goes on"
        if cards(suite) >= 2:
            # Long enough that somebody can be killed in the middle: a step takes a millisecond or two.
            pair(suite, data, "cards", check, ["cuda:0", "cuda:1"], 20000)
        else:
            suite.row(check, "skipped: it needs two GPUs")
        exact_on_one_card(suite, data)
        store, _ = suite.start_cluster("full", [suite.device])
        full_run(suite, store, data, "bf16", 90)
        peers(suite)
        for precision in ("tf32", "f32"):
            full_run(suite, store, data, precision, 120)
    except TimeoutError as error:
        suite.row("suite", f"FAILED: {error}", failed=True)
    finally:
        suite.stop_cluster()
    return int(suite.has_failed)


if __name__ == "__main__":
    sys.exit(main())
