"""Train students on image pairs: on true key-points, or on what a frozen teacher's cached features say of a pair."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thesis_lib import statistics
from thesis_lib.attention import suggest
from thesis_lib.attention.soft import without_autocast
from thesis_lib.checkpoint import digest, images_digest
from thesis_lib.correspondence import objectives, pck
from thesis_lib.correspondence.cache import features
from thesis_lib.correspondence.evaluate import FeatureMatcher, evaluate
from thesis_lib.correspondence.students import Student
from thesis_lib.datasets.pairs import Pairs
from thesis_lib.training import Batches, fit

LOSSES = ("cross_entropy", "mse")


def retrieval_pairs(embeddings: Tensor, count: int, *, neighbours: int = 10, seed: int = 0) -> np.ndarray:
    """Choose pairs of images without labels: each of `count` random images with one of its nearest others.

    embeddings: global (n, D). An image is never its own neighbour. Returns (count, 2) positions.
    Raises ValueError for fewer than two images.
    """
    if len(embeddings) < 2:
        raise ValueError("retrieval needs at least two images")
    unit = F.normalize(embeddings.float(), dim=1)
    near = (unit @ unit.mT).fill_diagonal_(-torch.inf).topk(min(neighbours, len(unit) - 1), dim=1).indices
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(unit), (count,), generator=generator)
    second = near[first, torch.randint(near.shape[1], (count,), generator=generator)]
    return torch.stack([first, second], dim=1).numpy()


def pair_index(pairs: Pairs) -> np.ndarray:
    """Return the (n, 2) image positions of a set's pairs: weak supervision, for they show the same category."""
    return np.array([(pair.source, pair.target) for pair in pairs.pairs], np.int64)


def pair_points(pairs: Pairs) -> Tensor:
    """Return all true points, (n, 2, P, 2) in [0, 1] of their images, source first, NaN where a pair has fewer."""
    most = max(len(pair.keypoints) for pair in pairs.pairs)
    points = torch.full((len(pairs), 2, most, 2), torch.nan)
    for row, pair in enumerate(pairs.pairs):
        for side, (place, known) in enumerate(((pair.source, pair.source_points), (pair.target, pair.target_points))):
            share = (known + 0.5) / pairs.sizes[place]
            points[row, side, : len(known)] = torch.from_numpy(share.astype(np.float32))
    return points


def train(
    student: Student,
    pairs: Pairs,
    pixels: Any,
    *,
    teacher: Callable[[int], Tensor] | None = None,
    teacher_name: str = "",
    index: np.ndarray | None = None,
    loss: str = "cross_entropy",
    sampling: str = "full",
    positions: int = 64,
    temperature: float = 0.01,
    epochs: int = 5,
    batch_size: int = 8,
    lr: float = 1e-4,
    val: tuple[Pairs, Sequence[int] | None] | None = None,
    max_batches: int | None = None,
    config: Mapping | None = None,
    **options: Any,
) -> list[dict]:
    """Train what `students.tune` chose, in place, and return one log row an epoch; the best PCK on val is kept.

    pixels: uint8 images (n, 3, S, S) at the student's size, in the order of `pairs.images`.
    teacher(place): the combined map (C, h, w) of an image; with it the student learns the teacher's similarities
    (softmax cross-entropy or MSE of maps) at positions chosen by `sampling`. teacher_name: what tells it from others.
    Without a teacher the student learns the true points: softmax cross-entropy, or MSE of the soft-argmax.
    index: other pairs of images (n, 2) for the teacher to judge (`retrieval_pairs`). val: pairs, and positions of some.
    options: those of `thesis_lib.training.fit` (checkpoint, resume, seed, device, schedule, ...).
    """
    _check(loss, sampling, teacher, index)
    known = pair_points(pairs) if index is None else torch.full((len(index), 2, 1, 2), torch.nan)
    index = pair_index(pairs) if index is None else index
    categories = pairs.categories

    def gather(rows: np.ndarray, epoch: int) -> dict[str, Any]:
        first, second = index[rows].T
        batch: dict[str, Any] = {"images": pixels[np.concatenate([first, second])], "points": known[rows]}
        batch["rows"] = torch.from_numpy(np.stack([rows, np.full_like(rows, epoch)], axis=1))
        batch["categories"] = [categories[place] for place in (*first, *second)]
        if teacher is not None:
            batch["teacher"] = torch.stack([teacher(int(place)) for place in (*first, *second)]).half()
        return batch

    def batches(epoch: int, generator: torch.Generator) -> Batches:
        order = torch.randperm(len(index), generator=generator).numpy()
        return Batches(order, batch_size, lambda rows: gather(rows, epoch), max_batches)

    def objective(model: Student, batch: dict[str, Any]) -> Tensor:
        return _objective(model, batch, teacher is not None, loss, sampling, positions, temperature)

    about = {"loss": loss, "sampling": sampling, "positions": positions, "temperature": temperature}
    about |= {"batch_size": batch_size, "teacher": teacher_name if teacher is not None else None}
    about |= {"key": student.key, "images": images_digest(pixels)}
    about["pairs"] = digest({"index": torch.from_numpy(index), "points": known}.items())
    return fit(
        student,
        objective,
        batches,
        epochs=epochs,
        lr=lr,
        evaluate=None if val is None else lambda model, epoch: {"pck": validate(model, *val)},
        select=None if val is None else "pck",
        config=about | dict(config or {}),
        **options,
    )


