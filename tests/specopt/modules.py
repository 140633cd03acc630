"""Modules of every type that is read, and what param_groups says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import specopt
from specopt.groups import Decision

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "snr": lambda params, **kw: specopt.SNRSGD(params, **{"lr": 0.05, "momentum": 0.9, **kw}),
    "set": lambda params, **kw: specopt.NormScaleAdamW(params, **{"lr": 1e-3, **kw}),
}


class Conv1D(nn.Module):
    """As transformers has it for GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(0.2 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Everything(nn.Module):
    """A module of each type that is read, joined by a forward that uses all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.up1 = nn.ConvTranspose1d(12, 6, 2)
        self.up_grouped = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.conv2 = nn.Conv2d(1, 3, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(3)
        self.up2 = nn.ConvTranspose2d(3, 5, 2)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)
        self.attention_apart = nn.MultiheadAttention(12, 3, kdim=12, vdim=10, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(12, 10, proj_size=7, batch_first=True, bidirectional=True)
        self.gru, self.rnn = nn.GRU(14, 9, batch_first=True), nn.RNN(9, 12, batch_first=True)
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(12, 8), nn.GRUCell(8, 9), nn.RNNCell(9, 5)
        self.bilinear = nn.Bilinear(5, 12, 6)
        self.conv1d = Conv1D(10, 6)
        self.norm = nn.LayerNorm((2, 5))
        self.head = nn.Linear(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.up_grouped(self.up1(self.depthwise(self.grouped(self.conv1(x.mT)))))
        image = self.up2(self.batch_norm(self.conv2(y[:, None])))
        volume = self.conv3(image[:, None])
        z = self.attention(x, x, x)[0] + self.attention_apart(x, x, x[..., :10])[0]
        z = self.rnn(self.gru(self.lstm(self.layer(z))[0])[0])[0][:, -1]
        cell = self.rnn_cell(self.gru_cell(self.lstm_cell(z)[0]))
        last = self.conv1d(self.bilinear(cell, z) + volume.mean((1, 2, 3, 4))[:, None])
        scores: Tensor = self.head(self.norm(last.view(-1, 2, 5)).flatten(1))
        return scores


def everything() -> Everything:
    torch.manual_seed(0)
    return Everything()


def decisions(model: nn.Module, **options: Any) -> dict[str, Decision]:
    return {decision.name: decision for decision in specopt.param_groups(model, **options).decisions}


def controlled(model: nn.Module, **options: Any) -> set[str]:
    return {name for name, decision in decisions(model, **options).items() if decision.view is not None}


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 6, 4))
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.table = nn.Parameter(torch.randn(5, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.relative_position_bias = nn.Parameter(torch.zeros(5, 5))
