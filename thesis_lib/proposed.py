"""The search for the proposed model: what each layer is worth, the best plans exactly, and the rule that takes one.

A plan's loss is predicted as the sum of what its changes cost one at a time, its time as the sum of its blocks' times.
Under that model `pareto_plans` is exact; how far the model itself holds is for the measured candidates to say.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from tqdm.auto import tqdm

from thesis_lib import perceptual
from thesis_lib.adaptive_speed import interleaved, passes
from thesis_lib.distillation import distil
from thesis_lib.embeddings import Embeddings
from thesis_lib.layer_plan import DROP, KEEP, Plan, apply_plan
from thesis_lib.perceptual import Metric
from thesis_lib.statistics import paired_difference
from thesis_lib.trainer import train_each

HALVE = "halve"  # the action that is no layer's own: from this block on the patches' grid is halved
Predicted = tuple[float, float, Plan]  # seconds, loss, plan


def planned(metric: Metric, plan: Plan) -> Metric:
    """Return a copy of a metric whose backbone follows the plan, in eval mode."""
    vit = apply_plan(copy.deepcopy(metric.backbone), **plan.described())
    return Metric(vit, metric.feature, metric.normalize).eval()


def distil_plans(
    teacher: Metric,
    plans: Sequence[Plan],
    pixels: Any,
    targets: Embeddings,
    val: Any,
    *,
    device: str,
    folder: Path,
    **options: Any,
) -> list[Metric]:
    """Distil a student of each plan, from the teacher's weights; on a CPU side by side (`trainer.train_each`).

    folder: where each has its checkpoint. options: those of `distillation.distil`; every parameter is trained. The
    students are in eval mode and need no gradients.
    """
    options |= {"trainable": "all", "device": device, "progress": False}
    runs = []
    for plan in plans:
        checkpoint = folder / f"{plan.label.replace('/', '_')}.checkpoint"
        runs.append((planned(teacher, plan), pixels, targets, val, options | {"checkpoint": checkpoint}))
    return train_each(_distilled, runs, device=device)


def _distilled(run: tuple[Metric, Any, Embeddings, Any, dict]) -> Metric:
    student, pixels, targets, val, options = run
    distil(student, pixels, targets, val, **options)
    return student.eval().requires_grad_(False)


def judged(metric: nn.Module, dataset: Any, pixels: Any, **options: Any) -> tuple[Tensor, np.ndarray]:
    """Embed a NIGHTS data set's images and score its triplets: embeddings (m, D), 2AFC scores (n,)."""
    rows = np.flatnonzero(pixels.usable[dataset.index].all(axis=1))
    needed, inverse = np.unique(dataset.index[rows], return_inverse=True)
    embeddings = perceptual.embed_pixels(metric, pixels, indices=needed, progress=False, **options)
    distances = perceptual.triplet_distances(embeddings, inverse.reshape(-1, 3))
    return embeddings, perceptual.two_afc_scores(*distances, dataset.right_vote[rows]).numpy()


def sensitivity(
    teacher: Metric, dataset: Any, pixels: Any, mixers: Iterable[str], *, progress: bool = True, **options: Any
) -> list[dict]:
    """Change one layer of the teacher at a time, train nothing, and return what it does to the images of `dataset`.

    Rows by `layer` (from 0) and `action` (a mixer, "drop", or "halve": from this layer on): embedding_distance, the
    mean 1 - cosine to the teacher's embedding, and 2afc_loss with its paired 95 % interval. options: of `embed_pixels`.
    """
    depth = len(teacher.backbone.blocks)
    before, scores = judged(teacher, dataset, pixels, **options)
    changes = [(layer, action) for layer in range(depth) for action in (*mixers, DROP)]
    changes += [(layer, HALVE) for layer in range(1, depth - 1)]
    rows = []
    for layer, action in tqdm(changes, unit="change", disable=not progress):
        changed = planned(teacher, _one_change(depth, layer, action))
        after, own = judged(changed, dataset, pixels, **options)
        where = {"unit": "1", "layer": layer, "action": action}
        apart = perceptual.distance(before, after).mean().item()
        rows.append({"metric": "embedding_distance", "value": apart, "n": len(before)} | where)
        gap = paired_difference(scores, own)
        rows.append(
            {"metric": "2afc_loss", "value": gap.difference, "low": gap.low, "high": gap.high, "n": gap.n} | where
        )
    return rows


def _one_change(depth: int, layer: int, action: str) -> Plan:
    actions = [KEEP] * depth
    if action == HALVE:
        return Plan(tuple(actions), layer)
    actions[layer] = action
    return Plan(tuple(actions))


