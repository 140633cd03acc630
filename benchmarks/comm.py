"""What weights that are cut up over ranks send: counted and measured on the ranks at hand, modelled for up to 4,096 GPUs.

    python -m benchmarks.run comm                      all three
    python -m benchmarks.run comm --only modelled      no ranks are started

``counted``: small networks on 2 and 4 ranks; every all-reduce of a settled step has to be what the formula says, or the
command fails. ``measured``: steps under ``fully_shard`` with control and without, over nccl with a rank for every GPU
where there are at least two, else over gloo with two ranks on the CPU. ``modelled``: training steps of GPT-2 XL and
Llama 3 by stated bandwidths and latencies.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import comm_count, comm_scaling, comm_time, ranks, reporting
from benchmarks.comm_model import H100
from benchmarks.comm_scaling import BATCH, GOAL, MICRO, NETWORKS, TOKENS, Network, steps

PARTS = ("counted", "measured", "modelled")
BLOCK = 32
COLORS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's
DRAWN = tuple(2**i for i in range(3, 13))
"""Numbers of GPUs in the plot."""


# --- counted and measured ------------------------------------------------------------------------------------------


def counted(worlds: Sequence[int], device: str) -> reporting.Report:
    """One row for all numbers of ranks on which the same is sent."""
    merged: dict[tuple[Any, ...], list[int]] = {}
    for world in worlds:
        found = ranks.run(world, device, comm_count.count, BLOCK, device, list(comm_count.LAYOUTS), list(comm_count.KINDS))
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
    rows = ranks.run(world, device, comm_time.measure, width, rounds, device)[0]
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
    rows = comm_scaling.rows(networks, strong=strong)
    return _of_model(title, comm_scaling.COLUMNS, rows, [*_reading(rows, strong=strong)])


def _reading(rows: Sequence[Mapping[str, Any]], *, strong: bool) -> Iterable[str]:
    if crowded := [row for row in rows if not row["fits"]]:
        found = ", ".join(f"{row['name']} on {row['gpus']} GPUs" for row in crowded)
        yield f"More state than the {H100.memory / 1e9:.0f} GB of a GPU: {found}, given for the sums alone."
    if strong:
        small = sorted({row["gpus"] for row in rows if row["tokens"] < MICRO})
        if small:
            yield f"On {_listed(small)} GPUs a GPU has less than {MICRO:,} tokens of the batch."
    over = [row for row in rows if row["share"] >= 100 * GOAL]
    yield f"Sums are {'not ' if over else ''}below {GOAL:.0%} of a step in every row."
    above = [row for row in rows if row["most"] >= 100 * GOAL]
    if above:
        found = ", ".join(f"{row['name']} on {row['gpus']} ({row['layout']})" for row in above)
        yield f"At {GOAL:.0%} of the products alone or above it: {found}."


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(f"{number:,}" for number in numbers)


def sizes(networks: Sequence[Network]) -> reporting.Report:
    title = "What a settled step hands to all-reduces, on every rank"
    return _of_model(title, comm_scaling.BYTES, comm_scaling.sizes(networks), [])


def _of_model(
    title: str, columns: Mapping[str, str], rows: list[dict[str, Any]], notes: list[str]
) -> reporting.Report:
    cluster = (
        f"A model, nothing measured: H100 SXM in nodes of {H100.gpus}, {H100.nvlink / 1e9:.0f} GB/s within a node and "
        f"{H100.network / 1e9:.0f} GB/s a GPU between nodes, {H100.utilization:.0%} of {H100.peak / 1e12:.0f} Tflop/s"
    )
    return _report("cpu", title, columns, rows, notes, vars(H100)) | {"device": cluster}


def plot(path: Path, networks: Sequence[Network]) -> None:
    """Shares of a step by GPUs: of the whole one, and of its products alone."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter, ScalarFormatter
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, strong in enumerate((False, True)):
        for line, (key, label) in enumerate((("share", "of a step"), ("most", "of its products alone"))):
            axes = grid[line][column]
            for network, color in zip(networks, COLORS, strict=False):
                found = list(steps(network, DRAWN, strong=strong))
                for style, one in (("-", True), ("--", False)):
                    kept = [step for step in found if (step.shards == step.gpus) == one]
                    name = network.title if one else f"{network.title}, HSDP on {network.shards}"
                    shares = [100 * getattr(step, key) for step in kept]
                    axes.plot([step.gpus for step in kept], shares, style, color=color, marker=".", label=name)
            axes.axhline(100 * GOAL, color="#999999", linewidth=1)
            axes.set(xscale="log", yscale="log", ylabel=f"sums, {label}")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_major_formatter(PercentFormatter(decimals=3))
        grid[0][column].set_title(f"{BATCH:,} tokens a step" if strong else f"{TOKENS:,} tokens a GPU", fontsize=10)
        grid[1][column].set_xlabel("GPUs")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


# --- the command ---------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("comm", help="what sharded weights send", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", choices=PARTS, help="one of the three parts")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="on which sums are counted")
    parser.add_argument("--width", type=int, default=256, help="of the network that is timed")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=reporting.RESULTS)
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> None:
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
