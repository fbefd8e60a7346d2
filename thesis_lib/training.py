"""The one training loop, on Hugging Face Accelerate, and DreamSim's tuning of a backbone on 2AFC triplets.

A run is a sequence of epochs. All that is random in an epoch (order of the data, dropout) is drawn from seeds made of
(seed, epoch), so an epoch that starts from the checkpoint of the one before repeats what an unbroken run does there.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from thesis_lib import backbone as backbones
from thesis_lib import perceptual
from thesis_lib.attention.moh import balance_loss
from thesis_lib.checkpoint import Checkpoint, digest, images_digest, model_config
from thesis_lib.trainer import Trainer, accelerator_on, free, make_generator, make_seed, random_state_kept, share

SCHEDULES = ("constant", "cosine")
RESUME = (True, False, "allow", "must")


def learning_rate(
    epoch: float,
    *,
    epochs: int,
    lr: float,
    schedule: str = "constant",
    warmup_epochs: float = 0.0,
    min_lr: float = 0.0,
) -> float:
    """Give the rate after `epoch` epochs, a fraction within one: linear from 0, then constant or half a cosine.

    The cosine goes from `lr` at the end of the warm-up to `min_lr` at `epochs` (MAE, He et al. 2022).
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "constant":
        return lr
    share = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


