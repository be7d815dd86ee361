"""Time PyTorch on the dcgan-celeba iteration on one GPU: eager, tuned, torch.compile, CUDA graphs.

    bench/.venv/bin/python bench/gpu_peers.py [--variants eager,tuned,...] [--precision f32|tf32|bf16] [--steps 200]
    bench/.venv/bin/python bench/gpu_peers.py --self-test        tiny, on the CPU, without graphs

Prints one JSON line a variant:
* eager: as most people write it, with PyTorch's defaults (TF32 in convolutions), losses read in every iteration;
* tuned: no wasted work, channels_last, --precision, fused Adam, cuDNN's search for the fastest kernels;
* compile: tuned, and each network through torch.compile(mode="max-autotune-no-cudagraphs");
* graph: tuned, and the whole iteration replayed as one CUDA graph;
* compile-graph: both.

An iteration holds what a training loop holds: a batch picked from uint8 images in the device's memory, floats, fresh
noise, the three updates. Time is taken between the ends of iterations, on the device's own clock, so gaps in which
the GPU waits for the host count. It is one machine's figure for one process: no data loading, no exchange.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

import dcgan

IMAGES_IN_MEMORY = 4096
VARIANTS = ("eager", "tuned", "compile", "graph", "compile-graph")
# Before a capture, PyTorch asks for some iterations on another stream: kernels are chosen and memory is taken there.
ITERATIONS_BEFORE_CAPTURE = 11


class Rounded(nn.Module):
    """`inner` under bfloat16 autocast, float32 out.

    One region a forward pass: a region keeps rounded copies of the weights, which must not outlive an update.
    """

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.inner(x).float()


@dataclass
class Setting:
    """What every variant of one run has in common."""

    device: torch.device
    batch: int
    channels: int
    precision: str
    warmup: int
    steps: int
    # What torch.compile is called with.
    compiler: dict


def build(setting, variant):
    """Models for `variant`, and the iteration that trains them."""
    device, tuned = setting.device, variant != "eager"
    layout = torch.channels_last if tuned else torch.contiguous_format
    networks = [dcgan.Generator(setting.channels), dcgan.Discriminator(setting.channels)]
    dcgan.initialise(*networks)
    networks = [network.to(device).to(memory_format=layout) for network in networks]
    graph = variant.endswith("graph")
    adams = [
        torch.optim.Adam(n.parameters(), 2e-4, betas=(0.5, 0.999), eps=1e-8, fused=tuned or None, capturable=graph)
        for n in networks
    ]
    if tuned and setting.precision == "bf16":
        networks = [Rounded(network) for network in networks]
    if variant.startswith("compile"):
        networks = [torch.compile(network, **setting.compiler) for network in networks]
    return dcgan.Models(*networks, *adams), dcgan.ITERATIONS["tuned" if tuned else "naive"]


def iteration_of(setting, variant):
    """A function that runs one iteration and returns its report."""
    models, iterate = build(setting, variant)
    device, layout = setting.device, torch.channels_last if variant != "eager" else torch.contiguous_format
    images_u8 = torch.randint(0, 256, (IMAGES_IN_MEMORY, 64, 64, 3), dtype=torch.uint8, device=device)

    def once():
        picked = images_u8[torch.randint(IMAGES_IN_MEMORY, (setting.batch,), device=device)].permute(0, 3, 1, 2)
        reals = (picked.float() / 127.5 - 1).contiguous(memory_format=layout)
        z = torch.rand(setting.batch, 100, device=device) * 2 - 1
        report = iterate(models, reals, z)
        if variant == "eager":
            report.d_loss.item(), report.g_loss.item(), report.d_acc.item()
        return report

    return captured(once) if variant.endswith("graph") else once


def captured(once):
    """A function that replays `once` as one CUDA graph; its report's tensors are the same in every call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(ITERATIONS_BEFORE_CAPTURE):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = once()

    def replay():
        graph.replay()
        return report

    return replay


def milliseconds(setting, once):
    """How long each measured iteration took, and the last report."""
    for _ in range(setting.warmup):
        report = once()
    if setting.device.type == "cpu":
        ends = [time.perf_counter()]
        for _ in range(setting.steps):
            report = once()
            ends.append(time.perf_counter())
        return [1000 * (b - a) for a, b in zip(ends, ends[1:])], report
    torch.cuda.synchronize()
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(setting.steps + 1)]
    ends[0].record()
    for end in ends[1:]:
        report = once()
        end.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(ends, ends[1:])], report


def set_precision(setting, variant):
    """PyTorch's switches for TF32 and for cuDNN's search; `eager` keeps the defaults."""
    defaults = variant == "eager"
    torch.backends.cudnn.allow_tf32 = defaults or setting.precision != "f32"
    torch.backends.cuda.matmul.allow_tf32 = not defaults and setting.precision != "f32"
    torch.backends.cudnn.benchmark = not defaults


def measure(setting, variant):
    """The line of a variant."""
    torch.manual_seed(0)
    set_precision(setting, variant)
    on_gpu = setting.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    once = iteration_of(setting, variant)
    found_ms, report = milliseconds(setting, once)
    losses = {"d_loss": report.d_loss.item(), "g_loss": report.g_loss.item()}
    median = statistics.median(found_ms)
    return {
        "variant": variant,
        "precision": "PyTorch's default" if variant == "eager" else setting.precision,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "batch": setting.batch,
        "channels": setting.channels,
        "steps": len(found_ms),
        "median_ms": round(median, 4),
        "min_ms": round(min(found_ms), 4),
        "mean_ms": round(statistics.fmean(found_ms), 4),
        "images_per_s": round(1000 * setting.batch / median, 1),
        "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6) if on_gpu else None,
        **{name: round(value, 4) for name, value in losses.items()},
    }


def run(setting, variants):
    """Prints a line a variant; returns how many failed, or gave losses that are no numbers."""
    failed = 0
    for variant in variants:
        try:
            line = measure(setting, variant)
            # NaN is the one number unlike itself.
            failed += line["d_loss"] != line["d_loss"] or line["g_loss"] != line["g_loss"]
        except Exception as error:  # One variant that this machine cannot run must not hide the others.
            line = {"variant": variant, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            failed += 1
        print(json.dumps(line), flush=True)
        torch.compiler.reset()
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu, where graphs are left out")
    parser.add_argument("--precision", choices=("f32", "tf32", "bf16"), default="bf16", help="of all variants but eager")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64, help="64: dcgan-celeba, 8: dcgan-tiny")
    parser.add_argument("--steps", type=int, default=200, help="measured iterations")
    parser.add_argument("--warmup", type=int, default=20, help="iterations before them")
    parser.add_argument("--self-test", action="store_true", help="all that runs on a CPU, in a tiny size")
    args = parser.parse_args()
    if args.self_test:
        args.device, args.batch, args.channels, args.steps, args.warmup = "cpu", 4, 4, 2, 1
    variants = args.variants.split(",")
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        parser.error(f"there is no variant {unknown[0]}; variants are {', '.join(VARIANTS)}")
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("error: PyTorch sees no GPU; check the driver with nvidia-smi, or give --self-test")
        torch.cuda.set_device(device)
    else:
        variants = [variant for variant in variants if not variant.endswith("graph")]
    # The self-test only traces: generating and compiling C++ takes minutes.
    compiler = {"backend": "aot_eager"} if args.self_test else {"mode": "max-autotune-no-cudagraphs"}
    setting = Setting(device, args.batch, args.channels, args.precision, args.warmup, args.steps, compiler)
    sys.exit(min(run(setting, variants), 1))


if __name__ == "__main__":
    main()
