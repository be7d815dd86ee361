"""Time every convolution of dcgan-celeba, plainly and in other exact forms.

    bench/.venv/bin/python bench/layers.py [--threads 1 2] [--batches 64 128] [--only REGEX] [--cpu-time]

One line a form: GFLOP/s of the forward pass, of the gradient of the input (dgrad) and of the gradient of
the weights (wgrad). GFLOP counts the useful work of the 5x5 layer, the same for every form of it, so a
higher figure is a faster layer. Each figure is the best of a few repetitions: neighbours on a shared
machine only ever make a call slower. Every form's three results are compared with the plain layer's.

Letters: N batch, C channels in, K channels out, H height and width of the larger image, h = H / 2.
"""

import argparse
import re
import time

import torch
import torch.nn.functional as F

CHANNELS_LAST = torch.channels_last
CONTIGUOUS = torch.contiguous_format
# name, channels of the large image, channels of the small one, height of the large image
CONVS = [("conv1", 3, 64, 64), ("conv2", 64, 128, 32), ("conv3", 128, 256, 16), ("conv4", 256, 512, 8)]
DECONVS = [("deconv1", 256, 512, 8), ("deconv2", 128, 256, 16), ("deconv3", 64, 128, 32), ("deconv4", 3, 64, 64)]


def best_seconds(call, clock=time.perf_counter, budget_s=0.12, most=12):
    """Seconds of the fastest of 3 to `most` calls after a warm-up call."""
    call()
    best, spent, count = float("inf"), 0.0, 0
    while count < 3 or (spent < budget_s and count < most):
        begin = clock()
        call()
        took = clock() - begin
        best, spent, count = min(best, took), spent + took, count + 1
    return best


def by_autograd(function, x, w, g):
    """The three passes of `function(x, w)`, each computing only what it names."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w)
    return {
        "fwd": lambda: function(x.detach(), w.detach()),
        "dgrad": lambda: torch.autograd.grad(y, x, g, retain_graph=True)[0],
        "wgrad": lambda: torch.autograd.grad(y, w, g, retain_graph=True)[0],
    }


# ---- forms of the 5x5 stride-2 convolution, weight [K, C, 5, 5] ----


def conv_plain(x, w):
    return F.conv2d(x, w, stride=2, padding=2)


def conv_space_to_depth(x, w):
    """2x2 pixels become channels, so the kernel, padded to 6x6, becomes 3x3 with stride 1."""
    w3 = F.pixel_unshuffle(F.pad(w, (0, 1, 0, 1)), 2)
    return F.conv2d(like(F.pixel_unshuffle(x, 2), x), like(w3, w), padding=1)


def conv_unfold(x, w):
    """im2col by torch's unfold, then one product an image (NCHW)."""
    k, h = w.shape[0], x.shape[2] // 2
    return (w.reshape(k, -1) @ F.unfold(x, 5, padding=2, stride=2)).view(x.shape[0], k, h, h)


def conv_space_to_depth_unfold(x, w):
    w3 = F.pixel_unshuffle(F.pad(w, (0, 1, 0, 1)), 2)
    k, h = w.shape[0], x.shape[2] // 2
    return (w3.reshape(k, -1) @ F.unfold(F.pixel_unshuffle(x, 2), 3, padding=1)).view(x.shape[0], k, h, h)


def conv_padded_to(channels):
    def function(x, w):
        more = channels - w.shape[1]
        wide_x, wide_w = (like(F.pad(t, (0, 0, 0, 0, 0, more)), t) for t in (x, w))
        return F.conv2d(wide_x, wide_w, stride=2, padding=2)

    return function


# ---- forms of the transposed convolution, weight [K, C, 5, 5] with K the channels of the small image ----


def deconv_plain(x, w):
    return F.conv_transpose2d(x, w, stride=2, padding=2, output_padding=1)


def deconv_sub_pixel(x, w):
    """One 3x3 stride-1 convolution to 4 C channels, which are then laid out as 2x2 pixels."""
    w3 = F.pixel_unshuffle(F.pad(w, (0, 1, 0, 1)), 2).flip(2, 3).transpose(0, 1)
    return F.pixel_shuffle(F.conv2d(x, like(w3.contiguous(), w), padding=1), 2)


