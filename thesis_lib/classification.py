"""The image classification study: labelled images, training from scratch, scores with intervals."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from thesis_lib.attention.moh import balance_loss
from thesis_lib.augmentation import Augmentation, whole_batches
from thesis_lib.checkpoint import digest
from thesis_lib.classifier import ViTForImageClassification, refuse_other, save
from thesis_lib.datasets import pixels
from thesis_lib.datasets.cifar10 import CIFAR10, SIZE
from thesis_lib.datasets.imagenet100 import ImageNet100
from thesis_lib.datasets.missing import choose
from thesis_lib.statistics import bootstrap_mean
from thesis_lib.trainer import make_seed, random_state_kept
from thesis_lib.training import BALANCE, fit

DATASETS = ("CIFAR-10", "ImageNet-100")


@dataclass(frozen=True)
class Images:
    """Labelled images of one split: pixels[rows] is uint8 (n, 3, S, S), labels (n,) and rows (n,) int64."""

    pixels: Any
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, items: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.pixels[self.rows[items]], torch.from_numpy(self.labels[items])


def open_splits(
    dataset: str,
    root: str | Path,
    image_size: int,
    *,
    val_share: float = 0.1,
    max_samples: int | None = None,
    on_error: str = "raise",
    seed: int = 0,
) -> dict[str, Images]:
    """Open train, val and test; val, which models are chosen by, is a part of the training images.

    CIFAR-10 has no val: `val_share` of each class, drawn by `seed`, is set aside. ImageNet-100's validation split was
    drawn from the training images when it was published; its pictures are squashed to the image size and cached.
    max_samples: the first of each split. Raises what the loaders raise, ValueError for a wrong size or share.
    """
    if choose(dataset, DATASETS, "data set") == "CIFAR-10":
        if image_size != SIZE:
            raise ValueError(f"CIFAR-10 has {SIZE} px: set image_size to {SIZE}, not {image_size}")
        opened = {split: CIFAR10(root, split) for split in ("train", "test")}
        whole = {
            split: Images(part.images, np.arange(len(part)), part.labels, part.classes)
            for split, part in opened.items()
        }
        held = held_out(whole["train"].labels, val_share, seed)
        whole = {"train": _part(whole["train"], ~held), "val": _part(whole["train"], held), "test": whole["test"]}
        return {split: _part(part, slice(max_samples)) for split, part in whole.items()}
    found = {}
    for split, published in (("train", "train"), ("val", "validation"), ("test", "test")):
        part = ImageNet100(root, published)
        cached = pixels.cache(part.sources[:max_samples], image_size, on_error=on_error)
        rows = np.flatnonzero(cached.usable)
        found[split] = Images(cached, rows, part.labels[rows], tuple(part.classes))
    return found


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Mark `share` of each class, at least one image: bool (n,). ValueError for a share outside (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"val_share={share} must lie between 0 and 1")
    rng, held = np.random.default_rng(make_seed(seed, 0, 1)), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        held[own[: max(1, round(share * len(own)))]] = True
    return held


def _part(images: Images, chosen: np.ndarray | slice) -> Images:
    return Images(images.pixels, images.rows[chosen], images.labels[chosen], images.classes)


def _identity(images: Images) -> str:
    """Hash what is learnt from: labels, and the pixels or the digests of the files that they come from."""
    whole = images.pixels
    if not isinstance(whole, Tensor):
        whole = torch.frombuffer(bytearray("".join(map(str, whole.digests)), "ascii"), dtype=torch.uint8)
    arrays = {"pixels": whole, "rows": torch.from_numpy(images.rows), "labels": torch.from_numpy(images.labels)}
    return digest(arrays.items())


def train(
    model: ViTForImageClassification,
    images: Images,
    val: Images,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.05,
    augmentation: Mapping[str, Any] | None = None,
    max_batches: int | None = None,
    **options: Any,
) -> list[dict]:
    """Train a classifier, in place, and leave the weights of the epoch with the best top-1 on `val`; return log rows.

    augmentation: what `Augmentation` takes. options: those of `training.fit` (patience, ema_decay, checkpoint, resume,
    schedule, seed, device, mixed_precision, ...). Each row has val_loss and val_top1. An incomplete last batch is left
    out. Norms, biases, class token and positions are not decayed. A checkpoint of another model, data or recipe is
    refused by a ValueError that names the differing keys.
    """
    if len(images.classes) != model.config["num_classes"]:
        raise ValueError(f"the data have {len(images.classes)} classes, the model {model.config['num_classes']}")
    augment = Augmentation(len(images.classes), **{"noise": 0.5, **(augmentation or {})})  # of the normalisation
    batches = whole_batches(len(images), batch_size, images.__getitem__, augment, max_batches)
    criterion = SoftTargetCrossEntropy()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, targets = augment(*batch)
        return criterion(model(x), targets) + BALANCE * balance_loss(model)  # nothing without routers

    def evaluate(model: nn.Module, epoch: int) -> dict[str, float]:
        table = score(model, val, batch_size=batch_size)
        return {"val_loss": table["loss"].mean(), "val_top1": table["top1"].mean()}

    recipe = {"batch_size": batch_size, "max_batches": max_batches, "augmentation": augmentation or {}}
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=("vit.pos_embed", "vit.cls_token"))
    return fit(
        model,
        loss,
        batches,
        epochs=epochs,
        lr=lr,
        weight_decay=weight_decay,
        parameters=groups,
        evaluate=evaluate,
        select="val_top1",
        config=recipe | {"config": model.config, "train": _identity(images), "val": _identity(val)},
        **options,
    )


@torch.no_grad()
def score(model: nn.Module, images: Images, *, batch_size: int = 64, device: str | None = None) -> pd.DataFrame:
    """Classify every image, on the model's device unless told otherwise: one line an image, counted within the split.

    Columns: label, predicted, top1, top5 (whether the label is among the five likeliest) and loss, the cross-entropy.
    """
    was_training, home, parts = model.training, next(model.parameters()).device, []
    device = home if device is None else torch.device(device)
    model.eval().to(device)
    for chosen in np.array_split(np.arange(len(images)), -(-len(images) // batch_size)):
        x, labels = (tensor.to(device) for tensor in images[chosen])
        logits = model(x.float() / 255).float()
        top5 = logits.topk(min(5, logits.shape[1])).indices.eq(labels[:, None]).any(1)
        columns = [labels, logits.argmax(1), top5, F.cross_entropy(logits, labels, reduction="none")]
        parts.append(torch.stack([column.double() for column in columns], 1).cpu())
    model.train(was_training).to(home)
    label, predicted, top5, loss = torch.cat(parts).numpy().T
    frame = {"image": np.arange(len(label)), "label": label.astype(int), "predicted": predicted.astype(int)}
    return pd.DataFrame(frame | {"top1": label == predicted, "top5": top5.astype(bool), "loss": loss})


def run(
    config: Mapping[str, Any], splits: Mapping[str, Images], folder: str | Path, *, seed: int = 0, **recipe: Any
) -> tuple[ViTForImageClassification, list[dict], pd.DataFrame]:
    """Train one configuration from scratch and score its best epoch on test, once: model, log rows, `score`'s table.

    folder: gets the checkpoint, from which an interrupted run goes on, and the best weights with their configuration.
    recipe: that of `train`. Raises ValueError that names the differing keys where the folder holds another model's run.
    """
    with random_state_kept(torch.device("cpu")):
        torch.manual_seed(make_seed(seed, 0, 0))
        model = ViTForImageClassification(dict(config) | {"num_classes": len(splits["train"].classes)})
    if recipe.get("resume", True):
        refuse_other(model.config, folder)
    save(model, folder)  # the configuration stands beside the checkpoint from the first epoch on
    log = train(model, splits["train"], splits["val"], seed=seed, checkpoint=Path(folder) / "checkpoint", **recipe)
    save(model, folder)
    return model, log, score(model, splits["test"], device=recipe.get("device"))


def accuracy_rows(table: pd.DataFrame, **protocol: Any) -> list[dict]:
    """Return top-1, top-5 and macro F1 with n and 95 % bootstrap intervals over the images.

    table: `score`'s, of one run, or of several stacked with a column `seed`: then scores are means over the runs, and
    images are resampled for all of them together.
    """
    runs = [part.set_index("image") for _, part in table.groupby("seed" if "seed" in table else lambda _: 0)]
    common = {"unit": "1", "runs": len(runs)} | protocol
    found = {
        name: vars(bootstrap_mean(np.mean([part[name].astype(float) for part in runs], axis=0)))
        for name in ("top1", "top5")
    }
    value, low, high = macro_f1(runs[0]["label"].to_numpy(), np.stack([part["predicted"] for part in runs]))
    found["macro_f1"] = {"value": value, "low": low, "high": high, "n": len(runs[0])}
    return [{"metric": name} | values | common for name, values in found.items()]


def macro_f1(
    labels: np.ndarray, predicted: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean F1 of the classes, averaged over runs, and its 95 % percentile bootstrap interval over images.

    labels: (n,); predicted: (runs, n). A class that neither occurs nor is predicted, as in a resample, is left out.
    """
    classes, n = np.arange(max(labels.max(), predicted.max()) + 1), len(labels)
    truth = (labels[:, None] == classes).astype(float)  # (n, C)
    guess = (predicted[..., None] == classes).astype(float)  # (runs, n, C)

    def f1(weights: np.ndarray) -> np.ndarray:  # (w, n) -> (w,)
        with np.errstate(invalid="ignore"):
            shares = [2 * (weights @ (truth * own)) / (weights @ (truth + own)) for own in guess]  # (w, C) each
        return np.mean([np.nanmean(share, axis=1) for share in shares], axis=0)

    rng, blocks = np.random.default_rng(seed), np.array_split(np.arange(resamples), -(-resamples * n // 4_000_000))
    drawn = [f1(rng.multinomial(n, np.full(n, 1 / n), size=len(block)).astype(float)) for block in blocks]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return float(f1(np.ones((1, n)))[0]), float(low), float(high)


def log_rows(log: Iterable[Mapping[str, Any]], splits: Mapping[str, Images], **protocol: Any) -> list[dict]:
    """Turn a log into rows: one an epoch of train loss, val loss and val top-1; one a run of speed and epochs."""
    log, rows = list(log), []
    kept = {"loss": ("loss", "train"), "val_loss": ("loss", "val"), "val_top1": ("top1", "val")}
    for row, (key, (metric, split)) in ((row, item) for row in log for item in kept.items() if item[0] in row):
        one = {"metric": metric, "value": row[key], "unit": "1", "split": split, "n": len(splits[split])}
        rows.append(one | {"epoch": row["epoch"]} | protocol)
    speed = {"epochs": (len(log), "1"), "seconds_per_epoch": (np.median([row["seconds"] for row in log]), "s")}
    speed["training_throughput"] = (np.median([row["images_per_s"] for row in log]), "image/s")
    return rows + [{"metric": m, "value": v, "unit": u, "n": len(log)} | protocol for m, (v, u) in speed.items()]


def summary(rows: pd.DataFrame | Iterable[Mapping]) -> pd.DataFrame:
    """Set the test scores and costs of each run side by side, one line a data set, mixer and seed."""
    rows = pd.DataFrame(rows)
    rows = rows[(rows["stage"] == "run") & rows["epoch"].isna()]
    wide = rows.pivot_table(index=["dataset", "mixer", "seed"], columns="metric", values="value", sort=False)
    return wide.reset_index().rename_axis(columns=None)
