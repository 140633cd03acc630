"""What sharded weights send: counted and measured on the ranks at hand, modelled for up to 4,096 GPUs.

    python -m benchmarks.run comm                      all three
    python -m benchmarks.run comm --only modelled      no ranks are started

``counted``: small networks on 2 and 4 ranks; every all-reduce of a settled step has to be what the formula says, or the
command fails. ``measured``: steps under ``fully_shard`` with control and without, over nccl with a rank for every GPU
where there are at least two, else over gloo with two ranks on the CPU. ``modelled``: training steps of GPT-2 XL and
Llama 3 by stated bandwidths and latencies.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import comm_count, comm_scaling, comm_time, ranks, reporting
from benchmarks.comm_model import H100
from benchmarks.comm_scaling import BATCH, GOAL, GPUS, MICRO, NETWORKS, TOKENS, Network, Step, steps
from specopt.tracker.common import COLD_STEPS

PARTS = ("counted", "measured", "modelled")
BLOCK = 32
WARM_UP = COLD_STEPS + 2
"""Steps before steps are timed: in the cold ones a weight takes more pairs of products."""
COLORS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's
DRAWN = tuple(2**i for i in range(3, 13))
"""Numbers of GPUs in the plot."""


# --- counted and measured ------------------------------------------------------------------------------------------


def counted(worlds: Sequence[int], device: str) -> reporting.Report:
    """One row for all numbers of ranks on which the same is sent."""
    merged: dict[tuple[Any, ...], list[int]] = {}
    for world in worlds:
        found = ranks.run(world, device, comm_count.count, BLOCK, device, comm_count.CASES)
        assert all(rows == found[0] for rows in found), "ranks have sent different things"
        for row in found[0]:
            merged.setdefault(tuple(row.items()), []).append(world)
    rows = [dict(items) | {"ranks": ", ".join(map(str, found))} for items, found in merged.items()]
    title = f"Sums of a settled step, block {BLOCK}: every payload is as the formula says"
    notes = ["`max_passes` is 1, and with several triplets 2."]
    settings = {"ranks": list(worlds), "block": BLOCK}
    return _report(device, title, comm_count.COLUMNS, rows, notes, settings)


def measured(width: int, rounds: int, device: str) -> reporting.Report:
    world = torch.cuda.device_count() if device == "cuda" else 2
    rows = ranks.run(world, device, comm_time.measure, width, rounds, WARM_UP, device)[0]
    backend = "nccl" if device == "cuda" else "gloo"
    title = f"Steps under fully_shard: GPT of 2 blocks, width {width}, {world} ranks over {backend}, float32"
    notes = [
        f"{rounds} rounds after the first steps, in which optimizers take turns; medians of the first rank. ± is the "
        "distance of the quartiles, per cent of the median. Sums are timed by themselves."
    ]
    if device == "cpu":
        notes.append("nccl: not measured (it takes two GPUs).")
    columns = {key: head for key, head in comm_time.COLUMNS.items() if any(key in row for row in rows)}
    settings = {"width": width, "rounds": rounds, "ranks": world}
    return _report(device, title, columns, rows, notes, settings)


def _report(
    device: str, title: str, columns: Mapping[str, str], rows: list[dict[str, Any]], notes: list[str], settings: Any
) -> reporting.Report:
    report = reporting.about("comm", torch.device(device))
    return report | {"title": title, "settings": settings, "columns": columns, "notes": notes, "results": rows}


# --- modelled ------------------------------------------------------------------------------------------------------


def modelled(networks: Sequence[Network], *, strong: bool) -> reporting.Report:
    tokens = f"{BATCH:,} tokens in all" if strong else f"{TOKENS:,} tokens a GPU"
    title = f"NormScaleAdamW in a training step of {tokens}"
    found = [step for network in networks for step in steps(network, GPUS, strong=strong)]
    rows = [comm_scaling.row(step) for step in found]
    slow = replace(H100, network=H100.network / H100.gpus)
    slowest = [step for network in networks for step in steps(network, GPUS, strong=strong, cluster=slow)]
    notes = [*_reading(rows), _by_block(found), _with_one_card(max(slowest, key=lambda step: step.share))]
    return _of_model(title, comm_scaling.COLUMNS, rows, notes)


def _reading(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if crowded := [row for row in rows if not row["fits"]]:
        yield f"More state than the {H100.memory / 1e9:.0f} GB of a GPU, given for the sums alone: {_named(crowded)}."
    if small := sorted({row["gpus"] for row in rows if row["tokens"] < MICRO}):
        found = " and ".join(f"{number:,}" for number in small)
        yield f"On {found} GPUs each has less than {MICRO:,} tokens of the batch."
    of = {"share": "a step", "shared": "a step, in the weights' group", "most": "the products"}
    for key, what in of.items():
        over = [row for row in rows if row[key] >= 100 * GOAL]
        yield f"Not below {GOAL:.0%} of {what}: {_named(over) or 'none'}."


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['name']} on {row['gpus']:,} GPUs ({row['layout']})" for row in rows)


def _by_block(found: Sequence[Step]) -> str:
    times = [step.by_block / (step.now + step.late) for step in found]
    return f"Sums of each block by themselves would take {min(times):.2g} to {max(times):.2g} times as long."


def _with_one_card(step: Step) -> str:
    found = f"{step.network.title} on {step.gpus:,} GPUs in shards on {step.shards:,}"
    return (
        f"With one network card a node in the place of {H100.gpus}, at most {100 * step.share:.2g}% of a step: {found}."
    )


def sizes(networks: Sequence[Network]) -> reporting.Report:
    title = "What a settled step hands to all-reduces, on every rank"
    return _of_model(title, comm_scaling.BYTES, [comm_scaling.sizes(network) for network in networks], [])


def _of_model(title: str, columns: Mapping[str, str], rows: list[dict[str, Any]], notes: list[str]) -> reporting.Report:
    cluster = (
        f"A model, nothing measured: H100 SXM in nodes of {H100.gpus}, {H100.nvlink / 1e9:.0f} GB/s within a node and "
        f"{H100.network / 1e9:.0f} GB/s a GPU between nodes, {H100.utilization:.0%} of {H100.peak / 1e12:.0f} Tflop/s"
    )
    return _report("cpu", title, columns, rows, notes, vars(H100)) | {"device": cluster}


def plot(path: Path, networks: Sequence[Network]) -> None:
    """Shares by GPUs: of a step, and of its products alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, strong in enumerate((False, True)):
        for line, key in enumerate(("share", "most")):
            _lines(grid[line][column], networks, key, strong=strong)
            grid[line][column].set_ylabel(f"sums / {'products' if line else 'step'} (%)")
        grid[0][column].set_title(f"{BATCH:,} tokens a step" if strong else f"{TOKENS:,} tokens a GPU", fontsize=10)
        grid[1][column].set_xlabel("GPUs")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def _lines(axes: Any, networks: Sequence[Network], key: str, *, strong: bool) -> None:
    """One for each network, and a broken one for its replicas."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    for network, color in zip(networks, COLORS, strict=True):
        found = list(steps(network, DRAWN, strong=strong))
        for replicas in (False, True):
            kept = [step for step in found if (step.shards < step.gpus) == replicas]
            label = f"{network.title}, HSDP, shards on {network.shards}" if replicas else network.title
            shares = [100 * getattr(step, key) for step in kept]
            axes.plot([step.gpus for step in kept], shares, ".--" if replicas else ".-", color=color, label=label)
    axes.axhline(100 * GOAL, color="#999999", linewidth=1)
    axes.set(xscale="log", yscale="log", xticks=GPUS)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


# --- the command ---------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("comm", help="what sharded weights send", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", choices=PARTS, help="one of the three parts")
    parser.add_argument(
        "--ranks", type=int, nargs="+", choices=(2, 4, 8), default=[2, 4], help="that sums are counted on"
    )
    parser.add_argument("--width", type=reporting.whole(1), default=256, help="of the network that is timed")
    parser.add_argument("--rounds", type=reporting.whole(1), default=20)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder of JSON file and plot")
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> None:
    if arguments.width % 4:
        raise SystemExit(f"comm: --width must be a multiple of 4, the heads, got {arguments.width}")
    parts = PARTS if arguments.only is None else (arguments.only,)
    device = ranks.device_of_ranks(arguments.device)
    if "counted" in parts:
        worlds = [world for world in arguments.ranks if device == "cpu" or world <= torch.cuda.device_count()]
        reporting.publish(counted(worlds, device), "comm_counted", arguments.out)
    if "measured" in parts:
        kind = "gpu" if device == "cuda" else "cpu"
        reporting.publish(measured(arguments.width, arguments.rounds, device), f"comm_{kind}", arguments.out)
    if "modelled" in parts:
        networks = tuple(NETWORKS.values())
        reporting.publish(sizes(networks), "comm_bytes", arguments.out)
        reporting.publish(modelled(networks, strong=False), "comm_weak", arguments.out)
        reporting.publish(modelled(networks, strong=True), "comm_strong", arguments.out)
        plot(arguments.out / "comm.png", networks)
