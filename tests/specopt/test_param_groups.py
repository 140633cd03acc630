"""param_groups: what a model's module types say, and nothing else."""

from __future__ import annotations

import copy
import math
import sys
import types
import warnings
from collections.abc import Mapping
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

import specopt
from specopt.groups import ParamGroups, resolve
from specopt.tracker.common import STEP
from tests.specopt.modules import OPTIMIZERS, Conv1D, controlled, decisions, everything

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.fixture(params=OPTIMIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_has_groups_of_what_is_known_of_it() -> None:
    script = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))  # type: ignore[no-untyped-call]
    with pytest.warns(UserWarning, match="RecursiveScriptModule"):
        groups = specopt.param_groups(script)
    assert sum(len(group["params"]) for group in groups) == 4


def test_names_are_looked_up_where_there_is_something_to_tell_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    names = specopt.SNRSGD.names

    def counted(self: specopt.SNRSGD) -> Mapping[Tensor, str]:
        calls.append(1)
        return names(self)

    monkeypatch.setattr(specopt.SNRSGD, "names", counted)
    params = [torch.randn(8, 9, requires_grad=True) for _ in range(50)]
    specopt.SNRSGD([{"params": [param]} for param in params], lr=0.1)
    assert len(calls) <= 2
