"""What sharded weights send: the formula beside what is counted, and the model of many GPUs in its limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import comm, comm_count, comm_scaling, comm_time, ranks, reporting, run, workloads
from benchmarks.collectives import Collective
from benchmarks.comm_bytes import Asks, Block, Numbers, Payload, Weight, frobenius, norm_scale, penalty, sent
from benchmarks.comm_model import H100, RING, TREE, Group, Protocol, all_gather, all_reduce, ring, tree
from benchmarks.comm_scaling import NETWORKS, Step, steps

COLUMNS, BOTH = frozenset({1}), frozenset({0, 1})
SINGLE, DOUBLE = torch.float32, torch.float64


# --- bytes: the formula is what is counted -------------------------------------------------------------------------


def counted(world: int, cases: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    found = ranks.run(world, "cpu", comm_count.count, 8, "cpu", cases)  # a payload that differs is an error there
    assert all(rows == found[0] for rows in found)
    rows: list[dict[str, Any]] = found[0]
    return rows


LINES = (
    *(("GPT, fully_shard", kind) for kind in ("NormScaleAdamW", "Frobenius", "SNRSGD")),
    ("convolutions, fully_shard", "SNRSGD"),
    ("convolutions, by input channels", "NormScaleAdamW"),
    ("convolutions, by input channels", "SNRSGD"),
)


def test_every_payload_of_a_settled_step_on_a_line_of_ranks_is_as_predicted() -> None:
    found = {(row["name"], row["rule"]): row for row in counted(2, LINES)}
    assert len(found) == len(LINES) + 3  # SNRSGD sends in two ways
    # 8 matrices of 7 columns, and the head (8, 24), whose short side is cut; n is 24, of two matrices 96
    expected = {"reductions": 2, "now_bytes": 8 * (8 * 7**2 + 8 * 24), "late_bytes": 4 * (6 * 24 + 2 * 96) * 8}
    assert expected.items() <= found["GPT, fully_shard", "NormScaleAdamW"].items()


def test_every_payload_on_a_plane_of_ranks_is_as_predicted() -> None:
    rows = counted(4, [("GPT, HSDP", "Frobenius"), ("GPT, fully_shard x TP", "NormScaleAdamW")])
    assert [row["reductions"] for row in rows] == [1, 3]  # one more for the head, which fewer ranks share


@pytest.mark.full
def test_every_payload_of_every_case_is_as_predicted() -> None:
    on_lines = sum(not layout.plane for layout in comm_count.LAYOUTS.values())
    for world, layouts in ((2, on_lines), (4, len(comm_count.LAYOUTS))):
        rows = counted(world, comm_count.CASES)
        found = {(row["name"], row["rule"]): row for row in rows}
        assert len(rows) == len(found) == 5 * layouts
        assert found["GPT in bfloat16, fully_shard", "NormScaleAdamW"]["late_dtype"] == "float32"
        assert found["convolutions, fully_shard", "cap of rank 2"]["reductions"] == 3  # a returned product at once too


def test_a_payload_that_is_not_as_predicted_is_an_error() -> None:
    calls = [Collective("allreduce_", 8, DOUBLE)]
    comm_count.check(calls, [Payload(8, DOUBLE, "all")], "a step")
    for wrong in ([], [Payload(16, DOUBLE, "all")], [Payload(8, SINGLE, "all")]):
        with pytest.raises(AssertionError, match="a step: the formula says"):
            comm_count.check(calls, wrong, "a step")


@pytest.mark.parametrize(
    ("weight", "asks"),
    [
        (Weight((400, 300)), Asks((Numbers(28 * 28, DOUBLE),), Numbers(300 * 32, SINGLE))),
        (Weight((400, 300), COLUMNS), Asks((Numbers(28 * 28, DOUBLE),), Numbers(400 * 32, SINGLE))),
        (Weight((300, 300), COLUMNS), Asks((Numbers(300 * 28, SINGLE),), Numbers(300 * 32, SINGLE))),
        (Weight((400, 300), BOTH), Asks((Numbers(400 * 28, SINGLE),), Numbers(300 * 32, SINGLE))),
        (Weight((400, 30, 3, 3)), Asks((Numbers(28 * 28, DOUBLE),), Numbers(270 * 32, SINGLE))),
        (Weight((400, 64)), Asks((Numbers(64 * 64, DOUBLE),))),
        (Weight((64, 400)), Asks((Numbers(64 * 400, SINGLE),))),
        (Weight((64, 400), COLUMNS), Asks((Numbers(64 * 64, DOUBLE),))),
    ],
)
def test_norm_scaling_asks_for_gram_matrices_where_ranks_have_whole_rows(weight: Weight, asks: Asks) -> None:
    assert norm_scale(weight) == asks


@pytest.mark.parametrize(("dtype", "sums"), [(torch.bfloat16, SINGLE), (SINGLE, SINGLE), (DOUBLE, DOUBLE)])
def test_products_are_summed_in_the_dtype_that_they_are_made_in(dtype: torch.dtype, sums: torch.dtype) -> None:
    late = norm_scale(Weight((400, 300), dtype=dtype)).late
    assert late is not None and late.dtype == sums


def test_several_triplets_take_a_wider_block_and_a_second_product() -> None:
    assert Block.of(32, 16) == (56, 8)
    asks = norm_scale(Weight((400, 300)), rank=16)
    product = Numbers(300 * 64, SINGLE)
    assert asks == Asks((Numbers(56 * 56, DOUBLE), product), product)


def test_a_half_product_is_a_gram_matrix_where_its_rows_are_a_dimension_that_is_cut() -> None:
    wide = Numbers(64 * 64, DOUBLE)
    assert penalty(Weight((400, 300)), right=True).now == (wide,)
    assert penalty(Weight((400, 300)), right=False).now == (Numbers(300 * 32, SINGLE),)
    assert penalty(Weight((400, 300), COLUMNS), right=False).now == (wide,)
    assert penalty(Weight((400, 30, 3, 3), COLUMNS), right=False).now == (Numbers(270 * 32, SINGLE),)


def test_what_the_same_ranks_sum_at_once_goes_in_one_all_reduce_in_the_widest_dtype() -> None:
    plane = Weight((400, 300), BOTH, "plane")
    found = sent([Weight((400, 300)), plane, Weight((64, 400))], norm_scale)
    assert found == [
        Payload(8 * (28 * 28 + 64 * 400), DOUBLE, "all"),
        Payload(4 * 400 * 28, SINGLE, "plane"),
        Payload(4 * 300 * 32, SINGLE, "all", late=True),
        Payload(4 * 300 * 32, SINGLE, "plane", late=True),
    ]
    assert sent([Weight((400, 300))] * 3, frobenius) == [Payload(24, DOUBLE, "all")]
    assert sent([], norm_scale) == []


# --- the model, in its limits --------------------------------------------------------------------------------------

MANY = Group.packed(4096)


def test_one_rank_and_no_bytes_take_no_time() -> None:
    assert all_reduce(1e9, Group.packed(1)) == all_gather(1e9, Group.packed(1)) == all_reduce(0, MANY) == 0


def test_a_large_sum_is_bound_by_the_bandwidth_and_a_small_one_by_the_hops() -> None:
    size = 1e13
    assert all_reduce(size, MANY) == pytest.approx(2 * 4095 / 4096 * size / 400e9, rel=0.01)
    assert all_gather(size, Group.packed(8)) == pytest.approx(7 / 8 * size / 450e9, rel=0.01)
    small = all_reduce(1e-9, MANY)
    assert small == pytest.approx(14e-6 + 2 * (7 * 1.25e-6 + 9 * 8.5e-6))
    assert all_reduce(1e3, MANY) == pytest.approx(small, rel=0.01)


def test_a_tree_is_quicker_for_small_sums_over_many_nodes_and_a_ring_for_large_ones() -> None:
    assert all_reduce(1e6, MANY) == min(tree(1e6, MANY, one) for one in TREE)
    assert all_reduce(1e6, MANY) < min(ring(1e6, MANY, 2, one) for one in RING)
    assert all_reduce(1e13, MANY) == min(ring(1e13, MANY, 2, one) for one in RING)


def test_hops_between_nodes_are_as_many_as_nodes_in_each_trip_around() -> None:
    counting = Protocol(0.0, 1.0, 1000.0, 1.0)
    # 2 (R - 1) = 30 hops of which N / R = 1/8 cross
    assert ring(0, Group.packed(16), 2, counting) == pytest.approx(30 * (7 / 8 + 1000 / 8))
    assert ring(0, Group.packed(8), 2, counting) == 14
    assert ring(0, Group(4, 1), 1, counting) == 3000
    assert tree(0, Group(5, 2), counting) == 2 * (1 + 3 * 1000)


def test_a_group_has_the_network_cards_of_its_gpus() -> None:
    found = [group.bandwidth(H100) for group in (Group.packed(8), Group.packed(16), Group(64, 1), Group(64, 2))]
    assert found == [450e9, 400e9, 50e9, 100e9]
    assert Group(2, 8).bandwidth(replace(H100, network=100e9)) == 450e9


@pytest.mark.parametrize("count", [0, 12])
def test_ranks_that_do_not_fill_their_nodes_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"ranks must be 1 or more, and above 8 fill their nodes, got {count}"):
        Group.packed(count)


def test_a_longer_message_and_more_ranks_never_take_less() -> None:
    times = [[all_reduce(10.0**e, Group.packed(8 * 2**i)) for i in range(10)] for e in range(3, 11)]
    assert all(row == sorted(row) for row in times)
    assert all(list(column) == sorted(column) for column in zip(*times, strict=True))


def test_the_page_states_the_constants_of_the_model() -> None:
    page = reporting.PAGES[1].read_text()
    for name, protocol in zip(("ring, LL128", "ring, Simple", "tree, LL128", "tree, Simple"), RING + TREE, strict=True):
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        stated = [float(cell) for cell in line.split("|")[2:-1]]
        assert stated == pytest.approx(
            [1e6 * protocol.start, 1e6 * protocol.node, 1e6 * protocol.network, protocol.share], abs=0.005
        )


# --- training steps on many GPUs -----------------------------------------------------------------------------------


def test_networks_have_the_published_numbers_of_parameters() -> None:
    found = {name: network.parameters for name, network in NETWORKS.items()}
    assert found == {"gpt2-xl": 1_557_611_200, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}
    assert [len(network.controlled) for network in NETWORKS.values()] == [48 * 4, 32 * 7, 80 * 7]
    eight = NETWORKS["llama3-8b"]
    assert eight.parameters - eight.multiplied == 128256 * 4096


def test_bytes_of_a_network_are_those_of_its_shapes() -> None:
    eight = NETWORKS["llama3-8b"]
    assert eight.bytes(late=False) == 224 * 28 * 28 * 8
    assert eight.bytes(late=True) == 32 * (6 * 4096 + 14336) * 32 * 4


def test_sums_go_over_the_ranks_that_share_a_weight() -> None:
    network = NETWORKS["gpt2-xl"]
    one, replicated, alone = (Step(network, *sizes, 8192) for sizes in ((512, 512), (512, 8), (8, 8)))
    assert one.late > replicated.late == alone.late
    assert one.now > replicated.now == alone.now
    assert replicated.own > alone.own  # gradients are summed over the replicas


def test_late_sums_cost_nothing_while_there_is_room_beside_products_and_all_where_there_is_none() -> None:
    network = NETWORKS["gpt2-xl"]
    roomy, full = Step(network, 8, 8, 8192), Step(network, 4096, 4096, 8192)
    assert roomy.own + roomy.late < roomy.compute and roomy.behind == 0
    assert full.own > full.compute and full.behind == pytest.approx(full.late)
    tight = replace(roomy, tokens=round(roomy.tokens * (roomy.own + roomy.late / 2) / roomy.compute))
    assert tight.own == roomy.own < tight.compute
    assert tight.behind == pytest.approx(tight.late / 2, rel=0.2)


def test_shares_are_of_a_step_with_the_sums_in_it() -> None:
    step = Step(NETWORKS["llama3-8b"], 64, 64, 8192)
    assert step.compute == pytest.approx(6 * 7_504_924_672 * 8192 / (0.4 * 989e12))
    assert step.step == step.compute and step.behind == 0
    assert step.share == pytest.approx(step.now / (step.compute + step.now))
    waited = step.now + step.late
    assert step.shared == step.most == pytest.approx(waited / (step.compute + waited))
    assert Step(NETWORKS["llama3-8b"], 64, 64, 2 * 8192).own == pytest.approx(2 * step.own)


@pytest.mark.parametrize("strong", [False, True])
def test_sums_are_below_one_per_cent_of_a_step_at_every_size(strong: bool) -> None:
    found = [step for network in NETWORKS.values() for step in steps(network, comm.DRAWN, strong=strong)]
    assert {step.gpus for step in found} == set(comm.DRAWN)
    assert max(step.share for step in found) < comm_scaling.GOAL
    assert max(step.shared for step in found) < comm_scaling.GOAL


def test_sums_in_the_group_of_the_weights_or_beside_no_collectives_of_fsdp_take_no_smaller_share() -> None:
    found = [step for network in NETWORKS.values() for step in steps(network, comm.DRAWN, strong=True)]
    assert all(step.share <= step.shared * (1 + 1e-9) and step.shared <= step.most for step in found)
    assert max(step.most for step in found) > comm_scaling.GOAL  # the page names where


def test_one_sum_of_all_blocks_takes_less_than_one_of_each() -> None:
    found = [step for network in NETWORKS.values() for step in steps(network, comm.DRAWN, strong=False)]
    assert all(step.by_block > 2 * (step.now + step.late) for step in found)


# --- the command ---------------------------------------------------------------------------------------------------


def test_what_is_modelled_is_written_drawn_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["comm", "--only", "modelled", "--out", str(tmp_path)])
    assert (tmp_path / "comm.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    reports = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(reports) == {"comm_bytes", "comm_weak", "comm_strong"}
    for name, report in reports.items():
        assert {"benchmark", "command", "date", "torch", "title", "columns", "settings", "notes"} <= set(report)
        assert "nothing measured" in report["device"] and not report["gpu"]
        assert all(set(report["columns"]) <= set(row) for row in report["results"])
        lines = reporting.markdown(report).split("\n")
        assert sum(line.startswith("| ") for line in lines) == 2 + len(report["results"])
        assert f"{report['title']}; {report['device']}" in shown, name
    places = {(row["name"], row["gpus"]) for row in reports["comm_weak"]["results"]}
    titles = [network.title for network in NETWORKS.values()]
    assert places == {(title, count) for title in titles for count in (8, 64, 512, 4096)}
    assert "Not below 1% of a step: none." in reports["comm_strong"]["notes"]


def test_steps_with_control_and_without_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "WARM_UP", 1)
    words = ["comm", "--only", "measured", "--width", "72", "--rounds", "2", "--device", "cpu"]
    run.main([*words, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "comm_cpu.json").read_text())
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == [peer.name for peer in comm_time.PEERS]
    for row in rows.values():
        assert row["step_ratio"] == pytest.approx(row["step_ms"] / rows[row["base"]]["step_ms"])
    assert rows["NormScaleAdamW"]["late_ms"] > 0 and rows["NormScaleAdamW"]["pairs"] >= 1
    assert "late_ms" not in rows["SNRSGD"] and "now_ms" not in rows["AdamW"]
    page = reporting.markdown(report)
    assert "(ms)" not in page and "nccl: not measured" in page


def test_the_network_that_is_timed_runs_on_the_device_that_it_is_on() -> None:
    model = workloads.gpt(width=8, tokens=4, length=6).model.to("meta")
    assert model(torch.zeros(2, 6, dtype=torch.long, device="meta")).shape == (2, 6, 4)


def test_steps_that_send_in_turn_are_judged_by_the_mean_of_both_medians() -> None:
    taken = comm_time.Run(comm_time.PEERS[-1], None, torch.optim.SGD([torch.zeros(1)]), [[], []])
    for times in taken.times.values():
        times += [1.0, 5.0, 2.0, 7.0, 3.0]
    assert taken.medians() == dict.fromkeys(taken.times, 4.0)  # of 1, 2, 3 and of 5, 7


def test_what_is_sent_by_several_numbers_of_ranks_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(world: int, device: str, *args: Any) -> list[Any]:
        rows = [{"name": "a", "now_bytes": 8}, {"name": "b", "now_bytes": 8 * world}]
        return [rows] * world

    monkeypatch.setattr(ranks, "run", start)
    found = comm.counted([2, 4], "cpu")["results"]
    assert [(row["name"], row["ranks"]) for row in found] == [("a", "2, 4"), ("b", "2"), ("b", "4")]


def rank_of(message: str) -> tuple[int, str]:
    if message == "fail" and dist.get_rank() == 1:
        raise ValueError("rank one gives up")
    return dist.get_rank(), message


def test_results_of_ranks_come_in_their_order() -> None:
    assert ranks.run(2, "cpu", rank_of, "hello") == [(0, "hello"), (1, "hello")]


def test_a_rank_that_fails_is_an_error_with_its_traceback() -> None:
    with pytest.raises(Exception, match="rank one gives up"):
        ranks.run(2, "cpu", rank_of, "fail")


def test_ranks_are_on_gpus_only_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert ranks.device_of_ranks() == ranks.device_of_ranks("cpu") == "cpu"
    with pytest.raises(SystemExit, match="--device cuda: ranks take two GPUs or more, and torch sees 1"):
        ranks.device_of_ranks("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (ranks.device_of_ranks(), ranks.device_of_ranks("cpu")) == ("cuda", "cpu")
