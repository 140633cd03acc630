"""param_groups: what a model's module types say, and nothing else."""

from __future__ import annotations

import copy
import math
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as hooked_spectral_norm

import specopt
from specopt.groups import Decision, ParamGroups, resolve
from specopt.tracker.common import STEP

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "snr": lambda params, **kw: specopt.SNRSGD(params, **{"lr": 0.05, "momentum": 0.9, **kw}),
    "set": lambda params, **kw: specopt.NormScaleAdamW(params, **{"lr": 1e-3, **kw}),
}


@pytest.fixture(params=OPTIMIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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


def batches() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(11, (16, 6), generator=generator), torch.randint(4, (16,), generator=generator)


def train(model: nn.Module, optimizer: Any, steps: int) -> list[float]:
    tokens, labels = batches()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


MATRICES: dict[str, tuple[int, tuple[int, int]]] = {
    "conv1.weight": (1, (8, 36)),
    "grouped.weight": (2, (6, 12)),
    "depthwise.weight": (12, (1, 3)),
    "up1.weight": (1, (6, 24)),
    "up_grouped.weight": (2, (2, 6)),
    "conv2.weight": (1, (3, 9)),
    "up2.weight": (1, (5, 12)),
    "conv3.weight": (1, (2, 8)),
    "attention.in_proj_weight": (3, (12, 12)),
    "attention.out_proj.weight": (1, (12, 12)),
    "attention_apart.q_proj_weight": (1, (12, 12)),
    "attention_apart.k_proj_weight": (1, (12, 12)),
    "attention_apart.v_proj_weight": (1, (12, 10)),
    "attention_apart.out_proj.weight": (1, (12, 12)),
    "layer.self_attn.in_proj_weight": (3, (12, 12)),
    "layer.self_attn.out_proj.weight": (1, (12, 12)),
    "layer.linear1.weight": (1, (20, 12)),
    "layer.linear2.weight": (1, (12, 20)),
    "lstm.weight_ih_l0": (4, (10, 12)),
    "lstm.weight_hh_l0": (4, (10, 7)),
    "lstm.weight_hr_l0": (1, (7, 10)),
    "lstm.weight_ih_l0_reverse": (4, (10, 12)),
    "lstm.weight_hh_l0_reverse": (4, (10, 7)),
    "lstm.weight_hr_l0_reverse": (1, (7, 10)),
    "gru.weight_ih_l0": (3, (9, 14)),
    "gru.weight_hh_l0": (3, (9, 9)),
    "rnn.weight_ih_l0": (1, (12, 9)),
    "rnn.weight_hh_l0": (1, (12, 12)),
    "lstm_cell.weight_ih": (4, (8, 12)),
    "lstm_cell.weight_hh": (4, (8, 8)),
    "gru_cell.weight_ih": (3, (9, 8)),
    "gru_cell.weight_hh": (3, (9, 9)),
    "rnn_cell.weight_ih": (1, (5, 9)),
    "rnn_cell.weight_hh": (1, (5, 5)),
    "bilinear.weight": (1, (6, 60)),
    "conv1d.weight": (1, (10, 6)),
    "head.weight": (1, (4, 10)),
}
TRANSPOSED = ("up1.weight", "up_grouped.weight", "up2.weight", "conv1d.weight")


def by_hand(name: str, weight: Tensor) -> list[Tensor]:
    """The matrices of a weight of :class:`Everything`, in float64."""
    count = MATRICES[name][0]
    parts = weight.detach().double().chunk(count)
    return [(part.transpose(0, 1) if name in TRANSPOSED else part).reshape(MATRICES[name][1]) for part in parts]


def decisions(model: nn.Module, **options: Any) -> dict[str, Decision]:
    return {decision.name: decision for decision in specopt.param_groups(model, **options).decisions}


def controlled(model: nn.Module, **options: Any) -> set[str]:
    return {name for name, decision in decisions(model, **options).items() if decision.view is not None}


# --- by module type ------------------------------------------------------------------------------------------------


def test_every_module_type_is_read_as_its_matrices() -> None:
    model = everything()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decisions(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    read = {
        name: (decision.matrices[0], (decision.matrices[1][0], math.prod(decision.matrices[1][1:])))
        for name, decision in found.items()
        if decision.matrices is not None
    }
    assert read == MATRICES


def test_after_a_step_every_matrix_of_every_module_has_its_target() -> None:
    model = everything()
    optimizer = specopt.NormScaleAdamW(model, lr=1e-6, mode="rescale")
    train(model, optimizer, steps=1)
    rows = {row.name: row for row in specopt.spectral_report(optimizer)}
    assert len(rows) == sum(count for count, _ in MATRICES.values())
    for name, (count, (out, _)) in MATRICES.items():
        for index, matrix in enumerate(by_hand(name, model.get_parameter(name))):
            row = rows[f"{name}[{index}]" if count > 1 else name]
            channels = row.shape[1]
            assert row.target == pytest.approx(math.sqrt(out / channels))
            assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(row.target, rel=1e-5), row.name


def test_input_channels_are_those_of_a_group() -> None:
    targets = {name: decision.target for name, decision in decisions(everything()).items()}
    assert targets["grouped.weight"] == pytest.approx(math.sqrt(6 / 4))
    assert targets["depthwise.weight"] == 1.0
    assert targets["up1.weight"] == pytest.approx(math.sqrt(6 / 12))
    assert targets["up_grouped.weight"] == pytest.approx(math.sqrt(2 / 3))
    assert targets["bilinear.weight"] == pytest.approx(math.sqrt(6 / 60))
    assert targets["conv1d.weight"] == pytest.approx(math.sqrt(10 / 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_line_swap_trains_a_model_of_all_types(kind: str, dtype: torch.dtype) -> None:
    model = specopt.init.scaled_orthogonal_(everything()).to(dtype)
    optimizer = OPTIMIZERS[kind](model, lr=0.05 if kind == "snr" else 0.01)
    losses = train(model, optimizer, steps=25)
    assert losses[-1] < 0.5 * losses[0]
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    assert all(row.finite for row in specopt.spectral_report(optimizer))


def test_a_module_in_place_of_parameters_is_its_param_groups_bit_for_bit(kind: str) -> None:
    models = [everything(), everything()]
    for model, params in zip(models, (models[0], specopt.param_groups(models[1])), strict=True):
        train(model, OPTIMIZERS[kind](params), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_module_inside_a_group_and_in_add_param_group(kind: str) -> None:
    body, head, late = nn.LSTM(4, 5), nn.Linear(5, 3), nn.Linear(3, 3)
    optimizer = OPTIMIZERS[kind]([{"params": body, "lr": 1e-4}, {"params": head, "spectral": False}])
    assert {row.name for row in specopt.spectral_report(optimizer)} == {
        f"weight_{side}_l0[{gate}]" for side in ("ih", "hh") for gate in range(4)
    }
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates["weight_ih_l0"] == rates["bias_ih_l0"] == 1e-4 != rates["weight"]
    optimizer.add_param_group({"params": late, "lr": 1e-5})
    assert [group["lr"] for group in optimizer.param_groups[-2:]] == [1e-5, 1e-5]
    assert "weight" in {row.name for row in specopt.spectral_report(optimizer)}


def test_a_module_that_cannot_be_added_leaves_no_group_behind(kind: str) -> None:
    late = nn.LSTM(4, 5)
    optimizer = OPTIMIZERS[kind](nn.Sequential(nn.Linear(4, 4), late))
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": nn.Sequential(nn.Conv2d(2, 2, 3), late)})
    assert len(optimizer.param_groups) == groups


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_lstm_and_transformer_train_on_both_backends(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECOPT_BACKEND", backend)
    torch.manual_seed(0)
    layer, lstm = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.LSTM(8, 6, batch_first=True)
    model = nn.Sequential(layer, lstm)
    optimizer = specopt.NormScaleAdamW(model, lr=1e-3)
    x = torch.randn(4, 5, 8)
    for _ in range(2):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
    rows = specopt.spectral_report(optimizer)
    assert len(rows) == 3 + 1 + 2 + 8
    assert all(row.sigma <= 1.5 * (row.target or 0) for row in rows)


def test_state_of_a_model_of_all_types_is_resumed_bit_for_bit(kind: str) -> None:
    first, second = everything(), everything()
    optimizers = [OPTIMIZERS[kind](first), OPTIMIZERS[kind](second)]
    train(first, optimizers[0], steps=3)
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((first, second), optimizers, strict=True):
        model.eval()
        train(model, optimizer, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint_of_named_groups_is_resumed_bit_for_bit(kind: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    first, second = everything(), everything()
    optimizers = [OPTIMIZERS[kind](first), OPTIMIZERS[kind](second)]
    train(first, optimizers[0], steps=3)
    second.load_state_dict(first.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(first, optimizers[0], options=options))
    set_optimizer_state_dict(second, optimizers[1], saved, options=options)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for model, optimizer in zip((first, second), optimizers, strict=True):
        model.eval()
        train(model, optimizer, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_scaled_orthogonal_starts_every_controlled_matrix_at_its_target() -> None:
    model = specopt.init.scaled_orthogonal_(everything())
    rows = specopt.spectral_report(specopt.NormScaleAdamW(model))
    assert len(rows) == sum(count for count, _ in MATRICES.values())
    assert all(row.sigma == pytest.approx(row.target, rel=1e-4) for row in rows)


# --- decay, names, ties --------------------------------------------------------------------------------------------


def test_vectors_biases_and_norms_have_no_decay_and_the_rest_what_is_given() -> None:
    groups = specopt.param_groups(everything(), weight_decay=0.3, lr=0.1)
    assert all(group["lr"] == 0.1 for group in groups)
    decay = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    free = {name for name, value in decay.items() if value == 0}
    assert free == decay.keys() - MATRICES.keys() - {"embedding.weight"}
    assert {decay[name] for name in (*MATRICES, "embedding.weight")} == {0.3}


def test_names_are_kept_and_every_parameter_comes_once(kind: str) -> None:
    model = everything()
    optimizer = OPTIMIZERS[kind](model)
    named = {name: p for g in optimizer.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    assert named.keys() == dict(model.named_parameters()).keys()
    assert all(named[name] is param for name, param in model.named_parameters())
    assert all(group["params"] for group in optimizer.param_groups)


def test_groups_may_be_given_to_two_optimizers_of_any_kind() -> None:
    groups = specopt.param_groups(nn.LSTM(3, 4))
    first, second = specopt.SNRSGD(groups), specopt.SNRSGD(groups)
    first.param_groups[0]["lr"] = 7.0
    assert second.param_groups[0]["lr"] == 1e-3 and "lr" not in groups[0]
    assert torch.optim.SGD(groups).param_groups[0]["view"] == "rows:4"


@pytest.mark.parametrize("requested", [False, True])
def test_embeddings_are_controlled_on_request_alone_also_where_they_are_tied_to_a_head(requested: bool) -> None:
    class Model(nn.Module):
        def __init__(self, embedding_first: bool) -> None:
            super().__init__()
            parts: dict[str, nn.Module] = {"embed": nn.Embedding(9, 5), "head": nn.Linear(5, 9, bias=False)}
            for name in parts if embedding_first else reversed(parts):
                self.add_module(name, parts[name])
            parts["head"].weight = parts["embed"].weight
            self.bag = nn.EmbeddingBag(7, 5)

    for embedding_first, name, other in ((True, "embed", "head"), (False, "head", "embed")):
        found = decisions(Model(embedding_first), embeddings=requested)
        assert list(found) == [f"{name}.weight", "bag.weight"]
        assert f"tied to {other}.weight" in found[f"{name}.weight"].why
        for decision in found.values():
            assert decision.view == ("flatten" if requested else None)


def test_requested_embeddings_are_set_and_sparse_gradients_refused_by_name_of_the_option() -> None:
    torch.manual_seed(0)
    for sparse in (False, True):
        model = nn.Embedding(20, 8, sparse=sparse)
        optimizer = specopt.SNRSGD(specopt.param_groups(model, embeddings=True), lr=0.1, snr_lambda=0.5)
        before = torch.linalg.svdvals(model.weight.detach())
        model(torch.arange(20)).sum().mul(0).backward()
        if sparse:
            with pytest.raises(RuntimeError, match="spectral=False"):
                optimizer.step()
        else:
            optimizer.step()
            after = torch.linalg.svdvals(model.weight.detach())
            expected = torch.cat([0.95 * before[:1], before[1:]]).sort(descending=True)[0]
            assert torch.allclose(after, expected, rtol=1e-5)


def test_shared_modules_and_tied_linears_come_once_and_ties_read_in_two_ways_are_named() -> None:
    linear, twin, conv1d = nn.Linear(4, 4), nn.Linear(4, 4), Conv1D(4, 4)
    twin.weight = linear.weight
    model = nn.Sequential(linear, twin, linear)
    assert controlled(model) == {"0.weight"}
    assert decisions(model)["0.weight"].why == "Linear, tied to 1.weight, 2.weight"
    for name in ("0", "1.*", "2.weight"):
        assert controlled(model, overrides={name: {"spectral": False}}) == set()
    linear.register_parameter("weight", conv1d.weight)
    with pytest.warns(UserWarning, match=r"0\.weight \(4, 4\): tied, and read as flatten and as transposed"):
        assert controlled(nn.Sequential(linear, conv1d)) == set()


def test_renamed_classes_and_subclasses_are_what_they_are() -> None:
    class Attention(nn.Linear):
        """A Linear all the same."""

    renamed = type("FSDPConv2d", (nn.Conv2d,), {})(2, 4, 3, groups=2)
    impostor = type("Linear", (nn.Module,), {})()
    impostor.register_parameter("weight", nn.Parameter(torch.zeros(3, 3)))
    with pytest.warns(UserWarning, match=r"2\.weight"):
        found = decisions(nn.Sequential(Attention(3, 3), renamed, impostor))
    assert {name: decision.view for name, decision in found.items() if name.endswith("weight")} == {
        "0.weight": "flatten",
        "1.weight": "rows:2",
        "2.weight": None,
    }


def test_sharded_modules_are_read_as_they_were(tmp_path: Path) -> None:
    model = everything()
    before = specopt.param_groups(model).table()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for child in model.children():
            fully_shard(child, mesh=mesh)
        assert type(model.head) is not nn.Linear
        assert specopt.param_groups(model).table() == before
    finally:
        torch.distributed.destroy_process_group()


def test_conv1d_of_transformers_is_known_by_its_type_or_by_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(nn.Module):
        """Without the attribute nx."""

        def __init__(self) -> None:
            super().__init__()
            self.nf, self.weight = 6, nn.Parameter(torch.zeros(4, 6))

    assert decisions(Conv1D(6, 4))["weight"].matrices == (1, (6, 4))
    with pytest.warns(UserWarning, match="nothing is known of weight in Older"):
        assert controlled(Older()) == set()
    library = types.ModuleType("transformers.pytorch_utils")
    monkeypatch.setattr(library, "Conv1D", Older, raising=False)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    assert decisions(Older())["weight"].matrices == (1, (6, 4))
    assert decisions(Older(), overrides={"*": {"view": "columns:3"}})["weight"].matrices == (3, (2, 4))


def test_frozen_weights_and_layers_without_gradient_do_not_disturb(kind: str) -> None:
    model = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS[kind](model)
    before = [param.clone() for param in model[0].parameters()]
    model[1](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))
    assert optimizer.state[model[1].weight][STEP] == 1
    assert not optimizer.state.get(model[2].weight)


# --- what is not controlled ----------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """LoRA as a parametrization: ``W + B A``."""

    def __init__(self, out: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(columns, 2, bias=False), nn.Parameter(torch.zeros(out, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a.weight


def parametrized(how: str) -> nn.Module:
    linear = nn.Linear(6, 5)
    if how == "low rank":
        parametrize.register_parametrization(linear, "weight", LowRank(5, 6))
        return linear
    if how == "prune":
        return prune.l1_unstructured(linear, "weight", amount=0.5)  # type: ignore[no-any-return, no-untyped-call]
    if how == "old spectral_norm":
        return hooked_spectral_norm(linear)
    if how == "old weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.utils.weight_norm(linear)
    return getattr(parametrizations, how)(linear)  # type: ignore[no-any-return]


PARAMETRIZED = [
    "weight_norm",
    "spectral_norm",
    "orthogonal",
    "low rank",
    "prune",
    "old spectral_norm",
    "old weight_norm",
]


@pytest.mark.parametrize("how", PARAMETRIZED)
def test_parametrized_weights_are_never_controlled_and_named_once(how: str) -> None:
    model = nn.Sequential(parametrized(how), nn.Linear(5, 4))
    with pytest.warns(UserWarning, match="computed from|parametrized by") as caught:
        optimizer = specopt.NormScaleAdamW(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [row.name for row in specopt.spectral_report(optimizer)] == ["1.weight"]
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="cannot be controlled"):
        specopt.param_groups(model, overrides={nn.Linear: {"spectral": True}})
    with pytest.raises(ValueError, match="before it is parametrized"):
        specopt.init.scaled_orthogonal_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specopt.param_groups(model, overrides={"0*": {"spectral": False}})


def test_an_adapter_of_two_linears_is_two_matrices_whose_second_is_only_capped() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(12, 10).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(12, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 10, bias=False)})
            nn.init.zeros_(self.lora_B.get_parameter("default.weight"))

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Adapter()
    optimizer = specopt.NormScaleAdamW(model, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
    rows = {row.name: row for row in specopt.spectral_report(optimizer)}
    a, b = rows["lora_A.default.weight"], rows["lora_B.default.weight"]
    assert a.target is not None and b.target is not None
    assert a.target * b.target == pytest.approx(math.sqrt(10 / 12))
    assert b.capped and 0 < b.sigma < 0.05


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 6, 4))
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.table = nn.Parameter(torch.randn(5, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.relative_position_bias = nn.Parameter(torch.zeros(5, 5))


def test_unknown_modules_stay_uncontrolled_and_are_named_once(kind: str) -> None:
    with pytest.warns(UserWarning) as caught:
        optimizer = OPTIMIZERS[kind](nn.Sequential(Odd(), nn.Linear(3, 3)))
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    for name, shape in (("position", "(1, 6, 4)"), ("experts", "(3, 5, 4)"), ("table", "(5, 4)")):
        assert f"0.{name} {shape}: nothing is known of {name} in Odd" in message
    assert "relative_position_bias" in message and "scale" not in message
    assert [row.name for row in specopt.spectral_report(optimizer)] == ["1.weight"]


def test_bare_tensors_of_unclear_shape_are_named_once_with_their_shapes(kind: str) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="does not tell how to read") as caught:
        optimizer = OPTIMIZERS[kind](model.named_parameters())
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "2 parameter(s)" in str(caught[0].message)
    assert "0.weight (4, 3, 3), 1.weight (4, 1, 3, 3)" in str(caught[0].message)
    with pytest.warns(UserWarning, match=r"late \(3, 3, 3\)") as caught:
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3, 3, 3)))]})
    assert len(caught) == 1 and caught[0].filename == __file__


def test_clear_vouched_for_and_uncontrolled_tensors_are_not_warned_of(kind: str) -> None:
    odd = nn.Parameter(torch.zeros(3, 3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPTIMIZERS[kind](everything())
        OPTIMIZERS[kind]([odd], view="flatten")
        OPTIMIZERS[kind]([{"params": [odd], "spectral": False}, {"params": [nn.Parameter(torch.zeros(3))]}])
        OPTIMIZERS[kind]([nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(4, 3, 2, 2))])


@pytest.mark.parametrize("make", [specopt.SNRSGD, specopt.param_groups, specopt.init.scaled_orthogonal_])
def test_lazy_modules_are_refused_by_name_until_they_have_seen_an_input(make: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyConv1d(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight is not initialized.*run the model"):
        make(model)
    model(torch.zeros(2, 3, 5))
    make(model)


def test_a_bare_lazy_parameter_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="not initialized"):
        OPTIMIZERS[kind](nn.LazyLinear(4).parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weights_and_those_of_other_dtypes_are_left_to_the_base(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.Linear(3, 3), nn.Linear(0, 3))
    assert controlled(model) == {"1.weight"}
    optimizer = OPTIMIZERS[kind](model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(bool(param.isfinite().all()) for param in model.parameters())


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_by_type_pattern_and_predicate_the_last_one_winning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    groups = specopt.param_groups(
        model,
        lr=0.5,
        overrides={
            nn.Linear: {"target": 2.0},
            "1": {"lr": 0.1},
            "1.1.*": {"target": 3.0},
            (lambda name, module, param: isinstance(module, nn.Linear) and len(param) == 2): {"spectral": False},
            (nn.Conv1d, nn.Conv2d): {"mode": "cap"},
        },
    )
    found = {name: {**group, "params": None} for group in groups for name, _ in group["params"]}
    assert found["0.weight"]["mode"] == "cap" and "target" not in found["0.weight"]
    assert (found["1.0.weight"]["target"], found["1.0.weight"]["lr"]) == (2.0, 0.1)
    assert (found["1.1.weight"]["target"], found["1.1.bias"]["lr"]) == (3.0, 0.1)
    assert found["2.weight"]["spectral"] is False and found["2.weight"]["lr"] == 0.5
    optimizer = specopt.NormScaleAdamW(groups)
    assert {row.name: row.target for row in specopt.spectral_report(optimizer)}["1.1.weight"] == 3.0


def test_an_override_of_a_module_type_counts_for_all_that_is_inside() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4), nn.Linear(4, 4))
    assert controlled(model, overrides={nn.TransformerEncoderLayer: {"spectral": False}}) == {"1.weight"}


def test_a_view_in_an_override_controls_what_nothing_is_known_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decisions(
            Odd(),
            overrides={
                "experts": {"view": "stack"},
                "table": {"view": "transposed"},
                "position": {"spectral": False},
                "relative*": {"spectral": False},
            },
        )
    assert found["experts"].matrices == (3, (5, 4)) and found["table"].matrices == (1, (4, 5))
    assert found["position"].view is found["scale"].view is None
    packed = nn.Linear(4, 12)
    assert decisions(packed, overrides={"weight": {"view": "rows:3"}})["weight"].matrices == (3, (4, 4))


def test_overrides_that_make_no_sense_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Odd())
    wrong: list[tuple[dict[Any, Any], type[Exception], str]] = [
        ({"haed.*": {"lr": 1.0}}, ValueError, r"'haed\.\*'.*matches no"),
        ({3: {}}, TypeError, "pattern or a predicate, got 3"),
        ({"0": 0.1}, TypeError, "dict of group options, got 0.1"),
        ({"1.table": {"spectral": True}}, ValueError, "1.table.*give a view"),
        ({"0.weight": {"view": "rows:3"}}, ValueError, "0.weight: view='rows:3' needs"),
        ({"0.weight": {"view": "row"}}, ValueError, "got 'row'"),
    ]
    for overrides, error, match in wrong:
        with pytest.raises(error, match=match):
            specopt.param_groups(model, overrides=overrides)
    with pytest.raises(TypeError, match="Module, got list"):
        specopt.param_groups([nn.Parameter(torch.zeros(2))])  # type: ignore[arg-type]


def test_model_wide_options_and_control_switched_off() -> None:
    groups = specopt.param_groups(nn.LSTM(3, 4), spectral=False)
    assert specopt.spectral_report(specopt.SNRSGD(groups)) == []
    assert decisions(nn.Linear(4, 3), target=1.5)["weight"].target == 1.5
    assert decisions(nn.Linear(4, 3), target="initial")["weight"].target == "initial"


# --- the list itself -----------------------------------------------------------------------------------------------


def test_table_tells_every_parameter_its_matrices_and_why() -> None:
    groups = specopt.param_groups(everything(), overrides={"head.weight": {"lr": 0.1}})
    lines = str(groups).splitlines()
    assert lines == groups.table().splitlines() and lines[0].split() == [
        "name",
        "shape",
        "matrices",
        "view",
        "target",
        "why",
    ]
    rows = {line.split()[0]: line for line in lines[2:]}
    assert rows.keys() == dict(everything().named_parameters()).keys()
    assert all(
        text in rows["attention.in_proj_weight"] for text in ("(36, 12)", "3 x (12, 12)", "rows:3", " 1 ", "packed")
    )
    assert "lr=0.1" in rows["head.weight"] and "0.6325" in rows["head.weight"]
    assert "weight_decay=0" in rows["norm.weight"] and "LayerNorm" in rows["norm.weight"]


def test_groups_hold_no_parameter_beside_their_own() -> None:
    groups = specopt.param_groups(nn.Linear(2, 2))
    assert isinstance(groups, ParamGroups) and vars(groups).keys() == {"decisions"}
    assert not any(isinstance(value, Tensor) for decision in groups.decisions for value in vars(decision).values())


def test_resolve_leaves_what_torch_takes_as_it_is() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    groups = [{"params": params}]
    generator = (param for param in params)
    assert resolve(params) is params and resolve(groups) is groups and resolve(generator) is generator


def test_a_module_beside_groups_without_names_gives_up_its_own() -> None:
    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    bare = nn.Parameter(torch.randn(5, 5))
    added = specopt.SNRSGD([bare], lr=0.1)
    wrapped = specopt.wrap(torch.optim.RMSprop([bare]), specopt.NormScale())
    for optimizer in (added, wrapped):
        optimizer.add_param_group({"params": layers()})
    mixed = specopt.NormScaleAdamW([{"params": iter([bare])}, {"params": layers(), "mode": "cap"}])
    named = specopt.NormScaleAdamW([{"params": [("bare", bare)]}, {"params": layers(), "mode": "cap"}])
    for optimizer in (added, wrapped, mixed, named):
        groups = optimizer.param_groups
        assert [len(group["params"]) for group in groups] == [1, 2, 2]
        assert [group["weight_decay"] == 0 for group in groups][2]
        assert all(("param_names" in group) == (optimizer is named) for group in groups)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "prune"])
def test_weights_of_an_lstm_that_are_computed_from_others_are_left_alone(how: str) -> None:
    lstm = nn.LSTM(8, 8)
    if how == "weight_norm":
        nn.utils.weight_norm(lstm, "weight_hh_l0")
    else:
        nn.utils.prune.l1_unstructured(lstm, "weight_hh_l0", 0.3)
    with pytest.warns(UserWarning, match="weight_hh_l0_"):
        groups = specopt.param_groups(nn.Sequential(lstm))
    assert [decision.name for decision in groups.decisions if decision.view] == ["0.weight_ih_l0"]


@pytest.mark.parametrize("asked", [{"spectral": True}, {"view": "flatten"}])
def test_an_override_asks_for_control_of_what_is_off_for_all(asked: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    groups = specopt.param_groups(model, spectral=False, overrides={"1": asked})
    optimizer = specopt.SNRSGD(groups)
    assert [matrix.param for matrix in optimizer.matrices(with_grad=False)] == [model[1].weight]


def test_a_view_for_all_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"view must be given in overrides.*rows:2"):
        specopt.param_groups(nn.Linear(4, 4), view="rows:2")
