"""Three kinds of token in one trunk: patches of digits, frames of sound, and bare points.

Each kind brings an embedding and a head; a batch packs samples of all of them, and one Next-DiT
runs over it. `python examples/train_three_kinds.py` takes a minute on a CPU and draws the three
losses.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from nextdit_core import FinalLayer, NextDiT, NextDiTConfig, Tokens

SAMPLES = 8  # of each kind in a batch


def digits(count: int, random: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Real handwritten digits, 8 x 8 pixels in patches of 2 x 2: 16 tokens of 4."""
    from sklearn.datasets import load_digits

    pictures = torch.tensor(load_digits().images, dtype=torch.float32) / 8.0 - 1.0
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    chosen = pictures[torch.randint(len(pictures), (count,), generator=random)]
    patches = chosen.unflatten(2, (4, 2)).unflatten(1, (4, 2)).permute(0, 1, 3, 2, 4)
    return [(values, places) for values in patches.reshape(count, 16, 4)]


def sounds(count: int, random: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Chirps of 12 to 20 frames of 8 samples each, one frame a token."""
    found = []
    for _ in range(count):
        frames = int(torch.randint(12, 21, (1,), generator=random))
        pitch, sweep = torch.rand(2, generator=random)
        time = torch.arange(frames * 8) / (frames * 8)
        wave = torch.sin(2 * math.pi * (3 + 5 * pitch + 4 * sweep * time) * time)
        places = torch.zeros(frames, 3)
        places[:, 0] = torch.arange(float(frames))
        found.append((wave.view(frames, 8) * 1.4, places))
    return found


def points(count: int, random: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Thirty points on an ellipse in space; they have no order, so all are at one position."""
    found = []
    for _ in range(count):
        wide, high = 0.6 + torch.rand(2, generator=random)
        angle = 2 * math.pi * torch.rand(30, generator=random)
        ring = torch.stack([wide * angle.cos(), high * angle.sin(), 0.3 * angle.cos()], -1)
        found.append((ring * 1.4, torch.zeros(30, 3)))
    return found


KINDS = {"digits": (digits, 4), "sounds": (sounds, 8), "points": (points, 3)}


class ThreeKinds(nn.Module):
    """One trunk, and an embedding and a head for each kind."""

    def __init__(self, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        config = NextDiTConfig(token_dim=1, axes=3, width=width, layers=layers, heads=4)
        self.trunk = NextDiT(config)
        self.embeddings = nn.ModuleDict({k: nn.Linear(n, width) for k, (_, n) in KINDS.items()})
        self.heads = nn.ModuleDict({k: FinalLayer(config, n) for k, (_, n) in KINDS.items()})

    def forward(self, batch: dict[str, Tokens], t: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the velocities of every kind; the trunk sees one packed batch."""
        embedded = [one.with_values(self.embeddings[k](one.values)) for k, one in batch.items()]
        hidden, modulation = self.trunk.trunk(Tokens.pack(embedded), torch.cat(list(t.values())))
        parts = zip(
            batch.items(),
            hidden.split([len(one.values) for one in batch.values()]),
            modulation.split([one.batch for one in batch.values()]),
            strict=True,
        )
        return {k: self.heads[k](h, m, one.lengths) for (k, one), h, m in parts}


def train(steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Train on all kinds at once, and give each kind's loss at every step."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = ThreeKinds()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    curves: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(steps):
        batch, times, targets = {}, {}, {}
        for kind, (make, _) in KINDS.items():
            samples = [Tokens(v, p, (len(v),)) for v, p in make(SAMPLES, random)]
            clean = Tokens.pack(samples)
            noise = torch.randn(clean.values.shape, generator=random)
            times[kind] = torch.rand(SAMPLES, generator=random)
            t = times[kind].repeat_interleave(torch.tensor(clean.lengths))[:, None]
            batch[kind] = clean.with_values(t * clean.values + (1 - t) * noise)
            targets[kind] = clean.values - noise
        found = model(batch, times)
        losses = {kind: (found[kind] - targets[kind]).square().mean() for kind in KINDS}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        for kind, loss in losses.items():
            curves[kind].append(loss.item())
        if step % 50 == 49:
            recent = {k: f"{sum(c[-50:]) / 50:.3f}" for k, c in curves.items()}
            print(f"step {step + 1}: {recent}", flush=True)
    return curves


def main() -> int:
    """Train, and draw the curves."""
    curves = train(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for kind, curve in curves.items():
        mean = torch.tensor(curve).unfold(0, 20, 1).mean(-1)
        axes.plot(range(20, 20 + len(mean)), mean, label=kind)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, mean of 20 steps")
    axes.set_title("One trunk, three kinds of token in every batch")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig("three-kinds.png", dpi=120)
    print("wrote three-kinds.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
