"""Train and judge what `attention_transfer` makes: classifiers of labelled images, and perceptual metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F

from thesis_lib import perceptual
from thesis_lib.attention.moh import balance_loss
from thesis_lib.attention_transfer import AttentionTransfer
from thesis_lib.augmentation import Augmentation, whole_batches
from thesis_lib.checkpoint import digest, images_digest
from thesis_lib.distillation import trainable_parameters
from thesis_lib.statistics import bootstrap_mean
from thesis_lib.trainer import train_each
from thesis_lib.training import BALANCE, Batches, fit, two_afc


def train_classifier(
    model: AttentionTransfer,
    pixels: Any,
    labels: np.ndarray,
    val: tuple[Any, np.ndarray],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    atd_weight: float = 3.0,
    augmentation: Mapping[str, Any] | None = None,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    beta2: float = 0.999,
    ema_decay: float | None = None,
    max_batches: int | None = None,
    **options: Any,
) -> list[dict]:
    """Train in place on cached pixels with labels (n,): task loss + atd_weight * attention loss; one log row an epoch.

    val: pixels and labels by whose accuracy the best epoch is chosen. lr is the rate itself: the recipes' blr times the
    batch over all processes / 256. layer_decay: timm's layer-wise decay, whose last block has decay^1 and head 1.
    augmentation: what `Augmentation` takes. options: those of `training.fit` (schedule, warmup_epochs, min_lr,
    checkpoint, resume, seed, device, mixed_precision, ...). An incomplete last batch of an epoch is left out.
    ValueError: an epoch has no whole batch, mixup an odd batch, or min_lr lies above lr.
    """
    student, answers = model.student, torch.from_numpy(np.asarray(labels, np.int64))
    if options.get("min_lr", 0.0) > lr:
        raise ValueError(f"min_lr={options['min_lr']} lies above lr={lr:.3g}: a smaller batch needs a smaller one")
    augment, criterion = Augmentation(student.num_classes, **(augmentation or {})), SoftTargetCrossEntropy()
    pick = lambda rows: (pixels[rows], answers[rows])
    batches = whole_batches(len(labels), batch_size, pick, augment, max_batches)

    def loss(trained: AttentionTransfer, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = augment(*batch)
        features, attention = trained.features(images)
        return criterion(trained.head(features), targets) + atd_weight * attention + BALANCE * balance_loss(trained)

    def evaluate(judged: AttentionTransfer, epoch: int) -> dict[str, float]:
        logits, right = predict(judged, val[0], batch_size=batch_size), torch.as_tensor(val[1])
        top = (logits.argmax(1) == right).double().mean()
        return {"accuracy": float(top), "val_loss": float(F.cross_entropy(logits, right))}

    taught = "none"
    if model.teacher is not None:
        fixed = {} if model.teacher.fixed is None else {"fixed": model.teacher.fixed}
        taught = digest((model.teacher.backbone.state_dict() | fixed).items())
    groups = param_groups_layer_decay(
        student, weight_decay, student.no_weight_decay(), layer_decay=layer_decay, verbose=False
    )
    return fit(
        model,
        loss,
        batches,
        epochs=epochs,
        lr=lr,
        weight_decay=weight_decay,
        betas=(0.9, beta2),
        ema_decay=ema_decay,
        parameters=groups,
        evaluate=evaluate,
        select="accuracy",
        config={
            "batch_size": batch_size,
            "atd_weight": atd_weight,
            "augmentation": augmentation or {},
            "transfer": model.options,
            "teacher": taught,
            "labels": digest([("labels", answers)]),
        },
        **options,
    )


def predict(model: nn.Module, pixels: Any, *, batch_size: int = 64, device: str | None = None) -> Tensor:
    """Return the logits (n, classes) of cached pixels on the CPU, in float32; `model` is in eval mode meanwhile.

    device: where to compute; None: where the model is. The result does not depend on batch_size.
    """
    was_training, home = model.training, next(model.parameters()).device
    where = home if device is None else torch.device(device)
    model.to(where).eval()
    try:
        with torch.no_grad():
            parts = [
                model(pixels[rows.numpy()].to(where).float() / 255).float().cpu()
                for rows in torch.arange(len(pixels)).split(batch_size)
            ]
    finally:
        model.to(home).train(was_training)
    return torch.cat(parts)


def ensemble(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Average two models' logits (n, classes), and their probabilities: scores (n, classes) by kind of average.

    The published code has no ensemble; which of the two the paper means could not be checked.
    """
    probabilities = (first.softmax(-1) + second.softmax(-1)) / 2
    return {"logits": (first + second) / 2, "probabilities": probabilities}


def accuracy_row(scores: Tensor, labels: np.ndarray, **protocol: Any) -> dict:
    """Return a result row: top-1 accuracy of scores (n, classes) with n and a 95 % bootstrap interval."""
    right = (scores.argmax(1).numpy() == np.asarray(labels)).astype(float)
    return {"metric": "accuracy", "unit": "1"} | vars(bootstrap_mean(right)) | protocol


