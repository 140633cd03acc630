"""Networks of one kind in a training step: one, or several by one forward, their weights stacked."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle


class Alone:
    """One network, called as it is."""

    def __init__(self, model: nn.Module, compile: bool = False) -> None:
        self.model = model
        self.forward = cast(nn.Module, torch.compile(model)) if compile else model
        self.weights = list(model.parameters())

    def train(self) -> None:
        self.forward.train()

    def draw(self, batch: int, chances: Sequence[torch.Generator]) -> None:
        """Dropout draws its masks itself."""

    def clear(self) -> None:
        """The optimizer has cleared what there is."""

    def hand_over(self) -> None:
        """The parameters' gradients are where the optimizer finds them."""


class Stack:
    """S networks of one kind, whose parameters and buffers become slices of stacked ones, (S, ...): what is written to
    either is read from both. ``torch.func`` makes of one network's forward that of all.

    Args:
        example: images by which the sizes of dropout's masks are found.
    """

    def __init__(self, models: Sequence[nn.Module], example: Tensor, compile: bool = False) -> None:
        self.models = list(models)
        self.masked = dropped(models[0], example)
        self.parameters = _stacked([dict(model.named_parameters()) for model in models])
        self.buffers = _stacked([dict(model.named_buffers()) for model in models])
        self.masks: dict[str, Tensor] = {}
        self.skeleton = _with_masks(models[0], self.masked)
        self.weights = [weight.requires_grad_() for weight in self.parameters.values()]
        self._batched = torch.func.vmap(self._one)
        self.forward = torch.compile(self._all) if compile else self._all

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.skeleton, (parameters, buffers), (images,))
        return logits

    def _all(self, images: Tensor) -> Tensor:
        """``(S·B, C, H, W) -> (S·B, classes)``, network after network."""
        each = images.reshape(len(self.models), -1, *images.shape[1:])
        logits: Tensor = self._batched(self.parameters, self.buffers | self.masks, each)
        return logits.flatten(0, 1)

    def train(self) -> None:
        for model in (*self.models, self.skeleton):
            model.train()

    def draw(self, batch: int, chances: Sequence[torch.Generator]) -> None:
        """Dropout's masks for the next forward, of each network from its own generator."""
        for name, (rate, shape) in self.masked.items():
            drawn = [torch.rand(batch, *shape, generator=chance, device=chance.device) for chance in chances]
            self.masks[f"{name}.mask"] = (torch.stack(drawn) >= rate).float() / (1 - rate)

    def clear(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def hand_over(self) -> None:
        """Gives each network's parameters their slices of the gradients."""
        for name, weight in self.parameters.items():
            if weight.grad is not None:
                for model, gradient in zip(self.models, weight.grad, strict=True):
                    model.get_parameter(name).grad = gradient


def networks_of(models: Sequence[nn.Module], example: Tensor, compile: bool = False) -> Alone | Stack:
    return Alone(models[0], compile) if len(models) == 1 else Stack(models, example, compile)


class _Masked(nn.Module):
    """Dropout by a mask that is given, of zeros and ``1/(1 - rate)``."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask.to(x.dtype)


def dropped(model: nn.Module, example: Tensor) -> dict[str, tuple[float, torch.Size]]:
    """Rate and size of what each dropout of the model gets of an image, by name."""
    found: dict[str, tuple[float, torch.Size]] = {}

    def watch(name: str, module: nn.Dropout) -> RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = module.p, inputs[0].shape[1:]

        return module.register_forward_pre_hook(note)

    dropouts = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p]
    hooks = [watch(name, module) for name, module in dropouts]
    if hooks:
        with torch.no_grad():
            model.eval()(example)
    for hook in hooks:
        hook.remove()
    return found


def _with_masks(model: nn.Module, masked: dict[str, Any]) -> nn.Module:
    """A copy whose dropouts take masks. Its weights are never read."""
    made = deepcopy(model)
    for name in masked:
        made.set_submodule(name, _Masked())
    return made


@torch.no_grad()
def _stacked(models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of tensors by name, which become the slices of what is given back."""
    found = {}
    for name in models[0]:
        parts = [model[name] for model in models]
        found[name] = torch.stack([part.detach() for part in parts])
        for part, slice_ in zip(parts, found[name], strict=True):
            part.data = slice_
    return found


def merged(groups: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The groups of networks of one kind as those of one optimizer: lists, which hold something for each parameter, one
    after the other. Names of parameters begin with the number of their network, where there are more than one."""
    if len(groups) == 1:
        return groups[0]
    return [_joined(same) for same in zip(*groups, strict=True)]


def _joined(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    made = dict(groups[0])
    for key, value in made.items():
        if key == "params":
            made[key] = [(f"{i}.{name}", param) for i, group in enumerate(groups) for name, param in group[key]]
        elif isinstance(value, list):
            made[key] = [entry for group in groups for entry in group[key]]
    return made
