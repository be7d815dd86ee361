"""Load a takuma checkpoint into PyTorch and draw an 8x8 grid with it; exits non-zero when it does not fit.

    bench/.venv/bin/python bench/load_checkpoint.py CHECKPOINT_FOLDER [--out grid.png]

CHECKPOINT_FOLDER holds generator.safetensors and discriminator.safetensors. The width of the networks is read
from the weights. `load_state_dict` is strict: every name and shape must be there, and nothing else.
"""

import argparse
import pathlib

import torch
from PIL import Image
from safetensors.torch import load_file

import dcgan


def load(folder):
    """Generator and discriminator of a checkpoint, in evaluation mode."""
    weights_g = load_file(folder / "generator.safetensors")
    weights_d = load_file(folder / "discriminator.safetensors")
    nz = weights_g["fc.weight"].shape[1]
    generator = dcgan.Generator(weights_g["bn3.weight"].numel(), nz)
    discriminator = dcgan.Discriminator(weights_d["conv1.bias"].numel())
    generator.load_state_dict(weights_g, strict=True)
    discriminator.load_state_dict(weights_d, strict=True)
    return generator.eval(), discriminator.eval()


@torch.no_grad()
def draw_grid(generator, seed=0):
    """64 faces as one uint8 image [512, 512, 3] and as images [64, 3, 64, 64]."""
    nz = generator.fc.in_features
    images = generator(torch.rand(64, nz, generator=torch.Generator().manual_seed(seed)) * 2 - 1)
    grid = images.view(8, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(512, 512, 3)
    return ((grid + 1) * 127.5).round().to(torch.uint8), images


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("grid.png"))
    args = parser.parse_args()
    generator, discriminator = load(args.folder)
    for name, tensor in [*generator.state_dict().items(), *discriminator.state_dict().items()]:
        if not bool(torch.isfinite(tensor).all()):
            raise SystemExit(f"error: {name} in {args.folder} holds a value that is not finite")
    grid, images = draw_grid(generator)
    logits = discriminator(images)
    Image.fromarray(grid.numpy()).save(args.out)
    print(f"OK {args.folder}: grid in {args.out}, mean logit of its faces {logits.mean().item():.3f}")


if __name__ == "__main__":
    main()
