"""Forward passes on tensors that claim to be on a GPU: a tensor made on the CPU, or a kernel without half, is an error.

Shapes, types and devices flow as on a GPU and nothing is computed, so it runs without one. What cannot flow: backward
passes, and whatever asks for a value.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thesis_lib import attention, backbone, distillation, perceptual
from thesis_lib.adaptive_tokens import AdaptiveViT, halting_loss, preset
from thesis_lib.adaptive_training import headed, normalised
from thesis_lib.attention.moh import balance_loss
from thesis_lib.attention_students import create_student
from thesis_lib.attention_transfer import AttentionTransfer
from thesis_lib.classifier import ViTForImageClassification
from thesis_lib.correspondence import features, training
from thesis_lib.layer_plan import apply_plan
from thesis_lib.token_merging import merge_tokens

# CUDA has no half precision of these, and its autocast, unlike the CPU's, does not lift what they get.
FULL_PRECISION = {"_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_cholesky_ex", "linalg_inv_ex", "multinomial"}


class NoHalf(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in FULL_PRECISION:
            given = [t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            assert not {torch.bfloat16, torch.float16} & {*given}, func
        return func(*args, **kwargs or {})


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def cuda(request, monkeypatch):
    """Enter the pretence, with autocast or without; models are made before."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with contextlib.ExitStack() as stack:

        def enter():
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(NoHalf())
            stack.enter_context(torch.autocast("cuda", torch.bfloat16, enabled=request.param))

        yield enter


def shallow():
    vit = backbone.create("demo", pretrained=False)
    vit.blocks = vit.blocks[:2]
    return vit


def images(size=64):
    return torch.rand(4, 3, size, size, device="cuda")


@pytest.mark.parametrize("mixer", sorted(attention.MIXERS))
def test_a_mixer_and_its_map(cuda, mixer):
    vit = backbone.swap(shallow(), mixer)
    cuda()
    metric = perceptual.Metric(vit.to("cuda")).train()
    assert metric.embed_unchecked(images()).is_cuda
    found = vit.blocks[0].attn.attention_map(torch.rand(2, 65, 128, device="cuda"))
    assert found is None or found.is_cuda


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "copy"},
        {"mode": "copy", "heads": 2, "average": "queries"},
        {"mode": "copy_q"},
        {"mode": "distill"},
        {"mode": "distill", "heads": 2},
        {"mode": "distill_v"},
        *({"mode": "distill", "mixer": mixer} for mixer in ("sra", "linformer", "nystrom", "performer", "hybrid")),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_attention_transfer(cuda, options):
    mixer = options.get("mixer", "mha")
    student = create_student("demo", 10, mixer=mixer, architecture={"depth": 2})
    model = AttentionTransfer(student, shallow(), **{key: options[key] for key in options if key != "mixer"}).train()
    cuda()
    found, loss = model.to("cuda").features(images())
    assert model.head(found).is_cuda and (
        options["mode"].startswith("copy") or (loss.is_cuda and loss.dtype.itemsize > 2)
    )


def test_adaptive_tokens(cuda):
    model = AdaptiveViT(headed("demo", 10, pretrained=False).train(), preset("paper"))
    cuda()
    trace = model.to("cuda").run(normalised(model, images()))
    loss = halting_loss(trace, model.halting)
    assert model.classify(trace.features).is_cuda and loss.is_cuda and loss.dtype == torch.float32


@pytest.mark.parametrize(
    "changed",
    [
        lambda vit: merge_tokens(vit, 8),
        lambda vit: apply_plan(vit, ("mha", "drop", "pool", "sra", "mha", "identity"), 2),
        lambda vit: apply_plan(vit, ("mha", "linformer", "hybrid", "nystrom", "agent", "soft"), 1),
    ],
    ids=["merged", "planned", "planned of many"],
)
def test_merged_and_planned_backbones(cuda, changed):
    vit = changed(backbone.create("demo", pretrained=False))
    cuda()
    assert perceptual.Metric(vit.to("cuda")).embed_unchecked(images()).is_cuda


@pytest.mark.parametrize("kind", ["standard", "moh", "nystromformer", "hybrid"])
def test_classifiers(cuda, kind):
    sizes = {"linformer_k": 17, "performer_features": 16, "nystrom_landmarks": 16, "drop_path_rate": 0.1}
    model = ViTForImageClassification({"attention_type": kind, **sizes}).train()
    cuda()
    assert model.to("cuda")(images(32)).is_cuda
    assert kind != "moh" or balance_loss(model).is_cuda


def test_distillation(cuda):
    metric, loss = perceptual.Metric(shallow()).train(), distillation._loss(128)
    cuda()
    metric.to("cuda").embed = metric.embed_unchecked  # the check looks at values
    batch = (torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, device="cuda"), torch.rand(4, 128, device="cuda"))
    assert loss(metric, batch).is_cuda


def test_correspondence_is_in_full_precision(cuda):
    cuda()
    maps = torch.rand(2, 40, 12, 12, device="cuda")
    assert features.principal(maps, 1).dtype == torch.float32
    assert {part.dtype for part in features.co_pca(maps[0], maps[1], 8)} == {torch.float32}
    student = lambda x, categories: {"student": torch.rand(4, 24, 8, 8, device="cuda", dtype=torch.bfloat16)}
    rows = np.zeros((2, 2), int)  # whose sum is asked for
    batch = {"images": images(), "categories": [], "points": torch.rand(2, 2, 5, 2, device="cuda"), "rows": rows}
    assert training._objective(student, batch, False, "mse", "full", 8, 0.01).dtype == torch.float32
