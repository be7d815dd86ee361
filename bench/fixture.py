"""Write tests/fixtures/dcgan_tiny.safetensors: one full iteration of dcgan-tiny, computed by PyTorch.

    bench/.venv/bin/python bench/fixture.py [--out FILE]

Everything starts from f32 values (weights, noise, uint8 images), is computed in float64 by the naive iteration
and stored rounded to f32, so a reader compares with the exact value and not with another rounding of it.

Keys: `init.g.*` `init.d.*` state before; `reals` uint8 [8, 64, 64, 3]; `z` [8, 100]; `fwd.fake` [8, 3, 64, 64],
`fwd.logits_real` [8], `fwd.logits_fake` [8]: the forward passes of the D step; `fwd.fake_eval`: G in evaluation mode
on the running statistics before; `loss.d` `loss.g1` `loss.g2` `d_acc`: scalars; `grad.d.*` `grad.g1.*` `grad.g2.*`:
the gradients of each phase; `final.g.*` `final.d.*`: state after all three updates.
"""

import argparse
import copy
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

import dcgan

CHANNELS, BATCH, NZ, SEED = 8, 8, 100, 20260607
DEFAULT_OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "dcgan_tiny.safetensors"
# A bias in front of a batch norm is taken out again by it: its gradient is zero but for rounding.
UNSEEN_BIASES = {"g": ("deconv1.bias", "deconv2.bias", "deconv3.bias"), "d": ("conv2.bias", "conv3.bias", "conv4.bias")}


def state_of(module):
    """The state that takuma's arithmetic decides: all but the batch counters."""
    return {name: t for name, t in module.state_dict().items() if not name.endswith("num_batches_tracked")}


@torch.no_grad()
def make_uneven(module):
    """Biases, scales and statistics away from 0 and 1, so that a mistake in one of them is seen."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.weight.normal_(1.0, 0.1)
            child.bias.normal_(0.0, 0.1)
            child.running_mean.normal_(0.0, 0.1)
            child.running_var.uniform_(0.5, 1.5)
        elif getattr(child, "bias", None) is not None:
            child.bias.normal_(0.0, 0.02)


def make_reals():
    """uint8 [8, 64, 64, 3]: a soft disc on a soft ground, with noise; no two alike."""
    axis = torch.linspace(-1, 1, 64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    images = []
    for _ in range(BATCH):
        centre_x, centre_y, radius = torch.rand(3) * torch.tensor([0.6, 0.6, 0.4]) + torch.tensor([-0.3, -0.3, 0.3])
        inside = torch.sigmoid(12 * (radius - torch.hypot(x - centre_x, y - centre_y))).unsqueeze(-1)
        image = inside * torch.rand(3) + (1 - inside) * torch.rand(3) + 0.05 * torch.randn(64, 64, 3)
        images.append((image.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.stack(images)


def run_once(generator, discriminator, reals_u8, z, dtype):
    """All computed tensors of one naive iteration in `dtype`; the given models are left alone."""
    g, d = copy.deepcopy(generator).to(dtype), copy.deepcopy(discriminator).to(dtype)
    reals = reals_u8.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
    z = z.to(dtype)
    found = {}
    with torch.no_grad():
        found["fwd.fake_eval"] = copy.deepcopy(g).eval()(z)

    def observe(phase, forward=None):
        if forward is not None:
            found.update(zip(("fwd.fake", "fwd.logits_real", "fwd.logits_fake"), (t.detach().clone() for t in forward)))
        for name, parameter in (d if phase == "d" else g).named_parameters():
            found[f"grad.{phase}.{name}"] = parameter.grad.clone()

    report = dcgan.naive_iteration(dcgan.Models(g, d, dcgan.adam(g), dcgan.adam(d)), reals, z, observe)
    found["loss.d"], found["loss.g1"], found["loss.g2"] = report.d_loss, report.g1_loss, report.g2_loss
    found["d_acc"] = report.d_acc
    for letter, module in (("g", g), ("d", d)):
        found |= {f"final.{letter}.{name}": t.detach().clone() for name, t in state_of(module).items()}
    return found


def print_differences(exact, single):
    """Largest |f32 - f64| of each group, biases in front of a batch norm apart."""
    groups = {}
    for key, value in exact.items():
        kind, letter, *rest = (key.split(".", 2) + ["", ""])[:3]
        unseen = rest[0] in UNSEEN_BIASES.get(letter[:1], ()) and kind in ("grad", "final")
        group = f"{kind}.{letter}" + (" biases before a batch norm" if unseen else "")
        gap = (value - single[key].double()).abs().max().item()
        size = value.abs().max().item()
        old_gap, old_size = groups.get(group, (0.0, 0.0))
        groups[group] = (max(gap, old_gap), max(size, old_size))
    print(f"{'group':45s} {'max |f32 - f64|':>16s} {'max |value|':>12s}")
    for group, (gap, size) in sorted(groups.items()):
        print(f"{group:45s} {gap:16.2e} {size:12.3e}")
    print(
        "A bias in front of a batch norm has gradient 0 in theory. Adam divides a gradient by its own size, so in f32\n"
        "the rounding error alone moves such a bias by up to the learning rate, 2e-4, an update in a random direction;\n"
        "in f64 the error is far below Adam's eps and the bias stays. These biases change no image in training. The running\n"
        "means of the batch norms behind them follow by a few 1e-5; every other final value agrees within 1e-5."
    )


def check_tuned(generator, discriminator, reals_u8, z, exact):
    """Fails unless the tuned iteration gives the naive one's numbers in float64."""
    g, d = copy.deepcopy(generator).double(), copy.deepcopy(discriminator).double()
    reals = reals_u8.permute(0, 3, 1, 2).double() / 127.5 - 1
    report = dcgan.tuned_iteration(dcgan.Models(g, d, dcgan.adam(g), dcgan.adam(d)), reals, z.double())
    torch.testing.assert_close(report.g2_loss, exact["loss.g2"], rtol=1e-7, atol=0)
    for letter, module in (("g", g), ("d", d)):
        for name, t in state_of(module).items():
            if name not in UNSEEN_BIASES[letter]:
                torch.testing.assert_close(t.detach(), exact[f"final.{letter}.{name}"], rtol=1e-6, atol=1e-9)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    generator, discriminator = dcgan.Generator(CHANNELS, NZ), dcgan.Discriminator(CHANNELS)
    dcgan.initialise(generator, discriminator)
    make_uneven(generator)
    make_uneven(discriminator)
    reals_u8 = make_reals()
    z = torch.rand(BATCH, NZ) * 2 - 1
    exact = run_once(generator, discriminator, reals_u8, z, torch.float64)
    print_differences(exact, run_once(generator, discriminator, reals_u8, z, torch.float32))
    check_tuned(generator, discriminator, reals_u8, z, exact)
    tensors = {"reals": reals_u8, "z": z}
    for letter, module in (("g", generator), ("d", discriminator)):
        tensors |= {f"init.{letter}.{name}": t.detach() for name, t in state_of(module).items()}
    tensors |= {key: value.to(torch.float32) for key, value in exact.items()}
    metadata = {
        "made_by": "bench/fixture.py: one naive iteration in float64 from the f32 values under init.*, stored as f32",
        "torch": torch.__version__,
        "recipe": "dcgan-tiny",
        "channels": str(CHANNELS),
        "batch": str(BATCH),
        "seed": str(SEED),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, args.out, metadata)
    print(f"{args.out}: {len(tensors)} tensors, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
