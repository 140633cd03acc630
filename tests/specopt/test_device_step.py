"""The step of a GPU, in which a pass makes the base update: against the reference, and what it keeps between steps."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from specopt import updates
from specopt.kernels import subspace, tables
from specopt.session import Gate
from specopt.tracker.common import BLOCK, COLD_STEPS, PREFIX, RIGHT, STATS, STEP, HostCopy, Stat
from tests.specopt.helpers import DEVICE, exact, gap_of, with_spectrum

pytestmark = [
    pytest.mark.filterwarnings("ignore:the first step moves"),
    pytest.mark.usefixtures("triton_backend"),
]
SHAPES = [(40, 30), (30, 44), (20, 3, 2, 2), (5,)]
RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "snr": (specopt.SNRSGD, {"lr": 0.05, "momentum": 0.9, "snr_lambda": 0.1}),
    "snr nesterov": (specopt.SNRSGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "snr maximize": (specopt.SNRSGD, {"lr": 0.05, "momentum": 0.5, "dampening": 0.2, "maximize": True}),
    "set": (specopt.NormScaleAdamW, {"lr": 1e-2}),
    "cap": (specopt.NormScaleAdamW, {"lr": 1e-2, "mode": "cap", "amsgrad": True}),
    "rescale": (specopt.NormScaleAdamW, {"lr": 1e-2, "mode": "rescale", "maximize": True}),
    "every second": (specopt.NormScaleAdamW, {"lr": 1e-2, "every": 2}),
    "initial": (specopt.NormScaleAdamW, {"lr": 1e-2, "target": "initial"}),
}


def make(kind: str, **more: Any) -> tuple[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [with_spectrum(s, torch.float32, 0.05, generator) if len(s) > 1 else torch.ones(s) for s in SHAPES]
    params = [weight.to(DEVICE).requires_grad_() for weight in weights]
    cls, options = RULES[kind]
    return cls(params, block=8, **options, **more), params


def set_gradients(params: list[Tensor], seed: int, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        gradient = scale * torch.randn(param.shape, generator=generator).to(param)
        if param.grad is None:
            param.grad = gradient
        else:
            param.grad.copy_(gradient)


def past_the_cold_phase(optimizer: Any, params: list[Tensor]) -> None:
    """One step on the reference, which is quicker than an interpreter, and the count of steps past the cold phase."""
    set_gradients(params, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECOPT_BACKEND", "reference")
        optimizer.step()
    for param in params:
        if STATS in optimizer.state[param]:
            optimizer.state[param][STEP] = COLD_STEPS
            optimizer.state[param][STATS][Stat.COUNT] = COLD_STEPS


def warm(optimizer: Any, params: list[Tensor]) -> None:
    """Past the cold phase, and two steps of the same gradients by the kernels: buffers are made, tables uploaded."""
    past_the_cold_phase(optimizer, params)
    for _ in range(2):
        set_gradients(params, 1)
        optimizer.step()


def compare_step_by_step(kind: str, steps: int, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Each step of one optimizer, and of another with a fused pass from the same state."""
    plain, params = make(kind)
    past_the_cold_phase(plain, params)
    fused, others = make(kind)
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    is_plain, compared = updates.is_plain, 0
    for step in range(1, steps + 1):
        with torch.no_grad():
            for param, other in zip(params, others, strict=True):
                other.copy_(param)
                for name, value in plain.state[param].items():
                    fused.state[other][name] = value.clone() if isinstance(value, Tensor) else value
        before = [param.detach().clone() for param in params]
        for both in (params, others):
            set_gradients(both, step)
        monkeypatch.setenv("SPECOPT_BACKEND", backend)
        monkeypatch.setattr(updates, "is_plain", lambda matrix: False)
        plain.step()
        monkeypatch.setattr(updates, "is_plain", is_plain)
        monkeypatch.setenv("SPECOPT_BACKEND", "triton")
        fused.step()
        for old, param, other in zip(before, params, others, strict=True):
            update = (param - old).norm()
            if param.ndim > 1 and gap_of(exact(param)[1]) <= 0.01:
                assert torch.allclose(exact(param)[1], exact(other)[1], rtol=1e-4)
                continue
            compared += 1
            if param.ndim > 1:
                pairs = [float(o.state[p][STATS][Stat.PAIRS]) for o, p in ((plain, param), (fused, other))]
                if pairs[0] != pairs[1]:  # the reference looks at the triplet it has before it asks for another pair
                    assert backend == "reference"
                    assert torch.allclose(exact(param)[1], exact(other)[1], rtol=1e-2)
                    continue
                # after a conditional pair, the rotation of close Ritz values counts: the reference has an eigensolver
                tolerance = 1e-2 if pairs[0] > 1 and backend == "reference" else 1e-5
                sigmas = [o.state[p][STATS][Stat.SIGMA] for o, p in ((plain, param), (fused, other))]
                assert torch.allclose(*sigmas, rtol=1e-5)
            else:
                tolerance = 1e-5
            rounding = torch.finfo(torch.float32).eps * param.norm()
            assert (param - other).norm() <= tolerance * update + rounding
    assert compared >= steps