def _objective(model: Student, batch: dict[str, Any], *settings: Any) -> Tensor:
    found = model(batch["images"].float() / 255, batch["categories"])["student"]  # (2b, C, h, w)
    with without_autocast(found):  # cosines over a temperature of 0.01 need more digits than half precision has
        return _score(*found.float().chunk(2), batch, *settings)


def _score(
    source: Tensor,
    target: Tensor,
    batch: dict[str, Any],
    taught: bool,
    loss: str,
    sampling: str,
    count: int,
    temperature: float,
) -> Tensor:
    grid, points = tuple(target.shape[2:]), batch["points"]
    generator = torch.Generator().manual_seed(int(batch["rows"].sum()))
    if not taught:
        at, weights = objectives.positions("ground_truth", source, points[:, 0], count, generator)
        own, truth = objectives.similarities(source, target, at), points[:, 1].nan_to_num(0.5)
        score = objectives.point_cross_entropy if loss == "cross_entropy" else objectives.point_mse
        return score(own, grid, truth, weights, temperature=temperature)
    teacher_source, teacher_target = batch["teacher"].float().chunk(2)
    at, weights = objectives.positions(sampling, teacher_source, points[:, 0], count, generator)
    wanted = objectives.similarities(teacher_source, teacher_target, at)
    wanted = objectives.to_grid(wanted, tuple(teacher_target.shape[2:]), grid)
    own = objectives.similarities(source, target, at)
    if loss == "mse":
        return objectives.map_mse(own, wanted, weights)
    return objectives.softmax_cross_entropy(own, wanted, weights, temperature)


@torch.no_grad()
def validate(student: Student, pairs: Pairs, chosen: Sequence[int] | None = None, *, alpha: float = 0.1) -> float:
    """Return a student's PCK per point within alpha of the box, of some pairs or of all, keeping no features."""
    like = next(student.parameters())
    device = str(like.device)
    options = {"categories": pairs.categories, "use_cache": False, "progress": False}
    # In the precision that it is scored in later; in half precision pixels tie.
    with without_autocast(like), features(student, pairs.images, **options) as maps:
        table = evaluate(FeatureMatcher(pairs, [(maps, "student")], device=device), chosen=chosen)
    return float(pck.correct(table, alpha, pck.Protocol()).mean())


def expand(grid: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Give every run of a grid: values that are lists are gone through, all with all; "name" joins what varies."""
    varied = [name for name, value in grid.items() if isinstance(value, list)]
    for values in itertools.product(*(grid[name] for name in varied)):
        chosen = dict(zip(varied, values, strict=True))
        yield {**grid, **chosen, "name": "-".join([*([grid["name"]] if "name" in grid else []), *map(str, values)])}


def paired(table: Any, reference: Any, alpha: float = 0.1) -> statistics.Paired:
    """Compare two point tables of the same pairs by their pairs' shares of correct points."""
    shares = []
    for one in (table, reference):
        hit = pck.correct(one, alpha, pck.Protocol())
        shares.append(one.assign(hit=hit).groupby("pair")["hit"].mean())
    if not shares[0].index.equals(shares[1].index):
        raise ValueError("the two tables are of different pairs")
    return statistics.paired_difference(*(share.to_numpy() for share in shares))


def _check(loss: str, sampling: str, teacher: object, index: object) -> None:
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}{suggest(loss, LOSSES)}; known: {', '.join(LOSSES)}")
    if sampling not in objectives.SAMPLINGS:
        raise ValueError(f"unknown sampling {sampling!r}{suggest(sampling, objectives.SAMPLINGS)}")
    if index is not None and (teacher is None or sampling == "ground_truth"):
        raise ValueError("pairs found by retrieval have no true points: they need a teacher and another sampling")