def block_seconds(
    teacher: Metric, mixers: Mapping[bool, Iterable[str]], images: Tensor, *, rounds: int = 9, seconds: float = 20.0
) -> dict[tuple[str, bool, bool], float]:
    """Measure what a block takes, seconds a batch, by (mixer, on the halved grid, is the last), all timed in turn.

    mixers: those to try beside attention, by whether the grid is halved. images: (B, 3, H, W), floats in [0, 1].
    What the last block takes includes all around the blocks (patch embedding, halving, normalisation), and it is cut to
    the class token where `class_token` can: a plan takes the sum over its blocks.
    """
    between, vit, tasks = (DROP,) * (len(teacher.backbone.blocks) - 2), teacher.backbone, {}
    for small, names in mixers.items():
        cells, merge = vit.patch_embed.num_patches // (4 if small else 1), 0 if small else None
        tokens = torch.randn(len(images), vit.num_prefix_tokens + cells, vit.embed_dim, device=images.device)
        for name in (KEEP, *names):
            block = planned(teacher, Plan((name, *between, KEEP), merge)).backbone.blocks[0]
            ending = planned(teacher, Plan((KEEP, *between, name), merge))
            ending.backbone.blocks[0] = ending.backbone.blocks[0].halving if small else nn.Identity()
            tasks |= passes({(name, small, False): partial(Block.forward, block)}, tokens)  # without its halving
            tasks |= passes({(name, small, True): ending.embed_unchecked}, images)
    times = interleaved(tasks, rounds=rounds, seconds=seconds, device=images.device)
    return {key: float(np.median(spent)) for key, spent in times.items()}


def pareto_plans(
    loss: Mapping[tuple[int, str], float],
    halving: Mapping[int, float],
    seconds: Mapping[tuple[str, bool, bool], float],
    *,
    whole_grid: bool = True,
) -> list[Predicted]:
    """Find all plans that no other beats in predicted time and loss, fastest first, exactly.

    loss: by (layer, action), 0 where attention stays; "drop" for every layer. halving: the loss by the block before
    which the grid is halved. seconds: as `block_seconds` gives them; a mixer that is not in it is not used there.
    whole_grid: whether plans that never halve it are among them.
    Dynamic programming over the layers: both sums are additive, so a beginning that another beats in both can be
    dropped. It is done once for each last block and each halving, because these change what the other blocks take.
    """
    depth, found = 1 + max(layer for layer, _ in loss), []
    actions = {small: [name for name, s, last in seconds if s == small and not last] for small in (False, True)}

    def choices(layer: int, small: bool, last: bool) -> list[tuple[float, float, str]]:
        return [(seconds[name, small, last], loss.get((layer, name), 0.0), name) for name in actions[small]]

    for merge in (*[None] * whole_grid, *halving):
        for last in range(1 if merge is None else merge + 1, depth):
            front, empty = [], [(0.0, halving.get(merge, 0.0), ())]  # beginnings with and without a block that stays
            for layer in range(last):
                stay = choices(layer, merge is not None and layer >= merge, False)
                gone = [] if layer == merge else [(0.0, loss[layer, DROP], DROP)]
                front = _best([*_joined(front, stay + gone), *_joined(empty, stay)])
                empty = _joined(empty, gone)
            rest = sum(loss[layer, DROP] for layer in range(last + 1, depth))
            for spent, lost, chosen in _joined(front, choices(last, merge is not None, True)):
                found.append((spent, lost + rest, Plan(chosen + (DROP,) * (depth - last - 1), merge)))
    return _best(found)


def _joined(beginnings: Sequence[tuple], choices: Sequence[tuple]) -> list[tuple]:
    return [(s + t, a + b, (*before, name)) for s, a, before in beginnings for t, b, name in choices]


def _best(items: Iterable[tuple]) -> list[tuple]:
    """Keep what no other item beats in its first two numbers, by the first."""
    kept = []
    for item in sorted(items, key=lambda item: item[:2]):
        if not kept or item[1] < kept[-1][1]:
            kept.append(item)
    return kept


def within_budgets(front: Sequence[Predicted], shares: Iterable[float], whole: float) -> list[Predicted]:
    """Take, for each share of the time `whole`, the plan of least predicted loss that needs no more; each plan once."""
    chosen = []
    for share in shares:
        able = [item for item in front if item[0] <= share * whole]
        if able and (best := min(able, key=lambda item: item[1])) not in chosen:
            chosen.append(best)
    return chosen


def on_front(table: pd.DataFrame) -> np.ndarray:
    """Say of each candidate (columns accuracy, seconds) whether no other is as good in both and better in one."""
    accuracy, seconds = (table[name].to_numpy(float) for name in ("accuracy", "seconds"))
    no_worse = (accuracy[None] >= accuracy[:, None]) & (seconds[None] <= seconds[:, None])
    better = (accuracy[None] > accuracy[:, None]) | (seconds[None] < seconds[:, None])
    return ~(no_worse & better).any(axis=1)


def select(table: pd.DataFrame, teacher: str, *, within: float = 0.02) -> str:
    """Return the name of the fastest candidate on the Pareto front that loses at most `within` to the teacher.

    table: columns name, accuracy (2AFC on val), seconds (measured), the teacher among them: where nothing else
    qualifies it is chosen itself. Of candidates equal in both numbers the first. ValueError without the teacher or for
    a name that stands twice.
    """
    if (table["name"] == teacher).sum() != 1 or table["name"].duplicated().any():
        raise ValueError(f"the candidates must have one row each, and one of the teacher {teacher!r}")
    least = table.loc[table["name"] == teacher, "accuracy"].iloc[0] - within
    able = table[on_front(table) & (table["accuracy"] >= least - 1e-9)]
    return able.loc[able["seconds"].idxmin(), "name"]
