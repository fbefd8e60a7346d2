"""The proposed model's speed: the steps it comes from, and all that stands beside it, timed in turn."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from thesis_lib import backbone, class_token
from thesis_lib.adaptive_speed import interleaved, passes
from thesis_lib.comparators import Branch, DreamSim
from thesis_lib.efficiency import median_row
from thesis_lib.layer_plan import DROP, KEEP, Plan, apply_plan
from thesis_lib.perceptual import DTYPES, Metric
from thesis_lib.token_merging import merge_tokens


class InFormat(nn.Module):
    """A metric in bfloat16 or float16, weights and arithmetic; images and embeddings stay float32."""

    def __init__(self, metric: nn.Module, dtype: str) -> None:
        super().__init__()
        self.metric, self.dtype = copy.deepcopy(metric).to(DTYPES[dtype]), DTYPES[dtype]
        self._check = metric._check
        self.train(metric.training)

    def embed(self, x: Tensor) -> Tensor:
        """Return float32 embeddings: (B, 3, H, W) floats in [0, 1] -> (B, D)."""
        self._check(x)
        return self.embed_unchecked(x)

    def embed_unchecked(self, x: Tensor) -> Tensor:
        """Return what `embed` does without looking at the values."""
        return self.metric.embed_unchecked(x.to(self.dtype)).float()


def in_format(metric: nn.Module, dtype: str) -> nn.Module:
    """Return the metric itself for float32, a converted copy for another of `perceptual.DTYPES`."""
    return metric if dtype == "float32" else InFormat(metric, dtype)


def steps(name: str, plan: Plan, *, merging: Sequence[float] = (), img_size: int | None = None) -> dict[str, nn.Module]:
    """Return a timm ViT with random weights on its way to the plan, one change more at each step: metrics by step.

    merging: the share of all patches that each block of the plan's own model merges (`token_merging`), in place of
    other changes; a deeper model merges as many over more blocks. Changes that are not made are left out. Only the
    last, "class token only", is `Metric`, which cuts the last block where that can be.
    """
    vit = backbone.create(name, pretrained=False, img_size=img_size)
    plan = plan.stretched(len(vit.blocks))
    forms = {"whole": None}
    if set(plan.actions) - {DROP, KEEP}:
        forms["mixers"] = Plan(tuple(KEEP if action == DROP else action for action in plan.actions))
    if DROP in plan.actions:
        forms["depth"] = Plan(plan.actions)
    if plan.merge is not None:
        forms["halved grid"] = plan
    made = {}
    for step, form in forms.items():
        model = copy.deepcopy(vit)
        made[step] = DreamSim([Branch(model if form is None else apply_plan(model, **form.described()))])
    if merging:
        own, depth, patches = len(merging), len(vit.blocks), vit.patch_embed.num_patches
        counts = [int(merging[i * own // depth] * own / depth * patches) for i in range(depth)]
        step = "merged tokens"
        made[step] = DreamSim([Branch(merge_tokens(copy.deepcopy(vit), counts))])
    final = Metric(made[step].branches[0].vit).eval().requires_grad_(False)
    if class_token.possible(final.backbone):
        made["class token only"] = final
    return made


def speed_rows(
    models: Mapping[tuple[str, str], nn.Module],
    images: Mapping[str, Tensor],
    reference: str,
    *,
    rounds: int = 5,
    seconds: float = 120.0,
    **protocol: Any,
) -> list[dict]:
    """Time embeddings in turn, from bytes on the device to embeddings there, and compare each with the reference.

    models: by (name, number format). images: uint8 (B, 3, S, S) by name, the same pictures at the size it takes.
    Rows by `model` and `dtype`: batch_time (ms, median with 95 % interval) and speedup, the median over rounds of the
    ratio of the time that the reference took in the same number format to the model's own.
    """
    tasks, rows = {}, []
    for (name, dtype), model in models.items():
        tasks |= passes({(name, dtype): lambda x, model=model: model.embed_unchecked(x.float() / 255)}, images[name])
    device = next(iter(images.values())).device
    times = interleaved(tasks, rounds=rounds, seconds=seconds, device=device)
    for name, dtype in models:
        own = {"model": name, "dtype": dtype, "batch": len(images[name])} | protocol
        found = {"batch_time": ("ms", 1e3 * times[name, dtype])}
        found |= {"speedup": ("1", times[reference, dtype] / times[name, dtype])}
        for metric, (unit, samples) in found.items():
            row = median_row("latency", samples)  # of which only the description is kept
            rows.append(
                {"metric": metric, "unit": unit} | {key: row[key] for key in ("value", "low", "high", "n")} | own
            )
    return rows
