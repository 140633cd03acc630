"""The shortest honest use: a plain training loop in which one line is another."""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import specopt


def largest_sigma(model: nn.Module) -> float:
    return max(torch.linalg.svdvals(p.detach())[0].item() for p in model.parameters() if p.ndim == 2)


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    print(f"largest sigma before: {largest_sigma(model):.3f}")

    # optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = specopt.SNRSGD(model, lr=0.1, momentum=0.9, snr_lambda=0.01)

    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train_set, test_set = order[:1000], order[1000:]
    model = train(x[train_set], y[train_set], epochs)
    print(f"largest sigma after:  {largest_sigma(model):.3f}")
    print(f"test accuracy:        {(model(x[test_set]).argmax(1) == y[test_set]).float().mean():.3f}")


if __name__ == "__main__":
    main()