MARKS = {kind: pytest.mark.full if kind not in ("snr", "set", "every second") else () for kind in RULES}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [pytest.param(kind, "triton", marks=marks) for kind, marks in MARKS.items()]
    + [(kind, "reference") for kind in RULES],
)
def test_each_fused_step_is_that_of_the_base_and_the_rule(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_step_by_step(kind, 2, monkeypatch, backend)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["snr", "set"])
def test_each_of_100_fused_steps_is_that_of_the_base_and_the_rule(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_step_by_step(kind, 100, monkeypatch, "triton")


@pytest.mark.full
def test_a_kept_half_product_has_the_bits_of_one_made_anew() -> None:
    results = []
    for kept in (True, False):
        optimizer, params = make("snr")
        past_the_cold_phase(optimizer, params)
        for step in range(1, 4):
            set_gradients(params, step)
            if not kept:
                forget_products(optimizer)
            optimizer.step()
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def forget_products(optimizer: Any) -> None:
    for key, value in optimizer._workspace.items():
        if key[0] == "engine":
            value.versions = None


WRITES = {
    "in place": lambda optimizer, param, new: param.copy_(new),
    "other storage": lambda optimizer, param, new: setattr(param, "data", new.clone()),
    "loaded state": lambda optimizer, param, new: (param.copy_(new), optimizer.load_state_dict(optimizer.state_dict())),
    "swapped average": lambda optimizer, param, new: torch._foreach_copy_([param], [new]),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("kind", ["snr", "set"])
def test_a_weight_written_by_somebody_else_is_noticed_at_once(kind: str, how: str) -> None:
    optimizer, params = make(kind)
    past_the_cold_phase(optimizer, params)
    set_gradients(params, 1, scale=1e-4)
    optimizer.step()
    with torch.no_grad():
        WRITES[how](optimizer, params[0], 0.5 * params[0].detach())
    found = exact(params[0])[1][0]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # what the step measures is then the weight as it was written
    optimizer.step()
    sigma = optimizer.state[params[0]][STATS][Stat.SIGMA]
    assert abs(sigma - found) <= 0.01 * found


@pytest.mark.parametrize("kind", ["snr", pytest.param("set", marks=pytest.mark.full)])
def test_a_whole_weight_replaced_unseen_is_found_within_three_steps(kind: str) -> None:
    optimizer, params = make(kind)
    past_the_cold_phase(optimizer, params)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    generator = torch.Generator().manual_seed(5)
    set_gradients(params, 1)
    optimizer.step()
    params[0].data.copy_(3 * with_spectrum(tuple(params[0].shape), torch.float32, 0.05, generator))
    found = exact(params[0])[1][0]
    for _ in range(4):  # the first still sees what was kept
        optimizer.step()
    assert abs(optimizer.state[params[0]][STATS][Stat.SIGMA] - found) <= 0.01 * found


@pytest.mark.parametrize("kind", ["snr", "cap"])
def test_writing_in_every_step_never_makes_the_tracker_cold(kind: str) -> None:
    optimizer, params = make(kind)
    past_the_cold_phase(optimizer, params)
    for step in range(1, 4):
        set_gradients(params, step, scale=0.01)
        optimizer.step()
        with torch.no_grad():
            for param in params:
                param.mul_(0.999)
        assert optimizer.state[params[0]][STEP] == COLD_STEPS + step
        assert float(optimizer.state[params[0]][STATS][Stat.PAIRS]) <= 2


@pytest.mark.parametrize("kind", ["snr", "set", "cap"])
def test_our_own_writes_move_the_version(kind: str) -> None:
    optimizer, params = make(kind)
    past_the_cold_phase(optimizer, params)
    before = [param._version for param in params]
    set_gradients(params, 1)
    optimizer.step()
    assert all(param._version > version for param, version in zip(params, before, strict=True))


@pytest.mark.parametrize("kind", ["snr", "set"])
def test_where_a_scaler_found_an_infinity_nothing_moves(kind: str) -> None:
    optimizer, params = make(kind, fused=True)
    past_the_cold_phase(optimizer, params)
    key = RIGHT if kind == "snr" else BLOCK
    before = [param.detach().clone() for param in params]
    blocks = [optimizer.state[param][key].clone() for param in params if key in optimizer.state[param]]
    stats = [optimizer.state[param][STATS].clone() for param in params[:3]]
    set_gradients(params, 1)
    optimizer.found_inf, optimizer.grad_scale = torch.ones((), device=DEVICE), torch.ones((), device=DEVICE)
    optimizer.step()
    after = [optimizer.state[param][key] for param in params if key in optimizer.state[param]]
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert len(blocks) == 2 and all(torch.equal(a, b) for a, b in zip(blocks, after, strict=True))
    assert all(torch.equal(a, optimizer.state[p][STATS]) for a, p in zip(stats, params, strict=False))


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the device knows whether a step is to be skipped, wherever its flag lies."""
    monkeypatch.setattr(Gate, "is_undecided", property(lambda gate: gate.found_inf is not None))
    monkeypatch.setattr(Gate, "is_shut", property(lambda gate: False))


def scaled_step(optimizer: Any, found_inf: float) -> None:
    """As a gradient scaler makes it with ``fused=True``."""
    optimizer.found_inf = torch.full((), found_inf, device=DEVICE)
    optimizer.grad_scale = torch.ones((), device=DEVICE)
    optimizer.step()


@pytest.mark.usefixtures("undecided")
def test_a_first_step_that_is_skipped_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    weight = torch.nn.init.orthogonal_(torch.empty(72, 72)).to(DEVICE).requires_grad_()
    optimizer = specopt.NormScaleAdamW([weight], lr=1e-3, block=8, max_passes=1, fused=True)
    before = weight.detach().clone()
    set_gradients([weight], 1)
    scaled_step(optimizer, found_inf=1.0)
    scaled_step(optimizer, found_inf=1.0)
    assert torch.equal(before, weight)
    assert not [warning for warning in recwarn if "the first step moves" in str(warning.message)]


FIRST_SGD: dict[str, Callable[[list[Tensor]], Any]] = {
    "snr": lambda params: specopt.SNRSGD(params, lr=0.1, momentum=0.9, block=8, max_passes=1, fused=True),
    "dampening": lambda params: specopt.SNRSGD(
        params, lr=0.1, momentum=0.9, dampening=0.5, block=8, max_passes=1, fused=True
    ),
    "wrapped": lambda params: specopt.wrap(
        torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True), specopt.NormScale(mode="cap", block=8, max_passes=1)
    ),
}


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("kind", FIRST_SGD)
def test_a_first_step_that_is_skipped_leaves_no_garbage_in_momentum_buffers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda like, **kwargs: torch.full_like(like, torch.nan, **kwargs))
    found = []
    for flags in ([0.0], [1.0], [1.0, 0.0]):
        params = [torch.nn.init.orthogonal_(torch.empty(9, 6)).to(DEVICE).requires_grad_()]
        params.append(torch.ones(5, device=DEVICE, requires_grad=True))
        optimizer = FIRST_SGD[kind](params)
        for flag in flags:
            set_gradients(params, 1)
            scaled_step(optimizer, flag)
        assert all(param.isfinite().all() for param in params)
        found.append([optimizer.state[param]["momentum_buffer"].clone() for param in params])
    first, skipped, second = found
    damped = 0.5 if kind == "dampening" else 1.0
    assert not any(buffer.any() for buffer in skipped)
    assert torch.equal(second[1], damped * first[1])
    assert torch.equal(first[1], params[1].grad)


TORCH_SGD = sys.modules["torch.optim.sgd"]


def tensor_rate(params: list[Tensor], lr: float | Tensor, **more: Any) -> Any:
    return specopt.SNRSGD(params, lr=lr, momentum=0.9, weight_decay=0.1, block=8, max_passes=1, **more)


def wrapped_rate(params: list[Tensor], lr: float | Tensor, **more: Any) -> Any:
    base = torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, **more)
    return specopt.wrap(base, specopt.NormScale(mode="cap", block=8, max_passes=1))


@pytest.mark.parametrize("make_one", [tensor_rate, wrapped_rate])
def test_a_learning_rate_on_the_device_is_not_read_back(
    make_one: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "is_on_device", lambda value: isinstance(value, Tensor))
    weight, results = torch.nn.init.orthogonal_(torch.empty(9, 6)), []
    for lr in (0.1, torch.tensor(0.1, device=DEVICE)):
        params = [weight.clone().to(DEVICE).requires_grad_()]
        params.append(torch.ones(5, device=DEVICE, requires_grad=True))
        optimizer = make_one(params, lr)
        for step in range(3):
            set_gradients(params, step)
            with monkeypatch.context() as patch:
                if isinstance(lr, Tensor):
                    for name in ("_single_tensor_sgd", "_multi_tensor_sgd"):
                        patch.setattr(TORCH_SGD, name, reads_back)
                optimizer.step()
        assert optimizer.param_groups[0]["fused"] is None and optimizer.param_groups[0]["foreach"] is None
        results.append([t for param in params for t in (param.detach(), optimizer.state[param]["momentum_buffer"])])
    for plain, on_device in zip(*results, strict=True):
        assert torch.allclose(plain, on_device, rtol=1e-6, atol=1e-7)


def reads_back(*_: Any, **__: Any) -> None:
    raise AssertionError("torch's SGD reads a learning rate in a tensor back")


@pytest.mark.parametrize("asked", [{"foreach": False}, {"fused": False}])
def test_a_base_step_that_was_asked_for_is_made(asked: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "is_on_device", lambda value: isinstance(value, Tensor))
    params = [torch.ones(5, device=DEVICE, requires_grad=True)]
    optimizer = tensor_rate(params, torch.tensor(0.1, device=DEVICE), **asked)
    set_gradients(params, 1)
    monkeypatch.setattr(TORCH_SGD, "_fused_sgd", reads_back)
    optimizer.step()
    assert all(optimizer.param_groups[0][name] is value for name, value in asked.items())


@pytest.mark.parametrize("kind", ["snr", "set"])
def test_gradients_still_scaled_give_the_step_of_plain_ones(kind: str) -> None:
    results = []
    for scale in (1.0, 1024.0):
        optimizer, params = make(kind, fused=True)
        past_the_cold_phase(optimizer, params)
        set_gradients(params, 1, scale=0.1 * scale)
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        optimizer.grad_scale = torch.full((), scale, device=DEVICE)
        optimizer.step()
        results.append([param.detach().clone() for param in params])
    for plain, scaled in zip(*results, strict=True):
        assert torch.allclose(plain, scaled, rtol=1e-5, atol=1e-6)


def test_bf16_state_is_in_the_bases_dtype_and_ours_in_float32() -> None:
    params = [torch.randn(40, 30, dtype=torch.bfloat16, device=DEVICE).requires_grad_()]
    optimizer = specopt.NormScaleAdamW(params, block=8, mode="rescale", stochastic_rounding=True)
    past_the_cold_phase(optimizer, params)
    set_gradients(params, 1)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert state["exp_avg"].dtype == torch.bfloat16
    ours = [value for name, value in state.items() if name.startswith(PREFIX) and isinstance(value, Tensor)]
    assert ours and {value.dtype for value in ours} == {torch.float32}
    assert abs(exact(params[0])[1][0] / (40 / 30) ** 0.5 - 1) < 0.01


# --- graphs ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a graph is being captured, as far as the package can tell."""
    answer = [False]
    monkeypatch.setattr(tables, "capturing", lambda device: answer[0])
    return answer


def test_a_warm_step_of_the_same_tensors_can_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("snr")
    past_the_cold_phase(optimizer, params)
    set_gradients(params, 1)
    optimizer.step()
    optimizer.step()  # the step after the buffers were made
    capturing[0] = True
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_a_captured_step_asks_for_no_first_ratio(capturing: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = make("snr")
    warm(optimizer, params)
    copied = HostCopy(torch.tensor([0.1]))
    optimizer._waiting.append((list(optimizer.matrices())[:1], copied))
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "peek", lambda copy: pytest.fail("an event was asked for in a capture"))
        capturing[0] = True
        optimizer.step()
        capturing[0] = False
    with pytest.warns(UserWarning, match="the first step moves"):
        optimizer.step()


def test_a_loaded_state_drops_what_goes_by_addresses() -> None:
    optimizer, params = make("snr")
    warm(optimizer, params)
    assert engines(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not engines(optimizer)


def test_noise_made_in_a_capture_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [True]
    monkeypatch.setattr(subspace, "capturing", lambda device: answer[0])
    monkeypatch.setattr(subspace, "_noise", {})
    made = subspace.noise_buffer(10, torch.float32, DEVICE)
    assert not subspace._noise
    answer[0] = False
    assert torch.equal(subspace.noise_buffer(10, torch.float32, DEVICE), made)
    assert subspace._noise


def test_a_capture_is_asked_for_on_the_devices_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert tables.capturing(torch.device("cuda", 1))
    assert not tables.capturing(torch.device("cuda", 0))
    assert not tables.capturing(torch.device("cpu"))


def test_what_a_captured_step_reads_outlives_later_steps_with_other_gradients(capturing: list[bool]) -> None:
    optimizer, params = make("snr")
    warm(optimizer, params)
    capturing[0] = True
    optimizer.step()
    capturing[0] = False
    (bucket,) = [engine.bucket for engine in engines(optimizer)]
    read = [weakref.ref(tensor) for tensor in (bucket.table, bucket.numbers, bucket._scratch)]
    del bucket
    for count in (1, len(params)):  # other matrices, then other addresses
        for param in params:
            param.grad = None
        set_gradients(params[:count], 2)
        optimizer.param_groups[0]["snr_lambda"] *= 2
        optimizer.step()
    assert all(reference() is not None for reference in read)


def test_a_warm_step_with_initial_targets_uploads_nothing() -> None:
    _, params = make("initial")
    rule = specopt.NormScale(target="initial", block=8, max_passes=1)
    optimizer = specopt.wrap(torch.optim.SGD(params, lr=1e-2), rule)
    warm(optimizer, params)
    (bucket,) = [engine.bucket for engine in engines(optimizer)]
    numbers = bucket.numbers
    optimizer.step()
    assert bucket.numbers is numbers


def engines(optimizer: Any) -> list[Any]:
    return [kept for key, kept in optimizer._workspace.items() if key[0] == "engine"]


def test_groups_of_another_period_keep_buckets_of_their_own() -> None:
    _, params = make("set")
    first, *rest = params
    optimizer = specopt.NormScaleAdamW([{"params": [first]}, {"params": rest, "every": 2}], lr=1e-2, block=8)
    past_the_cold_phase(optimizer, params)
    seen: list[set[int]] = []
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
        seen.append({id(engine) for engine in engines(optimizer)})
    assert len(seen[-1]) == 2
    assert seen[2] == seen[3] == seen[4]


def test_a_cold_step_cannot_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("snr", max_passes=1)
    for _ in range(2):
        set_gradients(params, 1)
        optimizer.step()
    capturing[0] = True
    with pytest.raises(RuntimeError, match="first 20 steps"):
        optimizer.step()


def test_a_step_whose_gradients_have_moved_cannot_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("snr")
    warm(optimizer, params)
    kept = [param.grad for param in params]
    for param in params:
        param.grad = None
    set_gradients(params, 2)
    capturing[0] = True
    with pytest.raises(RuntimeError, match=r"a tensor has moved.*set_to_none=False"):
        optimizer.step()
    del kept


def test_a_step_counted_on_the_host_cannot_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("set")
    warm(optimizer, params)
    capturing[0] = True
    with pytest.raises(RuntimeError, match=r"an option has changed.*capturable=True"):
        optimizer.step()


def packed(weight: Tensor) -> Any:
    group = {"params": [weight], "view": "rows:2"}
    return specopt.SNRSGD([group], lr=0.1, block=8)


def as_operator() -> Any:
    model = torch.nn.Conv2d(3, 4, 3).to(DEVICE)
    groups = specopt.param_groups(model, conv="operator", inputs=torch.zeros(1, 3, 8, 8, device=DEVICE))
    return specopt.SNRSGD(groups, lr=0.1)


NOT_CAPTURED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "frobenius": (lambda w: specopt.NormScaleAdamW([w], norm="frobenius", block=8), "lists of matrices"),
    "rank": (lambda w: specopt.NormScaleAdamW([w], mode="cap", rank=2, block=8), "lists of matrices"),
    "float64": (lambda w: specopt.SNRSGD([w.detach().double().requires_grad_()], block=8), "lists of matrices"),
    "composed": (
        lambda w: specopt.wrap(
            torch.optim.SGD([w], lr=0.1), specopt.Compose(specopt.SpectralPenalty(), specopt.NormScale(mode="cap"))
        ),
        "lists of matrices",
    ),
    "every": (lambda w: specopt.wrap(torch.optim.SGD([w], lr=0.1), specopt.NormScale(every=2)), "every=2"),
    "packed": (packed, "several matrices"),
    "operator": (lambda w: as_operator(), "conv='operator'"),
}


@pytest.mark.parametrize("kind", NOT_CAPTURED)
def test_a_step_that_goes_by_the_host_cannot_be_captured(
    kind: str, capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_one, reason = NOT_CAPTURED[kind]
    optimizer = make_one(torch.randn(40, 30).to(DEVICE).requires_grad_())
    params = [param for group in optimizer.param_groups for param in group["params"]]
    set_gradients(params, 1)
    with monkeypatch.context() as patch:
        patch.setenv("SPECOPT_BACKEND", "reference")
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights = [param.detach().clone() for param in params]
    capturing[0] = True
    with pytest.raises(RuntimeError, match=f"cannot be captured in a graph: .*{reason}.*spectral=False"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(weight, param) for weight, param in zip(weights, params, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a graph on a GPU")
@pytest.mark.parametrize("kind", ["snr", "set"])
def test_a_captured_step_replays_with_another_learning_rate(kind: str) -> None:
    results = []
    for captured in (False, True):
        lr = torch.tensor(0.01, device=DEVICE)
        optimizer, params = make(kind, **({"capturable": True} if kind == "set" else {}))
        optimizer.param_groups[0]["lr"] = lr
        for step in range(COLD_STEPS + 2):
            set_gradients(params, step)
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(3):
            set_gradients(params, 100 + step)
            lr.fill_(0.01 / (step + 1))
            graph.replay() if captured else optimizer.step()
        torch.cuda.synchronize()
        results.append([param.detach().clone() for param in params])
    for eager, replayed in zip(*results, strict=True):
        assert torch.allclose(eager, replayed, rtol=1e-5, atol=1e-6)