class Batches(Sequence):
    """Mini-batches gathered when asked for: the i-th is `gather(order[i * batch_size : (i + 1) * batch_size])`."""

    def __init__(
        self, order: np.ndarray, batch_size: int, gather: Callable[[np.ndarray], Any], max_batches: int | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.order, self.batch_size, self.gather = order, batch_size, gather
        self.count = min(math.ceil(len(order) / batch_size), max_batches or len(order))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < self.count:
            raise IndexError(f"batch {i} of {self.count}")
        return self.gather(self.order[i * self.batch_size : (i + 1) * self.batch_size])


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[int, torch.Generator], Iterable],
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: str = "constant",
    warmup_epochs: float = 0.0,
    min_lr: float = 0.0,
    grad_clip: float | None = None,
    ema_decay: float | None = None,
    parameters: Sequence[dict] | None = None,
    evaluate: Callable[[nn.Module, int], Mapping[str, float | None]] | None = None,
    eval_every: int = 1,
    select: str | None = "2afc",
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    resume: bool | str = True,
    config: Mapping | None = None,
    seed: int = 0,
    device: str | None = None,
    mixed_precision: str = "no",
    progress: bool = True,
) -> list[dict]:
    """Train what requires a gradient with AdamW; return one log row an epoch and leave the best weights in `model`.

    The rows hold epoch (from 1), loss (mean over the images), lr (of the last step), seconds and images_per_s (of the
    training alone) and what `evaluate` gave. The model ends in eval mode on the device it came on.

    loss(model, batch): the mean over a batch that is on the training device, a scalar.
    batches(epoch, generator): the batches of an epoch, with a length; what is random in them comes from `generator`.
        Under torchrun each of n processes takes every n-th batch and gradients are averaged: n processes with batches
        of b do what one does with batches of n*b. An incomplete last round is left out.
    parameters: AdamW's groups; "lr_scale" in one multiplies its rate (layer-wise decay). Default: one group.
    ema_decay: e = d*e + (1-d)*w after each step, from the initial weights; e is then evaluated, selected and returned.
    evaluate(model, epoch): values for the row, every `eval_every` epochs and after the last; None: not measured now.
    select: the first epoch with the highest value of this name is the best; None: the last.
    patience: stop after so many epochs without a new best (early stopping); None: never.
    checkpoint: folder, rewritten after each epoch. resume: True or "allow" goes on from the checkpoint where there is
        one, "must" needs one, False replaces it. On a CPU a resumed run gives the same weights and rows, times apart,
        bit for bit. One of another configuration is refused; `config` adds plain values that must agree (data, batch
        size, loss). With a constant schedule more epochs may be asked for than at first; of a cosine that is over, only
        what it gave is kept. With a warning, a run that other code began goes on, and one that other code finished is
        moved aside and, except for "must", made anew.
    device: "cpu", "cuda", ...; None: the accelerator where there is one. mixed_precision: "no", "bf16", "fp16".

    RuntimeError: loss or weights are not finite, or the checkpoint cannot be written; the last good one is kept.
    """
    _check_options(epochs, eval_every, warmup_epochs, schedule, resume, checkpoint)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient")
    home = trainable[0].device
    accelerator = accelerator_on(device, mixed_precision)
    rank, world = accelerator.process_index, accelerator.num_processes
    groups = [dict(group) for group in parameters] if parameters else trainable
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    rate = {"lr": lr, "schedule": schedule, "warmup_epochs": warmup_epochs, "min_lr": min_lr}
    rate_at = partial(learning_rate, epochs=epochs, **rate)
    steps = len(batches(1, make_generator(seed, 1))) // world
    if steps < 1:
        raise ValueError(f"an epoch has fewer batches than there are processes ({world}): lower batch_size")

    if ema_decay and (left := ema_decay ** (epochs * steps)) > 0.05:
        about = f"{left:.0%} of the average after {epochs * steps} steps are the initial weights"
        warnings.warn(f"ema_decay={ema_decay} is too high for this run: {about}", RuntimeWarning, stacklevel=2)

    def over(epoch: int, best: tuple[int, float] | None) -> bool:
        return epoch >= epochs or bool(patience and best and epoch - best[0] >= patience)

    run = state = None
    if checkpoint is not None:
        own = {**rate, "weight_decay": weight_decay, "betas": betas, "grad_clip": grad_clip, "ema_decay": ema_decay}
        own |= {"eval_every": eval_every, "select": select, "seed": seed, "mixed_precision": mixed_precision}
        own |= {"patience": patience} if patience else {}  # checkpoints from before it existed stay valid
        own |= {"processes": world, "steps": steps, "epochs": "any" if schedule == "constant" else epochs}
        run = Checkpoint(checkpoint, {**own, "task": config or {}, "model": model_config(model, optimizer)})
        state = run.load() if resume else None
    if state and state["epoch"] > epochs:
        held = f"the checkpoint {checkpoint} holds {state['epoch']} epochs"
        raise ValueError(f"{held}, more than the {epochs} asked for; {run.advice}")
    if state:
        state = run.accept(state, over(state["epoch"], state["best"]) and resume != "must", accelerator)
    shown = progress and accelerator.is_main_process
    bar = tqdm(total=epochs * steps, desc="training", unit="batch", disable=not shown)
    try:
        trainer = Trainer(accelerator, model, loss, optimizer, grad_clip, ema_decay, run, bar)
        if state:
            trainer.restore(state)
            bar.n = bar.initial = len(trainer.rows) * steps
        with random_state_kept(accelerator.device):
            while not over(len(trainer.rows), trainer.best):
                epoch = len(trainer.rows) + 1
                rates = [rate_at(epoch - 1 + step / steps) for step in range(steps)]
                own_batches = share(batches(epoch, make_generator(seed, epoch)), rank, world)
                set_seed(make_seed(seed, epoch, 1 + rank))
                row = trainer.train(epoch, own_batches, rates)
                if evaluate and (epoch % eval_every == 0 or epoch == epochs):
                    row |= trainer.evaluate(evaluate, epoch, select)
                trainer.close_epoch(row, select)
        trainer.finish(final=schedule != "constant")
    finally:
        bar.close()
        model.to(home).eval().zero_grad()
        free(accelerator)
    return trainer.rows


def _check_options(
    epochs: int,
    eval_every: int,
    warmup_epochs: float,
    schedule: str,
    resume: bool | str,
    checkpoint: str | Path | None,
) -> None:
    if schedule not in SCHEDULES:
        near = get_close_matches(str(schedule), SCHEDULES) or SCHEDULES
        raise ValueError(f"there is no schedule {schedule!r}; near ones: {', '.join(near)}")
    if resume not in RESUME:
        raise ValueError(f'resume must be True, False, "allow" or "must", not {resume!r}')
    if resume == "must" and not (checkpoint and Checkpoint(checkpoint, {}).path.exists()):
        raise FileNotFoundError(f"there is no checkpoint to go on from in {checkpoint}")
    if epochs < 1 or eval_every < 1 or not 0 <= warmup_epochs <= epochs:
        given = f"epochs={epochs}, eval_every={eval_every}, warmup_epochs={warmup_epochs}"
        raise ValueError(f"epochs and eval_every must be at least 1 and the warm-up within the epochs; got {given}")