def attention_gap(model: AttentionTransfer, images: Tensor) -> float:
    """Return the mean KL divergence, nats a row, from the teacher's maps to the student's, over the layers distilled.

    images: (B, 3, H, W) in [0, 1], on the model's device. For a mixer, on its own key set.
    """
    if model.copies or model.tensor != "map" or model.teacher is None:
        raise ValueError(f"only distilled maps are compared, not those of mode {model.options['mode']!r}")
    was_training, rate = model.training, model.drop_path
    model.drop_path, model.excess = 0.0, True
    try:
        with torch.no_grad():
            return float(model.train().features(images)[1]) / len(model.teacher.layers)
    finally:
        model.excess = False
        model.train(was_training).drop_path = rate


def distil_metric(
    student: perceptual.Metric,
    teacher: perceptual.Metric,
    pixels: Any,
    val: Any,
    val_pixels: Any,
    *,
    attention: float = 1.0,
    embedding: float = 1.0,
    layers: list[int] | None = None,
    heads: list[int] | int | None = None,
    epochs: int,
    batch_size: int,
    lr: float,
    max_batches: int | None = None,
    **options: Any,
) -> list[dict]:
    """Train a metric in place to attend and to embed as an MHA teacher does; return one log row an epoch.

    Loss: attention * L_attn + embedding * mean(1 - cos of the embeddings, "cls"). The teacher embeds each image once;
    in training it runs for L_attn alone. pixels: training images. val: NIGHTS triplets of `val_pixels`, by whose 2AFC
    the best epoch is chosen. Every parameter that the embedding depends on is trained.
    options: those of `training.fit`. ValueError: both weights are 0, or an embedding is not the centred class token.
    """
    if attention <= 0 and embedding <= 0:
        raise ValueError("attention and embedding are both 0: there is nothing to learn")
    if any(metric.feature != "cls" or not metric.normalize for metric in (student, teacher)):
        raise ValueError('student and teacher must have feature="cls" and normalize=True')
    mode = "distill" if attention else "none"
    model = AttentionTransfer(student.backbone, teacher.backbone, mode=mode, layers=layers, heads=heads)
    model.reads = "token"  # whatever the backbone would pool for a head
    where = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    home = next(teacher.parameters()).device
    targets = perceptual.embed_pixels(teacher, pixels, batch_size=batch_size, device=where, progress=False)
    teacher.to(home)

    def gather(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return pixels[rows], targets[rows]

    def batches(epoch: int, generator: torch.Generator) -> Batches:
        return Batches(torch.randperm(len(pixels), generator=generator).numpy(), batch_size, gather, max_batches)

    def loss(trained: AttentionTransfer, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, target = batch
        features, gap = trained.features(images.float() / 255)
        cls = features[:, 0]  # (b, D); centred, its cosine is what `Metric` measures
        # Even at weight 0 the second part keeps every parameter in the graph, as gradient averaging needs.
        alike = perceptual.distance(cls - cls.mean(-1, keepdim=True), target).mean()
        return attention * gap + embedding * alike + BALANCE * balance_loss(trained)

    def evaluate(judged: AttentionTransfer, epoch: int) -> dict[str, float]:
        return {"2afc": two_afc(perceptual.Metric(judged.student), val_pixels, val, batch_size=batch_size)}

    trainable = set(trainable_parameters(student, "all"))
    for name, parameter in student.backbone.named_parameters():
        parameter.requires_grad_(name in trainable)
    try:
        return fit(
            model,
            loss,
            batches,
            epochs=epochs,
            lr=lr,
            evaluate=evaluate,
            config={
                "batch_size": batch_size,
                "attention": attention,
                "embedding": embedding,
                "transfer": model.options,
                "teacher": digest(teacher.backbone.state_dict().items()),
                "images": images_digest(pixels),
            },
            **options,
        )
    finally:
        student.backbone.requires_grad_(True)


def distil_each(
    students: Sequence[tuple[perceptual.Metric, Mapping[str, Any]]], *data: Any, **options: Any
) -> list[perceptual.Metric]:
    """Train several metrics by `distil_metric`, and return them; on a CPU side by side (`trainer.train_each`).

    students: each with options of its own. data: teacher, pixels, val and val_pixels. options: those of all. The
    metrics returned are on the CPU.
    """
    common = {"progress": False} | options
    runs = [(student, data, {**common, **own}) for student, own in students]
    return train_each(_distilled, runs, device=options.get("device"))


def _distilled(run: tuple[perceptual.Metric, tuple, dict[str, Any]]) -> perceptual.Metric:
    student, data, options = run
    distil_metric(student, *data, **options)
    student.zero_grad()
    return student.cpu()  # a GPU need not hold all of them
