"""Time every mixer against the package that publishes it and against timm's Attention, in the same run.

    python benchmarks/mixers.py [--quick] [--tokens 197 785 2305] [--device cpu] [--out FOLDER]

A configuration is a pass (forward, or forward and backward), a number of tokens, a width and a number format; it has a
process of its own. In it all layers take turns, in an order that rotates by one a round, and a yardstick around each
run brings the times to like moments (`adaptive_speed.interleaved`): read the ratios. Layers have 64 channels a head and
the sizes that the peer is given too (R = 2, 64 landmarks, k = 64, 256 features). Peers that know no class token, PVT's
and PoolFormer's, run on the patches alone, PoolFormer's on channels-first images, as it is used. `--out` writes
mixer_speed.parquet and a figure.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from timm.layers import Attention
from torch import Tensor, nn

from thesis_lib import attention, plots, processes, results, summary
from thesis_lib.adaptive_speed import interleaved
from thesis_lib.efficiency import refusal

HEAD_DIM = 64
SAMPLE = 0.01  # seconds that one sample lasts at least
OPTIONS: dict[str, tuple[str, dict]] = {  # by label; mixers that are not here run with their defaults
    "linformer": ("linformer", {"rank": 64}),
    "performer": ("performer", {"features": 256}),
    "nystrom": ("nystrom", {"landmarks": 64}),
    "mha (naive)": ("mha", {"implementation": "naive"}),
    "mha (per-head)": ("mha", {"implementation": "per-head"}),
    "sra (pvt)": ("sra", {"pooling": "pvt"}),
    "hybrid (split)": ("hybrid", {"combine": "split"}),
}
AIMS = {"performer": 2.0, "nystrom": 2.0, "linformer": 1.2, "sra": 1.2, "sra (pvt)": 1.0, "pool": 1.0, "mha": 0.98}
Layer = tuple[nn.Module, Callable[[Tensor], tuple]]  # a module and what it is called with, from tokens (B, 1 + P, D)


def tokens_alone(x: Tensor) -> tuple:
    return (x,)


def peer_sra(tokens: int, dim: int) -> Layer:
    from transformers.models.pvt.modeling_pvt import PvtAttention, PvtConfig

    side = math.isqrt(tokens - 1)
    config = PvtConfig(qkv_bias=True, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    return PvtAttention(config, dim, dim // HEAD_DIM, 2), lambda x: (x[:, 1:].contiguous(), side, side)


def peer_pool(tokens: int, dim: int) -> Layer:
    from transformers.models.poolformer.modeling_poolformer import PoolFormerPooling

    side = math.isqrt(tokens - 1)
    return PoolFormerPooling(3), lambda x: (x[:, 1:].mT.unflatten(-1, (side, side)).contiguous(),)


def peer_linformer(tokens: int, dim: int) -> Layer:
    from linformer import LinformerSelfAttention

    return LinformerSelfAttention(dim, tokens, k=64, heads=dim // HEAD_DIM), tokens_alone


def peer_performer(tokens: int, dim: int) -> Layer:
    from performer_pytorch import SelfAttention

    heads = dim // HEAD_DIM
    return SelfAttention(dim, heads=heads, dim_head=HEAD_DIM, nb_features=256, qkv_bias=True), tokens_alone


def peer_nystrom(tokens: int, dim: int) -> Layer:
    from nystrom_attention import NystromAttention

    sizes = {"heads": dim // HEAD_DIM, "dim_head": HEAD_DIM, "num_landmarks": 64}
    return NystromAttention(dim, pinv_iterations=6, residual=False, **sizes), tokens_alone


def peer_mha(tokens: int, dim: int) -> Layer:
    return Attention(dim, dim // HEAD_DIM, qkv_bias=True), tokens_alone


PEERS: dict[str, Callable[[int, int], Layer]] = {
    "mha": peer_mha,
    "sra": peer_sra,
    "pool": peer_pool,
    "linformer": peer_linformer,
    "performer": peer_performer,
    "nystrom": peer_nystrom,
}


def mixer_of(label: str) -> str:
    return OPTIONS[label][0] if label in OPTIONS else label


def ours(label: str, tokens: int, dim: int) -> Layer:
    """Build a mixer from a random layer."""
    name, options = OPTIONS.get(label, (label, {}))
    side = math.isqrt(tokens - 1)
    layer = Attention(dim, dim // HEAD_DIM, qkv_bias=True)
    return attention.get(name).from_attention(layer, (side, side), 1, **options), tokens_alone


def layers(tokens: int, dim: int) -> dict[tuple[str, str], Callable[[], Layer]]:
    """Give what builds each layer, by label and role; timm's Attention is the peer of mha."""
    labels = dict.fromkeys([*attention.MIXERS, *OPTIONS])
    found = {(label, "ours"): lambda label=label: ours(label, tokens, dim) for label in labels}
    return found | {(label, "peer"): lambda build=build: build(tokens, dim) for label, build in PEERS.items()}


