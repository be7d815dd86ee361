"""Time PyTorch on the dcgan-celeba iteration: eager, and DistributedDataParallel over Gloo on loopback.

    bench/.venv/bin/python bench/peer.py --variant naive|tuned [--threads 2] [--batch 64] [--channels 64]
    bench/.venv/bin/python bench/peer.py --variant naive|tuned --processes 2 --threads 1

Prints one JSON line. `--batch` is the global batch; each process takes an equal part of it. A step's time holds
what a training loop holds: uint8 images to floats, fresh noise, the three updates, reading the losses.

What DDP does here, and does not:
* `broadcast_buffers=False`. With the default, D's two forward passes before one backward pass fail since
  PyTorch 2.6 (pytorch issue 175024), because the second pass overwrites the running statistics in place.
* Batch statistics are each process's own: `torch.nn.SyncBatchNorm` does not run on CPU. takuma synchronises
  them, so it does more work than this peer.
* naive: in G's updates DDP also exchanges D's gradients, which nobody uses, as in any plain GAN under DDP.
  tuned: D is frozen there, so they are neither computed nor exchanged; gradients live in DDP's buckets.
"""

import argparse
import json
import os
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import dcgan
from gloo import free_port

IMAGES_IN_MEMORY = 512


def wrapper(args):
    """What goes around each network: nothing with one process, DDP otherwise."""
    if args.processes == 1:
        return lambda module: module
    tuned = args.variant == "tuned"
    return lambda module: DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=tuned)


def step_seconds(args, rank):
    """Seconds of each measured iteration in this process, and the last report's losses."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = dcgan.build(args.channels, args.variant, wrapper(args))
    torch.manual_seed(1 + rank)
    images_u8 = torch.randint(0, 256, (IMAGES_IN_MEMORY, 64, 64, 3), dtype=torch.uint8)
    layout = torch.channels_last if args.variant == "tuned" else torch.contiguous_format
    batch = args.batch // args.processes
    iteration = dcgan.ITERATIONS[args.variant]
    seconds = []
    for _ in range(args.warmup + args.steps):
        begin = time.perf_counter()
        picked = images_u8[torch.randint(IMAGES_IN_MEMORY, (batch,))].permute(0, 3, 1, 2)
        reals = (picked.float() / 127.5 - 1).contiguous(memory_format=layout)
        z = torch.rand(batch, 100) * 2 - 1
        report = iteration(models, reals, z)
        losses = report.d_loss.item(), report.g_loss.item(), report.d_acc.item()
        seconds.append(time.perf_counter() - begin)
    return seconds[args.warmup :], losses


def print_line(args, seconds, losses):
    kind = "eager" if args.processes == 1 else "DDP+Gloo"
    median = statistics.median(seconds)
    line = {
        "name": f"PyTorch {torch.__version__} {kind} {args.variant}, {args.processes} x {args.threads} thread(s)",
        "variant": args.variant,
        "processes": args.processes,
        "threads": args.threads,
        "batch": args.batch,
        "channels": args.channels,
        "steps": len(seconds),
        "median_s": round(median, 4),
        "min_s": round(min(seconds), 4),
        "mean_s": round(statistics.fmean(seconds), 4),
        "it_per_s": round(1 / median, 4),
        "steps_s": [round(s, 4) for s in seconds],
        "last_d_loss": round(losses[0], 4),
        "last_g_loss": round(losses[1], 4),
    }
    print(json.dumps(line), flush=True)


def run_rank(rank, args, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=args.processes, timeout=timedelta(seconds=120))
    seconds, losses = step_seconds(args, rank)
    if rank == 0:
        print_line(args, seconds, losses)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=dcgan.VARIANTS, required=True)
    parser.add_argument("--processes", type=int, default=1, help="more than 1: DDP over Gloo on 127.0.0.1")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process")
    parser.add_argument("--batch", type=int, default=64, help="images an iteration, over all processes")
    parser.add_argument("--channels", type=int, default=64, help="64: dcgan-celeba, 8: dcgan-tiny")
    parser.add_argument("--steps", type=int, default=10, help="measured iterations")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before them")
    args = parser.parse_args()
    if args.batch % args.processes:
        parser.error(f"--batch {args.batch} does not divide by --processes {args.processes}")
    if args.processes == 1:
        print_line(args, *step_seconds(args, 0))
    else:
        mp.spawn(run_rank, args=(args, free_port()), nprocs=args.processes)


if __name__ == "__main__":
    main()