def triplet_batches(
    pixels: Any, index: np.ndarray, votes: np.ndarray, batch_size: int, *, max_batches: int | None = None
) -> Callable[[int, torch.Generator], Batches]:
    """Make `fit`'s `batches`: images (3b, 3, S, S) uint8, all references first, then left, then right; votes (b,).

    index: (n, 3) rows of `pixels` for reference, left, right; votes: (n,) shares of votes for right. Triplets with an
    image that `pixels` skipped are left out.
    """
    whole = pixels.usable[index].all(axis=1)
    index, votes = np.asarray(index)[whole], torch.as_tensor(np.asarray(votes)[whole], dtype=torch.float32)

    def gather(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return pixels[index[rows].T.reshape(-1)], votes[rows]  # (b, 3) -> (3b,)

    def batches(epoch: int, generator: torch.Generator) -> Batches:
        return Batches(torch.randperm(len(index), generator=generator).numpy(), batch_size, gather, max_batches)

    return batches


def two_afc(metric: nn.Module, pixels: Any, triplets: Any, *, batch_size: int = 64) -> float:
    """Score a metric, on the device it is on, by 2AFC on `triplets`: index (n, 3) into `pixels`, right_vote (n,).

    Each image is embedded once; triplets with an image that `pixels` skipped are left out.
    """
    whole = pixels.usable[triplets.index].all(axis=1)
    index, votes = np.asarray(triplets.index)[whole], np.asarray(triplets.right_vote)[whole]
    needed, inverse = np.unique(index, return_inverse=True)
    device = next(metric.parameters()).device
    embeddings = perceptual.embed_pixels(
        metric, pixels, indices=needed, batch_size=batch_size, device=device, progress=False
    )
    return perceptual.two_afc_score(*perceptual.triplet_distances(embeddings, inverse.reshape(index.shape)), votes)


BALANCE = 0.01  # MoH's weight of its routers' load balance (arXiv 2410.11842, section 4.1); nothing without routers


def lora_tune(
    backbone: nn.Module,
    pixels: Any,
    train: Any,
    val: Any,
    *,
    val_pixels: Any = None,
    feature: str = "cls",
    epochs: int = 8,
    batch_size: int = 32,
    lr: float = 3e-4,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.2,
    margin: float = 0.05,
    max_batches: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[nn.Module, list[dict]]:
    """Tune LoRA adapters on 2AFC triplets; return a copy of the backbone with the best merged in, and the log rows.

    train, val: triplets with index (n, 3) into `pixels` (val's into `val_pixels`, where given) and right_vote (n,).
    options: those of `fit` (checkpoint, resume, device, mixed_precision, ...).
    The recipe of DreamSim's single-branch models (Fu et al. 2023): Adam with betas (0.5, 0.999) at a constant rate,
    hinge loss on cosine distances of embeddings that are not centred. 2AFC on val is the metric's as used, centred.
    """
    with random_state_kept(torch.device("cpu")):
        torch.manual_seed(make_seed(seed, 0, 0))  # the adapters' initial values
        tuned = backbones.add_lora(copy.deepcopy(backbone), rank=rank, alpha=alpha, dropout=dropout)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, votes = batch
        reference, left, right = model.embed(images.float() / 255).chunk(3)  # (3b, 3, S, S) -> three of (b, D)
        d_left, d_right = perceptual.distance(reference, left), perceptual.distance(reference, right)
        return perceptual.hinge_loss(d_left, d_right, votes, margin=margin) + BALANCE * balance_loss(model)

    def evaluate(model: nn.Module, epoch: int) -> dict[str, float]:
        metric = perceptual.Metric(model.backbone, feature=feature, normalize=True)
        return {"2afc": two_afc(metric, pixels if val_pixels is None else val_pixels, val, batch_size=3 * batch_size)}

    data = {"train": train.index, "train votes": train.right_vote, "val": val.index, "val votes": val.right_vote}
    config = {"batch_size": batch_size, "alpha": alpha, "dropout": dropout, "margin": margin, "feature": feature}
    config["images"] = [images_digest(pixels), images_digest(pixels if val_pixels is None else val_pixels)]
    rows = fit(
        perceptual.Metric(tuned, feature=feature, normalize=False),
        loss,
        triplet_batches(pixels, train.index, train.right_vote, batch_size, max_batches=max_batches),
        epochs=epochs,
        lr=lr,
        betas=(0.5, 0.999),
        evaluate=evaluate,
        config=config
        | {"triplets": digest((name, torch.from_numpy(np.array(values))) for name, values in data.items())},
        seed=seed,
        **options,
    )
    return backbones.merge_lora(tuned), rows