def repeat(layer: nn.Module, arguments: tuple, backward: bool, times: int) -> None:
    """Run a layer some times, its gradients freed after each."""
    x = arguments[0]
    for _ in range(times):
        with torch.inference_mode(not backward):
            y = layer(*arguments)
        if backward:
            y = y[0] if isinstance(y, tuple) else y
            y.backward(torch.ones_like(y))
            layer.zero_grad(set_to_none=True)
            x.grad = None


def times_a_sample(run: Callable[[int], None], device: str) -> int:
    """Return how often to run a layer for one sample."""
    seconds = interleaved({"one": partial(run, 1)}, rounds=1, device=device)["one"]
    return max(1, math.ceil(SAMPLE / seconds.item()))


def measure(backward: bool, tokens: int, dim: int, dtype: str, batch: int, rounds: int, device: str, threads: int):
    """Time all layers in one configuration; rows with medians and 20/80 percentiles, ms."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, dim).to(device, getattr(torch, dtype))
    common = {"pass": "forward+backward" if backward else "forward", "tokens": tokens, "dim": dim, "dtype": dtype}
    common |= {"batch": batch, "device": device, "threads": threads, "metric": "latency", "unit": "ms", "n": rounds}
    runs, counts, rows = {}, {}, []
    for (label, role), build in layers(tokens, dim).items():
        try:
            layer, arguments = build()
            layer = layer.to(device, x.dtype).train(backward)
            arguments = arguments(x)
            arguments = (arguments[0].detach().requires_grad_(backward), *arguments[1:])
            run = partial(repeat, layer, arguments, backward)
            counts[label, role] = times_a_sample(run, device)
            runs[label, role] = partial(run, counts[label, role])
        except (ImportError, ValueError, RuntimeError) as error:  # not installed, a grid not served, no such kernel
            note = refusal(error) or f"{type(error).__name__}: {str(error).splitlines()[0]}"
            rows.append(common | {"mixer": label, "role": role, "value": None, "n": 0, "note": note})
    seconds = interleaved(runs, rounds=rounds, seconds=math.inf, device=device)
    for (label, role), taken in seconds.items():
        p20, median, p80 = 1e3 * np.percentile(taken, [20, 50, 80]) / counts[label, role]
        rows.append(common | {"mixer": label, "role": role, "value": median, "p20": p20, "p80": p80, "note": None})
    return rows


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Put each mixer beside its peer and timm's Attention; ratios of medians of one configuration."""
    keys = ["pass", "tokens", "dim", "dtype"]
    peer = rows[rows["role"] == "peer"].set_index([*keys, "mixer"])["value"]
    table = rows[rows["role"] == "ours"].copy()
    for column, names in (("peer", [mixer_of(label) for label in table["mixer"]]), ("mha", "mha")):
        places = pd.MultiIndex.from_frame(table[keys].assign(mixer=names))
        table[column] = peer.reindex(places).to_numpy(float)
    table["speed-up"] = table["peer"] / table["value"]
    table["of MHA"] = table["value"] / table["mha"]
    table["peer of MHA"] = table["peer"] / table["mha"]
    return table


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw times in times of timm's Attention over the tokens, ours solid and the peers' dashed."""
    plots.set_theme()
    shown = table[table["mixer"].isin(attention.MIXERS) & (table["mixer"] != "identity")]  # no variants, no floor
    long = shown.drop(columns="peer").rename(columns={"of MHA": "ours", "peer of MHA": "peer"})
    long = long.melt(["mixer", "pass", "tokens", "dim", "dtype"], ["ours", "peer"], "layer", "ratio").dropna()
    widths = list(dict.fromkeys(long[["dim", "dtype"]].itertuples(index=False, name=None)))
    passes, ticks = long["pass"].unique(), sorted(long["tokens"].unique())
    colours = {summary.label(mixer): plots.colour(mixer) for mixer in long["mixer"].unique()}
    long["mixer"] = long["mixer"].map(summary.label)
    figure, panels = plt.subplots(
        len(passes),
        len(widths),
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(2.2 + 2 * len(widths), 2.6 * len(passes)),
    )
    for (each, (dim, dtype)), ax in zip(itertools.product(passes, widths), panels.flat, strict=True):
        rows = long[(long["pass"] == each) & (long["dim"] == dim) & (long["dtype"] == dtype)]
        settings = {"palette": colours, "style": "layer", "style_order": ["ours", "peer"], "markers": True}
        sns.lineplot(rows, x="tokens", y="ratio", hue="mixer", hue_order=list(colours), ax=ax, **settings)
        ax.axhline(1, color="black", linewidth=0.6)
        ax.set(
            xscale="log", yscale="log", ylabel="time / time of timm's Attention", title=f"{each}\nd = {dim}, {dtype}"
        )
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter("{x:g}")
        handles = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    figure.legend(*handles, loc="outside right center")
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 785, 2305], help="1 + a square each")
    parser.add_argument("--dim", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--quick", action="store_true", help="forward, float32, width 384, 197 and 785 tokens, 5 rounds"
    )
    parser.add_argument("--out", type=Path, help="folder for the rows and the figure")
    options = parser.parse_args()
    passes = [False, True]
    if options.quick:
        passes, options.dim, options.dtype, options.rounds = [False], [384], ["float32"], 5
        options.tokens = [tokens for tokens in options.tokens if tokens < 1000]
    settings = (options.batch, options.rounds, options.device, options.threads)
    rows = []
    for configuration in itertools.product(passes, options.tokens, options.dim, options.dtype):
        found = processes.apart(measure, *configuration, *settings)
        rows += found
        first = found[0]
        print(
            f"\n{first['pass']}, {first['tokens']} tokens, d = {first['dim']}, {first['dtype']}, "
            f"batch {options.batch}, {options.device}, {options.threads} threads, {options.rounds} rounds"
        )
        print(f"{'mixer':15s}{'ms':>9s}{'[p20, p80]':>20s}{'peer ms':>9s}{'speed-up':>9s}{'of MHA':>8s}{'peer':>7s}")
        for row in compare(pd.DataFrame(found)).to_dict("records"):
            if pd.isna(row["value"]):
                print(f"{row['mixer']:15s} {row['note']}")
                continue
            spread, figures = f"[{row['p20']:.2f}, {row['p80']:.2f}]", [row["peer"], row["speed-up"]]
            peer, gain = ("" if pd.isna(figure) else f"{figure:.2f}" for figure in figures)
            ratio = "" if pd.isna(row["peer of MHA"]) else f"{row['peer of MHA']:.2f}"
            print(
                f"{row['mixer']:15s}{row['value']:9.2f}{spread:>20s}{peer:>9s}{gain:>9s}{row['of MHA']:8.2f}{ratio:>7s}"
            )
        for row in found:
            if row["role"] == "peer" and row["note"]:
                print(f"peer of {row['mixer']}: {row['note']}")
        if options.out:  # after each configuration: an hour's grid that is interrupted keeps what it has
            written = results.write(rows, "mixer_speed", profile="benchmark", folder=options.out)
    table = compare(pd.DataFrame(rows))
    print("\nspeed-up over the peer: median and least of all configurations")
    for label, group in table.dropna(subset="speed-up").groupby("mixer", sort=False)["speed-up"]:
        aim = f"   (aim {AIMS[label]:g})" if label in AIMS else ""
        print(f"{label:15s}{group.median():7.2f}{group.min():7.2f}{aim}")
    if options.out:
        print(written)
        draw(table, options.out / "mixer_speed")


if __name__ == "__main__":
    main()