def deconv_four_phases(x, w):
    """Four stride-1 convolutions of 3x3, 3x2, 2x3 and 2x2: sub-pixel form without the zero taps."""
    n, c, h = x.shape[0], w.shape[1], x.shape[2]
    y = torch.empty((n, c, 2 * h, 2 * h)).contiguous(memory_format=format_of(x))
    for row in (0, 1):
        for col in (0, 1):
            part = w[:, :, row::2, col::2].flip(2, 3).transpose(0, 1)
            out = F.conv2d(F.pad(x, (1 - col, 1, 1 - row, 1)), like(part.contiguous(), w))
            y[:, :, row::2, col::2] = out
    return y


def deconv_padded_to(channels):
    def function(x, w):
        more = channels - w.shape[1]
        wide = F.conv_transpose2d(x, like(F.pad(w, (0, 0, 0, 0, 0, more)), w), stride=2, padding=2, output_padding=1)
        return wide[:, : w.shape[1]]

    return function


# ---- GEMM forms on NHWC memory, written out in both directions ----


def nhwc_columns(big):
    """im2col of `big` [N, C, H, H] in NHWC memory: [N * h * h, 25 * C]."""
    n, c, height, _ = big.shape
    h = height // 2
    padded = F.pad(big.permute(0, 2, 3, 1), (0, 0, 2, 2, 2, 2))
    s = padded.stride()
    taken = padded.as_strided((n, h, h, 5, 5, c), (s[0], 2 * s[1], 2 * s[2], s[1], s[2], 1))
    return taken.reshape(n * h * h, 25 * c)


def nhwc_images(columns, n, c, height):
    """The transpose of `nhwc_columns`: adds every column entry to its pixel; [N, C, H, H] in NHWC memory."""
    h = height // 2
    parts = columns.view(n, h, h, 5, 5, c)
    padded = torch.zeros((n, height + 4, height + 4, c))
    for row in range(5):
        for col in range(5):
            padded[:, row : row + 2 * h : 2, col : col + 2 * h : 2].add_(parts[:, :, :, row, col])
    return padded[:, 2:-2, 2:-2].contiguous().permute(0, 3, 1, 2)


def rows_of(small):
    """`small` [N, K, h, h] in NHWC memory as [N * h * h, K]."""
    return small.permute(0, 2, 3, 1).reshape(-1, small.shape[1])


def small_from(rows, n, h):
    return rows.view(n, h, h, -1).permute(0, 3, 1, 2)


