"""The DCGAN of takuma's `dcgan-celeba` in plain PyTorch: the reference for parity and the peer for speed.

Module names are those of takuma's checkpoints. `c` is the number of channels of the first convolution (64 for
dcgan-celeba, 8 for dcgan-tiny). Images are [N, 3, 64, 64] in [-1, 1]; noise is [N, nz] in U(-1, 1).

Two iterations that compute the same: `naive`, as most people write it, and `tuned`, without wasted work.
Both detach the fakes in the discriminator's step, as PyTorch's own DCGAN example does.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

LEAK = 0.2
BATCH_NORM = {"eps": 1e-5, "momentum": 0.1}
VARIANTS = ("naive", "tuned")


class Discriminator(nn.Module):
    """Images [N, 3, 64, 64] to logits [N]."""

    def __init__(self, c=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, c, 5, 2, 2)
        self.conv2 = nn.Conv2d(c, 2 * c, 5, 2, 2)
        self.bn2 = nn.BatchNorm2d(2 * c, **BATCH_NORM)
        self.conv3 = nn.Conv2d(2 * c, 4 * c, 5, 2, 2)
        self.bn3 = nn.BatchNorm2d(4 * c, **BATCH_NORM)
        self.conv4 = nn.Conv2d(4 * c, 8 * c, 5, 2, 2)
        self.bn4 = nn.BatchNorm2d(8 * c, **BATCH_NORM)
        self.fc = nn.Linear(8 * c * 4 * 4, 1)

    def forward(self, x):
        x = F.leaky_relu(self.conv1(x), LEAK)
        x = F.leaky_relu(self.bn2(self.conv2(x)), LEAK)
        x = F.leaky_relu(self.bn3(self.conv3(x)), LEAK)
        x = F.leaky_relu(self.bn4(self.conv4(x)), LEAK)
        return self.fc(x.flatten(1)).squeeze(1)


class Generator(nn.Module):
    """Noise [N, nz] to images [N, 3, 64, 64]."""

    def __init__(self, c=64, nz=100):
        super().__init__()
        self.c = c
        self.fc = nn.Linear(nz, 8 * c * 4 * 4)
        self.bn0 = nn.BatchNorm2d(8 * c, **BATCH_NORM)
        self.deconv1 = nn.ConvTranspose2d(8 * c, 4 * c, 5, 2, 2, output_padding=1)
        self.bn1 = nn.BatchNorm2d(4 * c, **BATCH_NORM)
        self.deconv2 = nn.ConvTranspose2d(4 * c, 2 * c, 5, 2, 2, output_padding=1)
        self.bn2 = nn.BatchNorm2d(2 * c, **BATCH_NORM)
        self.deconv3 = nn.ConvTranspose2d(2 * c, c, 5, 2, 2, output_padding=1)
        self.bn3 = nn.BatchNorm2d(c, **BATCH_NORM)
        self.deconv4 = nn.ConvTranspose2d(c, 3, 5, 2, 2, output_padding=1)

    def forward(self, z):
        x = F.relu(self.fc(z)).view(-1, 8 * self.c, 4, 4)
        x = self.bn0(x)
        x = F.relu(self.bn1(self.deconv1(x)))
        x = F.relu(self.bn2(self.deconv2(x)))
        x = F.relu(self.bn3(self.deconv3(x)))
        return torch.tanh(self.deconv4(x))


@dataclass
class Models:
    """Both networks and their optimizers. `generator` and `discriminator` may be wrapped (DDP)."""

    generator: nn.Module
    discriminator: nn.Module
    adam_g: torch.optim.Optimizer
    adam_d: torch.optim.Optimizer


@dataclass
class Report:
    """What one iteration says, as tensors without gradient."""

    d_loss: torch.Tensor
    g1_loss: torch.Tensor
    g2_loss: torch.Tensor
    d_acc: torch.Tensor

    @property
    def g_loss(self):
        """G's cost: the mean of its two updates'."""
        return (self.g1_loss + self.g2_loss) / 2


@torch.no_grad()
def initialise(generator, discriminator):
    """Weights normal(0, 0.02), cut at two deviations in D's convolutions; biases 0, batch norm scale 1."""
    for module in [*generator.modules(), *discriminator.modules()]:
        if isinstance(module, nn.Conv2d):
            nn.init.trunc_normal_(module.weight, 0.0, 0.02, -0.04, 0.04)
        elif isinstance(module, (nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.zeros_(module.bias)


def adam(module, fused=False):
    """The recipe's optimizer over the parameters of `module`; PyTorch's default kernel unless `fused`."""
    return torch.optim.Adam(module.parameters(), 2e-4, betas=(0.5, 0.999), eps=1e-8, fused=fused or None)


def build(c, variant, wrap=lambda module: module):
    """Fresh models for `variant`; `wrap` may put DDP around each network."""
    generator, discriminator = Generator(c), Discriminator(c)
    initialise(generator, discriminator)
    tuned = variant == "tuned"
    if tuned:
        generator.to(memory_format=torch.channels_last)
        discriminator.to(memory_format=torch.channels_last)
    return Models(wrap(generator), wrap(discriminator), adam(generator, tuned), adam(discriminator, tuned))


def cost(logits, label):
    """Mean sigmoid cross-entropy of `logits` [N] against one label for all."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def accuracy(logits_real, logits_fake):
    """Share of all 2 N images that D puts on the right side."""
    right = (logits_real > 0).sum() + (logits_fake < 0).sum()
    return right / (len(logits_real) + len(logits_fake))


def ignore(_phase, _logits=None):
    """Observer that does nothing."""


def naive_iteration(models, reals, z, observe=ignore):
    """One D update and two G updates, as an ordinary user writes them.

    `observe(phase)` is called after each backward pass ("d", "g1", "g2"), before the optimizer's step; for "d"
    with `(fake, logits_real, logits_fake)`.
    """
    g, d = models.generator, models.discriminator
    models.adam_d.zero_grad()
    fake = g(z)
    logits_real = d(reals)
    logits_fake = d(fake.detach())
    d_loss = cost(logits_real, 1.0) + cost(logits_fake, 0.0)
    d_loss.backward()
    observe("d", (fake, logits_real, logits_fake))
    models.adam_d.step()
    g_losses = []
    for phase in ("g1", "g2"):
        models.adam_g.zero_grad()
        g_loss = cost(d(g(z)), 1.0)
        g_loss.backward()
        observe(phase)
        models.adam_g.step()
        g_losses.append(g_loss.detach())
    return Report(d_loss.detach(), *g_losses, accuracy(logits_real, logits_fake))


@contextlib.contextmanager
def counted_twice(generator):
    """Inside, one forward pass moves the running statistics as two passes over the same batch would."""
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1 - (1 - BATCH_NORM["momentum"]) ** 2
    yield
    for norm in norms:
        norm.momentum = BATCH_NORM["momentum"]
        norm.num_batches_tracked += 1


def tuned_iteration(models, reals, z, observe=ignore):
    """The same numbers without wasted work.

    G's forward pass of the D step is the first G update's (same noise, same weights), and the G updates compute
    no gradient of D's weights. Gradients are set to None, never to zero.
    """
    g, d = models.generator, models.discriminator
    with counted_twice(g):
        fake = g(z)
    d.requires_grad_(True)
    models.adam_d.zero_grad(set_to_none=True)
    logits_real = d(reals)
    logits_fake = d(fake.detach())
    d_loss = cost(logits_real, 1.0) + cost(logits_fake, 0.0)
    d_loss.backward()
    observe("d", (fake, logits_real, logits_fake))
    models.adam_d.step()
    d.requires_grad_(False)
    g_losses = []
    for phase in ("g1", "g2"):
        if phase == "g2":
            fake = g(z)
        models.adam_g.zero_grad(set_to_none=True)
        g_loss = cost(d(fake), 1.0)
        g_loss.backward()
        observe(phase)
        models.adam_g.step()
        g_losses.append(g_loss.detach())
    return Report(d_loss.detach(), *g_losses, accuracy(logits_real, logits_fake))


ITERATIONS = {"naive": naive_iteration, "tuned": tuned_iteration}
