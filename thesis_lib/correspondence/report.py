"""Correspondence results as rows, and what the figures of single pairs need, as plain tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from thesis_lib.correspondence.cache import Features
from thesis_lib.correspondence.features import foreground, principal
from thesis_lib.correspondence.matching import similarity_map
from thesis_lib.correspondence.pck import FACTORS, pck_rows
from thesis_lib.datasets.pairs import Pairs

DETAILED = ("SPair-71k", "test")  # whose score is also split by category, key-point and factor


def data_rows(listed: Mapping[tuple[str, str], Pairs]) -> list[dict]:
    """Return a row for each data set and split: its usable pairs, of n listed."""
    rows = []
    for (dataset, split), pairs in listed.items():
        n, skipped = len(pairs) + len(pairs.skipped), len(pairs.skipped)
        where = {"dataset": dataset, "split": split, "stage": "data", "skipped": skipped}
        rows.append({"metric": "pairs", "value": len(pairs), "unit": "1", "n": n} | where)
    return rows


def model_rows(
    points: Mapping[str, Mapping[tuple[str, str], pd.DataFrame]],
    about: Mapping[str, Mapping[str, Any]],
    tests: Mapping[tuple[str, str], Pairs],
    *,
    alphas: Sequence[float],
    **protocol: Any,
) -> list[dict]:
    """Return the PCK of every model on every set of pairs, in detail on SPair-71k's test split."""
    rows = []
    for model, found in points.items():
        for (dataset, split), table in found.items():
            where = {"dataset": dataset, "split": split, "skipped": len(tests[dataset, split].skipped)}
            by = ("category", "keypoint", *FACTORS) if (dataset, split) == DETAILED else ()
            rows += pck_rows(table, alphas=alphas, by=by, model=model, **where, **(protocol | dict(about[model])))
    return rows


def absent_rows(absent: Mapping[str, str], pairs: Pairs, **protocol: Any) -> list[dict]:
    """Return a row without a value for every system whose weights are not present."""
    where = {
        "metric": "pck",
        "value": None,
        "unit": "1",
        "n": len(pairs),
        "dataset": pairs.dataset,
        "split": pairs.split,
    }
    where |= {"stage": "system", "note": "weights not present"}
    return [protocol | where | {"model": model, "backbone": weights} for model, weights in absent.items()]


def log_rows(logs: Mapping[str, list[dict]], trn: Pairs, val: Pairs, **protocol: Any) -> list[dict]:
    """Return training losses and validation PCK by epoch."""
    rows = []
    for run, log in logs.items():
        where = protocol | {"unit": "1", "dataset": trn.dataset, "stage": "trained", "model": run}
        for one in log:
            epoch = {"epoch": one["epoch"]} | where
            rows.append({"metric": "loss", "value": one["loss"], "n": len(trn), "split": trn.split} | epoch)
            rows.append({"metric": "val pck", "value": one["pck"], "n": len(val), "split": val.split} | epoch)
    return rows


def point_tables(points: Mapping[str, Mapping[tuple[str, str], pd.DataFrame]]) -> pd.DataFrame:
    """Put all point tables under each other: who found what, for distances and paired comparisons."""
    parts = [table.assign(model=model, dataset=dataset, split=split)
             for model, found in points.items() for (dataset, split), table in found.items()]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def look(pairs: Pairs, maps: Features, key: str, place: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for a pair the similarities of its first point (H, W), and both images' components (3, h, w) in [0, 1].

    Components are the three leading ones of both images' foreground together; what is background is 0.
    """
    pair = pairs.pairs[place]
    both = [maps.map(image, key) for image in (pair.source, pair.target)]
    sizes = [tuple(map(int, pairs.sizes[image])) for image in (pair.source, pair.target)]
    heat = similarity_map(*both, torch.from_numpy(pair.source_points[0]), *sizes)
    stacked = torch.stack(both)
    inside = foreground(stacked)  # (2, h, w)
    scores = principal(stacked, 3)  # (2, 3, h, w)
    flat = scores.movedim(1, -1)[inside] if inside.any() else scores.movedim(1, -1).flatten(0, 2)
    low, high = flat.quantile(0.02, dim=0), flat.quantile(0.98, dim=0)
    shown = (scores - low[:, None, None]) / (high - low).clamp(min=1e-6)[:, None, None]
    return heat, *(shown.clamp(0, 1) * inside[:, None]).unbind(0)


def gallery(
    pairs: Pairs, tables: Mapping[str, pd.DataFrame], chosen: Iterable[int], maps: Features, key: str
) -> pd.DataFrame:
    """Collect what the figures of single pairs need, without torch: pictures, true and found points, heat, components.

    tables: point tables by model. maps, key: the features whose similarities and components are shown. One row a pair,
    model and point; pictures and maps stand on a pair's first row alone.
    """
    rows = []
    for place in chosen:
        pair = pairs.pairs[place]
        heat, first, second = look(pairs, maps, key, place)
        arrays = {"heat": heat, "source_components": first, "target_components": second}
        packed = {name: a.float().cpu().numpy().astype(np.float16).tobytes() for name, a in arrays.items()}
        packed |= {f"{name}_shape": list(a.shape) for name, a in arrays.items()}
        pictures = {"source": pairs.images[pair.source].read_bytes(), "target": pairs.images[pair.target].read_bytes()}
        for model, table in tables.items():
            part = table[table["pair"] == place]
            for i, row in enumerate(part.itertuples()):
                record = {"pair": place, "category": pair.category, "model": model, "keypoint": row.keypoint}
                record |= {"source_x": pair.source_points[i, 0], "source_y": pair.source_points[i, 1]}
                record |= {"x": row.x, "y": row.y, "true_x": row.true_x, "true_y": row.true_y}
                record |= {"distance": row.distance, "box": row.box}
                rows.append(record | (pictures | packed if i == 0 and model == next(iter(tables)) else {}))
    return pd.DataFrame(rows)