def gemm_forms(big, small, w):
    """Product of the columns of `big` with `w`, its transpose, and the weight gradient from both."""
    n, c, height, _ = big.shape
    k = w.shape[0]
    flat = w.permute(2, 3, 1, 0).reshape(25 * c, k).contiguous()
    saved = nhwc_columns(big)
    down = lambda: small_from(nhwc_columns(big) @ flat, n, height // 2)
    up = lambda: nhwc_images(rows_of(small) @ flat.t(), n, c, height)
    weights = lambda columns: (rows_of(small).t() @ columns).view(k, 5, 5, c).permute(0, 3, 1, 2)
    return down, up, lambda: weights(saved), lambda: weights(nhwc_columns(big))


def conv_gemm(x, w, g):
    down, up, weights, _ = gemm_forms(x, g, w)
    return {"fwd": down, "dgrad": up, "wgrad": weights}


def deconv_gemm(x, w, g):
    down, up, _, weights = gemm_forms(g, x, w)
    return {"fwd": up, "dgrad": down, "wgrad": weights}


# ---- backward passes in the form of another layer's forward pass ----


def conv_dgrad_sub_pixel(x, w, g):
    """Space-to-depth forward; the input gradient as the sub-pixel *forward* convolution."""
    forms = by_autograd(conv_space_to_depth, x, w, g)
    forms["dgrad"] = lambda: deconv_sub_pixel(g, w)
    return forms


def deconv_dgrad_space_to_depth(x, w, g):
    """Sub-pixel forward; the input gradient as the space-to-depth *forward* convolution."""
    forms = by_autograd(deconv_sub_pixel, x, w, g)
    forms["dgrad"] = lambda: conv_space_to_depth(g, w)
    return forms


def format_of(x):
    return CHANNELS_LAST if x.is_contiguous(memory_format=CHANNELS_LAST) else CONTIGUOUS


def like(tensor, model):
    """`tensor` in the memory format of `model`."""
    return tensor.contiguous(memory_format=format_of(model))


def autograd_form(function):
    return lambda x, w, g: by_autograd(function, x, w, g)


def forms_for(name):
    """(label, memory format, maker of the three passes) of the layer `name`; the first is the reference."""
    conv = not name.startswith("de")
    plain = autograd_form(conv_plain if conv else deconv_plain)
    forms = [("plain channels_last", CHANNELS_LAST, plain), ("plain nchw", CONTIGUOUS, plain)]
    if conv:
        forms += [
            ("space-to-depth 3x3 channels_last", CHANNELS_LAST, autograd_form(conv_space_to_depth)),
            ("space-to-depth 3x3 nchw", CONTIGUOUS, autograd_form(conv_space_to_depth)),
            ("gemm nhwc", CHANNELS_LAST, conv_gemm),
            ("unfold+gemm nchw", CONTIGUOUS, autograd_form(conv_unfold)),
        ]
    else:
        forms += [
            ("sub-pixel 3x3 channels_last", CHANNELS_LAST, autograd_form(deconv_sub_pixel)),
            ("sub-pixel 3x3 nchw", CONTIGUOUS, autograd_form(deconv_sub_pixel)),
            ("4 phases channels_last", CHANNELS_LAST, autograd_form(deconv_four_phases)),
            ("gemm nhwc", CHANNELS_LAST, deconv_gemm),
        ]
    if name == "conv1":
        forms += [
            ("s2d, dgrad as sub-pixel fwd", CHANNELS_LAST, conv_dgrad_sub_pixel),
            ("s2d+unfold+gemm nchw", CONTIGUOUS, autograd_form(conv_space_to_depth_unfold)),
        ]
        forms += [(f"padded to {k} channels", CHANNELS_LAST, autograd_form(conv_padded_to(k))) for k in (4, 8, 16)]
    if name == "deconv4":
        forms += [("sub-pixel, dgrad as s2d fwd", CHANNELS_LAST, deconv_dgrad_space_to_depth)]
        forms += [(f"padded to {k} channels", CHANNELS_LAST, autograd_form(deconv_padded_to(k))) for k in (4, 8, 16)]
    return forms


def measure(shape, batch, threads, clock):
    """Print one line a form of one layer, given as its line of CONVS or DECONVS."""
    name, large, small, height = shape
    h = height // 2
    gflop = 2 * 25 * large * small * h * h * batch / 1e9
    gen = torch.Generator().manual_seed(7)
    big = torch.randn((batch, large, height, height), generator=gen)
    little = torch.randn((batch, small, h, h), generator=gen)
    weight = torch.randn((small, large, 5, 5), generator=gen) * 0.02
    x, g = (big, little) if not name.startswith("de") else (little, big)
    print(f"\n{name} {large}-{small} at {height}, batch {batch}, {threads} thread(s), {gflop:.2f} GFLOP a pass")
    wanted = None
    for label, layout, make in forms_for(name):
        passes = make(*(t.contiguous(memory_format=layout) for t in (x, weight, g)))
        got = {key: call() for key, call in passes.items()}
        if wanted is None:
            wanted = got
        for key, value in got.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=1e-3 * wanted[key].abs().max().item())
        seconds = {key: best_seconds(call, clock) for key, call in passes.items()}
        rates = "  ".join(f"{key} {gflop / took:6.0f} GFLOP/s {1e3 * took:7.2f} ms" for key, took in seconds.items())
        print(f"  {label:33s} {rates}  sum {1e3 * sum(seconds.values()):7.2f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--only", default="", help="regular expression on the layer's name")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this thread's CPU time, for a busy machine; needs --threads 1"
    )
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time sees only one thread; add --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        a, b = torch.randn(1600, 1600), torch.randn(1600, 1600)
        print(f"\n{threads} thread(s): SGEMM 1600^3 {2 * 1600**3 / best_seconds(lambda: a @ b, clock) / 1e9:.0f} GFLOP/s")
        for batch in args.batches:
            for shape in CONVS + DECONVS:
                if re.search(args.only, shape[0]):
                    measure(shape, batch, threads, clock)


if __name__ == "__main__":
    main()
