"""Time Gloo's all-reduce between processes on loopback: the peer of takuma's ring.

    bench/.venv/bin/python bench/gloo.py [--processes 2] [--threads 1]

Prints one JSON line a size: `bytes`, `median_s`, `min_s`, and `bus_gb_per_s` = 2 (n - 1) / n x bytes / median
seconds, the traffic that each process must send whatever the algorithm. Times are those of the slowest rank.
"""

import argparse
import json
import os
import socket
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MEGABYTE = 1_000_000
# (bytes, calls): 4 KB shows latency; 20 MB is one generator exchange, 64 MB one whole iteration.
SIZES = [(4096, 500), (20 * MEGABYTE, 30), (64 * MEGABYTE, 15)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def times_of(payload, calls):
    """Seconds of each all-reduce of `payload`, the slowest rank's, after a warm-up."""
    for _ in range(3):
        dist.all_reduce(payload)
        payload.zero_()
    seconds = []
    for _ in range(calls):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(payload)
        seconds.append(time.perf_counter() - begin)
        payload.zero_()
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def check_sum(rank, processes):
    """Fails unless the all-reduce really sums over all ranks."""
    values = torch.full((1000,), float(rank + 1))
    dist.all_reduce(values)
    expected = processes * (processes + 1) / 2
    if not bool((values == expected).all()):
        raise RuntimeError(f"all-reduce gave {values[0].item()}, expected {expected}")


def run(rank, processes, threads, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    check_sum(rank, processes)
    for size_bytes, calls in SIZES:
        seconds = times_of(torch.zeros(size_bytes // 4), calls)
        if rank == 0:
            median = statistics.median(seconds)
            moved = 2 * (processes - 1) / processes * size_bytes
            line = {
                "name": f"gloo all-reduce {size_bytes} bytes, {processes} processes x {threads} thread(s)",
                "bytes": size_bytes,
                "median_s": round(median, 7),
                "min_s": round(min(seconds), 7),
                "bus_gb_per_s": round(moved / median / 1e9, 3),
            }
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    args = parser.parse_args()
    mp.spawn(run, args=(args.processes, args.threads, free_port()), nprocs=args.processes)


if __name__ == "__main__":
    main()
