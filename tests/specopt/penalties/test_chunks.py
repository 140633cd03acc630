"""Some classes at a time: the same numbers in less memory, and a budget that speaks before memory is taken.

Numbers are compared on a CUDA device where there is one. Bytes are counted on the CPU, whose kernels' they are."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specopt.penalties import frob_reg, jac_reg
from specopt.penalties.graph import graph_of
from specopt.penalties.jacobians import OF_SOFTMAX, UNITS, class_bytes
from tests.specopt.penalties.cases import assert_same, images, labels, lenet

ROWS = {frob_reg: UNITS, jac_reg: OF_SOFTMAX}
EXACT = list(ROWS)


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, and the most that were alive at once since ``peak`` was set."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, made=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._note(tensor, made=True)
        return result

    def _note(self, tensor: Any, made: bool) -> None:
        storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
        if storage is not None and storage._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes() if made else 0
            self.alive += self._known[storage._cdata]
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.alive -= self._known.pop(key)


def peaks(penalty: Callable[..., Tensor], net: nn.Module, x: Tensor, **options: Any) -> tuple[int, int]:
    """Bytes above those of the forward's graph: what the penalty holds when it is computed, and the most at once until
    its backward pass is through."""
    net, inputs = net.cpu(), x.cpu().clone().requires_grad_()
    net.zero_grad()
    with Memory() as memory:
        logits = net(inputs)
        before = memory.peak = memory.alive
        value = penalty(logits, inputs, **options)
        held = memory.alive - before
        value.backward()
    return held, memory.peak - before


@pytest.mark.parametrize("penalty", EXACT)
@pytest.mark.parametrize("chunk", [1, 3, 9, 10, 99])
@pytest.mark.parametrize("training", [False, True])
def test_chunks_change_neither_value_nor_gradient(penalty: Callable[..., Tensor], chunk: int, training: bool) -> None:
    net = lenet(norm=True).double().train(training)
    x = images(4, 1, 12, 12)
    assert_same(penalty(net, x, chunk=chunk), penalty(net, x), net)


@pytest.mark.parametrize("penalty", EXACT)
def test_chunks_go_through_one_backward_pass_with_a_loss_of_the_same_logits(penalty: Callable[..., Tensor]) -> None:
    net, x = lenet().double(), images(4, 1, 12, 12)
    found = []
    for chunk in (None, 3):
        inputs = x.clone().requires_grad_()
        logits = net(inputs)
        net.zero_grad()
        (penalty(logits, inputs, chunk=chunk) + nn.functional.cross_entropy(logits, labels(4, 10))).backward()
        found.append([param.grad for param in net.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("penalty", EXACT)
def test_chunks_bound_the_memory_that_is_held_and_that_of_the_backward_pass(penalty: Callable[..., Tensor]) -> None:
    net, x = lenet(size=20, classes=20).cpu(), images(8, 1, 20, 20, dtype=torch.float32).cpu()
    all_held, all_peak = peaks(penalty, net, x)
    held, peak = peaks(penalty, net, x, chunk=2)
    assert held < 0.01 * all_held
    assert peak < 0.2 * all_peak


@pytest.mark.parametrize("penalty", EXACT)
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("norm", [False, True])
def test_the_stated_bytes_are_those_of_the_peak_up_to_a_factor_of_three_halves(
    penalty: Callable[..., Tensor], chunk: int | None, norm: bool
) -> None:
    net, x = lenet(size=20, classes=20, norm=norm).cpu(), images(8, 1, 20, 20, dtype=torch.float32).cpu()
    stated = (chunk or 20) * class_bytes(graph_of(net, x), ROWS[penalty])
    _, peak = peaks(penalty, net, x, chunk=chunk)
    assert 2 / 3 < peak / stated < 3 / 2


def of_no_class(net: nn.Module, logits: Tensor) -> int:
    """Bytes that are beside those of the classes: a few times the weights' gradients, and the logits'."""
    return 4 * sum(tensor.numel() * tensor.itemsize for tensor in (logits, *net.parameters()))


@pytest.mark.parametrize("penalty", EXACT)
@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize(("samples", "features", "classes"), [(32, 16, 500), (2, 4, 1000)])
def test_the_stated_bytes_hold_where_the_logits_are_most_of_the_graph(
    penalty: Callable[..., Tensor], chunk: int | None, samples: int, features: int, classes: int
) -> None:
    net, x = nn.Linear(features, classes), images(samples, features, dtype=torch.float32).cpu()
    graph = graph_of(net, x)
    stated = (chunk or classes) * class_bytes(graph, ROWS[penalty])
    _, peak = peaks(penalty, net, x, chunk=chunk)
    assert peak < 1.2 * stated + of_no_class(net, graph.logits)


class EnoughSeen(Exception):
    pass


@pytest.mark.parametrize("penalty", EXACT)
@pytest.mark.parametrize("classes", [3000, 200_000])
def test_a_class_at_a_time_takes_the_stated_bytes_however_many_there_are(
    penalty: Callable[..., Tensor], classes: int
) -> None:
    net, x = nn.Linear(4, classes), images(2, 4, dtype=torch.float32).cpu().requires_grad_()
    logits = net(x)
    stated, seen = class_bytes(graph_of(logits, x), ROWS[penalty]), []

    def stop_at_the_third(gradient: Tensor) -> None:
        seen.append(gradient.shape)
        if len(seen) == 3:
            raise EnoughSeen

    logits.register_hook(stop_at_the_third)
    with pytest.raises(EnoughSeen), Memory() as memory:
        penalty(logits, x, chunk=1)
    assert memory.peak < 1.5 * stated + of_no_class(net, logits)


@pytest.mark.parametrize("chunk", [None, 5])
def test_where_vmap_fails_a_pass_for_each_class_stays_within_the_stated_bytes(chunk: int | None) -> None:
    net, x = lenet(size=20, classes=20, norm=True).cpu(), images(8, 1, 20, 20, dtype=torch.float32).cpu()
    with torch.autocast("cpu", torch.bfloat16):
        stated = (chunk or 20) * class_bytes(graph_of(net, x), UNITS)
        _, peak = peaks(frob_reg, net, x, chunk=chunk)
    assert 1 / 2 < peak / stated < 1


@pytest.mark.parametrize("penalty", EXACT)
def test_what_exceeds_the_budget_is_refused_with_a_chunk_that_fits_before_memory_is_taken(
    penalty: Callable[..., Tensor],
) -> None:
    net, x = lenet().cpu(), images(4, 1, 12, 12, dtype=torch.float32).cpu().requires_grad_()
    logits = net(x)
    each = class_bytes(graph_of(logits, x), ROWS[penalty])
    with Memory() as memory, pytest.raises(ValueError) as refused:
        penalty(logits, x, max_bytes=4 * each + 1)
    assert memory.peak == 0
    message = rf"10 classes at once need {10 * each} bytes, max_bytes allows {4 * each + 1}: chunk=4 would fit"
    assert re.fullmatch(message, str(refused.value))
    penalty(logits, x, max_bytes=4 * each + 1, chunk=4)
    with pytest.raises(ValueError, match=f"one class alone needs {each}, so max_bytes must be raised"):
        penalty(logits, x, max_bytes=each - 1, chunk=1)


def test_a_thousand_classes_of_large_images_are_refused_by_default() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 1000))
    with pytest.raises(ValueError, match=r"1000 classes at once need \d+ bytes, max_bytes allows 2147483648: chunk="):
        frob_reg(net, torch.zeros(32, 3, 64, 64))
