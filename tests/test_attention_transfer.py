import copy
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from thesis_lib import attention, backbone, perceptual, weights
from thesis_lib.attention_students import create_student, export, load, load_encoder
from thesis_lib.attention_teacher import Teacher, add_branch, cross_entropy, entropy, on_key_set, transferred_layers
from thesis_lib.attention_training import (
    accuracy_row,
    attention_gap,
    distil_each,
    distil_metric,
    ensemble,
    predict,
    train_classifier,
)
from thesis_lib.attention_transfer import MODES, AttentionTransfer, MatchedAttention
from thesis_lib.closed_form import count_macs

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
FAST = {"device": "cpu", "progress": False}
IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(6) % 5


def seeded(seed, make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():  # biases, norms and tokens start where mistakes do not show
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def vit(seed=0, **options):
    return seeded(seed, lambda: VisionTransformer(**TINY | {"num_classes": 0, "global_pool": "token"} | options))


def pupil(seed=1, mixer="mha", mixer_options=None, **options):
    model = seeded(seed, lambda: VisionTransformer(**TINY | {"num_classes": 5, "global_pool": "avg"} | options))
    return backbone.swap(model, mixer, **mixer_options or {})


def plain_pair(*arguments):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "attention_transfer.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_attention_transfer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.PlainPair(*arguments)


def losses(model, images=IMAGES):
    features, gap = model.features(images)
    return F.cross_entropy(model.head(features), LABELS), gap


@pytest.mark.parametrize(("end_layer", "count"), [(0, 12), (-3, 9), (-6, 6), (-12, 0)])
def test_end_layer_is_the_number_of_layers_left_out_at_the_end(end_layer, count):
    assert transferred_layers(12, end_layer=end_layer) == list(range(count))
    student = create_student("demo", 3, architecture=TINY | {"depth": 12})
    model = AttentionTransfer(student, vit(depth=12), mode="copy", end_layer=end_layer)
    copied = [i for i, block in enumerate(model.student.blocks) if not hasattr(block.attn, "qkv")]
    assert copied == list(range(count)) and (model.teacher is None) == (count == 0)


POOLING = [  # what a head reads of the last block, and options of the student that make it so
    ("mean", {}),
    ("token", {"global_pool": "token"}),
    ("all", {"fc_norm": False}),
    ("all", {"pool_include_prefix": True}),
    ("all", {"global_pool": "max"}),
]


@pytest.mark.parametrize("mode", ["copy", "distill"])
@pytest.mark.parametrize(("end_layer", "drop_path"), [(0, 0.0), (-1, 0.0), (0, 0.6)])
@pytest.mark.parametrize(("read", "options"), POOLING)
def test_loss_and_gradients_equal_the_plain_pair_of_networks(mode, end_layer, drop_path, read, options):
    teacher, student = vit(), pupil(init_values=0.5, **options)
    module, plain = plain_pair(copy.deepcopy(teacher), copy.deepcopy(student), mode, 4 + end_layer)
    ours = AttentionTransfer(student, teacher, mode=mode, end_layer=end_layer, drop_path=drop_path)
    masks = ours.draw_masks(6) if drop_path else None
    ours.draw_masks = lambda batch: masks
    assert ours.reads == read
    task, gap = losses(ours.train())
    (task + 3 * gap).backward()
    logits, expected = plain.train()((IMAGES - ours.mean) / ours.std, masks)
    torch.testing.assert_close(task, F.cross_entropy(logits, LABELS), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.as_tensor(gap), expected, rtol=0, atol=1e-5 if mode == "distill" else 0)
    (F.cross_entropy(logits, LABELS) + 3 * expected).backward()
    for name, theirs, own in module.gradients(plain, ours):
        torch.testing.assert_close(own, theirs, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert not drop_path or (masks == 0).any()


def test_a_copying_student_neither_has_nor_reads_queries_and_keys():
    student, other = pupil(), pupil()
    for block in other.blocks[:3]:
        block.attn.qkv.weight.data[:64] += 1.0
    one, two = (AttentionTransfer(s, vit(), mode="copy", end_layer=-1).eval() for s in (student, other))
    assert torch.equal(one(IMAGES), two(IMAGES))
    names = dict(one.student.named_parameters())
    assert [names[f"blocks.{i}.attn.rows.weight"].shape for i in range(3)] == [(32, 32)] * 3
    assert names["blocks.3.attn.qkv.weight"].shape == (96, 32)
    task, gap = losses(one.train())
    task.backward()
    assert gap == 0 and all(names[f"blocks.{i}.attn.rows.weight"].grad.abs().max() > 0 for i in range(3))


def test_a_copying_student_with_the_teachers_weights_is_the_plain_vit():
    student = pupil()
    teacher = vit()
    load_encoder(teacher, student.state_dict(), "the student")
    expected = student(IMAGES)
    model = AttentionTransfer(copy.deepcopy(student), teacher, mode="copy").eval()
    model.mean.zero_(), model.std.fill_(1)
    torch.testing.assert_close(model(IMAGES), expected)


def test_distillation_from_its_own_weights_is_the_teachers_entropy_with_no_gradient():
    student, teacher = pupil(), vit()
    load_encoder(teacher, student.state_dict(), "the student")
    model = AttentionTransfer(student, teacher, mode="distill").train()
    _, gap = losses(model)
    maps = model.teacher((IMAGES - model.mean) / model.std)
    entropy = sum(torch.special.entr(part).sum(-1).mean() for part in maps.values())
    torch.testing.assert_close(gap, entropy)
    gap.backward()
    assert max(p.grad.abs().max() for p in student.blocks[:3].parameters() if p.grad is not None) < 1e-6
    assert attention_gap(model, IMAGES) == pytest.approx(0, abs=1e-6)


def test_cross_entropy_exceeds_entropy_by_the_divergence():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        s, t = (torch.randn(2, 3, 5, 5, generator=generator).softmax(-1) for _ in range(2))
        divergence = cross_entropy(s.log(), t) - entropy(t)
        assert divergence > 0
        torch.testing.assert_close(divergence, F.kl_div(s.log(), t, reduction="none").sum(-1).mean())
        torch.testing.assert_close(cross_entropy(t.log(), t), entropy(t))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 3]])
def test_matched_attention_has_the_values_and_gradients_of_its_equations(heads, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, 4, 9, 8, generator=generator).to(dtype).float() for _ in range(4))
    target = torch.randn(2, len(heads), 9, 9, generator=generator).softmax(-1)
    every, counts = torch.zeros(2, 4, 9, 9), torch.zeros(4, 1)
    every[:, heads], counts[heads] = target, 1
    found = []
    for matched in (True, False):
        qkv = torch.stack([q, k, v]).to(dtype if matched else torch.float32).requires_grad_()
        if matched:
            mixed, loss = MatchedAttention.apply(qkv, 0.5, every, counts)
            assert mixed.dtype == dtype
        else:
            log_map = (0.5 * qkv[0] @ qkv[1].mT).log_softmax(-1)
            mixed, loss = log_map.exp() @ qkv[2], cross_entropy(log_map[:, heads], target)
        ((mixed.float() * weight).sum() + 5 * loss).backward()
        found.append([mixed.float(), loss, *qkv.grad.float()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_losses_are_summed_over_layers_and_averaged_over_batch_heads_and_rows():
    uniform = pupil()
    for block in uniform.blocks:
        block.attn.qkv.weight.data[:64] = 0
        block.attn.qkv.bias.data[:64] = 0
    model = AttentionTransfer(uniform, vit(), mode="distill", end_layer=-1).train()
    assert losses(model)[1].item() == pytest.approx(3 * math.log(17), rel=1e-6)


def test_each_head_gets_the_map_of_its_own_head():
    teacher = vit()
    permuted = copy.deepcopy(teacher)
    rows = torch.arange(96).view(3, 4, 8)[:, [1, 0, 2, 3]].flatten()
    for block in permuted.blocks:
        block.attn.qkv.weight.data = block.attn.qkv.weight.data[rows]
        block.attn.qkv.bias.data = block.attn.qkv.bias.data[rows]
        columns = torch.arange(32).view(4, 8)[[1, 0, 2, 3]].flatten()
        block.attn.proj.weight.data = block.attn.proj.weight.data[:, columns]
    torch.testing.assert_close(teacher(IMAGES), permuted(IMAGES))  # to the teacher itself order means nothing
    one, two = (AttentionTransfer(pupil(), t, mode="copy").eval()(IMAGES) for t in (teacher, permuted))
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_some_heads_of_some_layers(mode):
    """What is not named keeps its own attention: transferring from a clone of the student changes nothing."""
    student = pupil()
    clone = vit()
    load_encoder(clone, student.state_dict(), "the student")
    expected = student((IMAGES - 0.5) / 0.5)
    model = AttentionTransfer(copy.deepcopy(student), clone, mode=mode, layers=[-1, 1], heads=[3, 1]).eval()
    assert model.teacher.layers == [1, 3] and model.teacher.heads == [1, 3]
    model.mean.fill_(0.5), model.std.fill_(0.5)
    torch.testing.assert_close(model(IMAGES), expected)
    other = AttentionTransfer(copy.deepcopy(student), vit(seed=3), mode=mode, layers=[1, 3], heads=[1, 3])
    task, gap = losses(other.train())
    (task + gap).backward()
    assert all(p.grad is not None for p in other.student.parameters())
    if mode.startswith("distill"):
        qkv = other.student.blocks[3].attn.qkv  # nothing after the last layer feels its attention
        (gradient,) = torch.autograd.grad(losses(other)[1], qkv.weight)
        expected = torch.zeros(3, 4, dtype=torch.bool)
        expected[torch.tensor({"q": [0], "k": [1], "v": [2]}.get(mode[-1], [0, 1]))[:, None], torch.tensor([1, 3])] = (
            True
        )
        assert torch.equal(gradient.view(3, 4, 8, 32).abs().amax((2, 3)) > 0, expected)


def test_distilled_projections_are_compared_by_mean_squared_error():
    student, teacher = pupil(), vit()
    model = AttentionTransfer(student, teacher, mode="distill_k", layers=[0]).train()
    _, gap = losses(model)
    x = (IMAGES - model.mean) / model.std
    keys = []
    for network in (student, teacher):
        block = network.blocks[0]
        tokens = network.norm_pre(network._pos_embed(network.patch_embed(x)))
        keys.append(block.attn.query_key_value(block.norm1(tokens))[1])
    torch.testing.assert_close(gap, (keys[0] - keys[1]).square().mean())


def test_the_teacher_does_no_more_than_is_asked():
    teacher = vit().eval()
    alone = count_macs(teacher, IMAGES[:1])
    block = 12 * 17 * 32**2 + 2 * 17**2 * 32
    for tensor, parts in (("map", 2), ("q", 1), ("k", 1), ("v", 1)):
        given = Teacher(copy.deepcopy(teacher), [0, 1, 2], tensor=tensor)
        last = parts * 17 * 32**2 + (17**2 * 32 if tensor == "map" else 0)
        assert count_macs(given, IMAGES[:1]) == alone - 2 * block + last
    half = Teacher(copy.deepcopy(teacher), [0], heads=2)
    assert count_macs(half, IMAGES[:1]) == alone - 4 * block + 17 * 32**2 + 17**2 * 16


@pytest.mark.parametrize(("pool", "unread"), [("avg", (4 + 4 * 16) * 32**2), ("token", 8 * 16 * 32**2), ("max", 0)])
def test_the_copying_student_saves_what_it_does_not_compute(pool, unread):
    """No queries and keys; of the last MLP what the head reads, the mean of 16 patches projected once, or one of 17."""
    student, teacher = pupil(global_pool=pool), vit()
    own = count_macs(student, IMAGES[:1])
    teaching = count_macs(Teacher(copy.deepcopy(teacher)), IMAGES[:1])
    model = AttentionTransfer(student, teacher, mode="copy").eval()
    assert count_macs(model, IMAGES[:1]) == teaching + own - 4 * (2 * 17 * 32**2 + 17**2 * 32) - unread


def test_dropout_in_the_last_mlp_is_drawn_for_each_token():
    model = AttentionTransfer(pupil(proj_drop_rate=0.3), vit(), mode="copy")
    assert model.reads == "all" and model.train()(IMAGES).shape == (6, 5)


@pytest.mark.parametrize("average", ["heads", "queries"])
def test_averaged_maps_are_the_same_for_each_head_or_query(average):
    plain, control = Teacher(vit()), Teacher(vit(), average=average)
    for i, maps in control(IMAGES).items():
        torch.testing.assert_close(maps, plain(IMAGES)[i].mean(1 if average == "heads" else 2, True).expand_as(maps))


def test_maps_averaged_over_examples_no_longer_depend_on_the_image():
    teacher, plain = Teacher(vit()), Teacher(vit())
    teacher.fix_maps(IMAGES.split(4))
    for i, maps in teacher(IMAGES[:2] * 0).items():
        torch.testing.assert_close(maps, plain(IMAGES)[i].mean(0, True).expand(2, -1, -1, -1))
    student = AttentionTransfer(pupil(), vit(), mode="copy").eval()
    student.teacher.fix_maps([(IMAGES - student.mean) / student.std])
    assert (student(IMAGES)[0] - student(IMAGES.flip(0))[-1]).abs().max() < 1e-5


def test_one_image_does_not_depend_on_its_batch():
    for mode in ("copy", "copy_q", "distill"):
        model = AttentionTransfer(pupil(), vit(), mode=mode).eval()
        torch.testing.assert_close(model(IMAGES)[2:3], model(IMAGES[2:3]))


def test_teacher_and_student_drop_the_same_branches():
    model = AttentionTransfer(pupil(), vit(), mode="distill", drop_path=0.9).train()
    masks = model.draw_masks(400)
    keep = 1 - torch.linspace(0, 0.9, 4)
    assert (masks[0] == 1).all() and masks.shape == (4, 2, 400, 1, 1)
    for row, rate in zip(masks, keep, strict=True):
        assert row.unique().tolist() == pytest.approx([0.0, 1 / rate.item()] if rate < 1 else [1.0])
        assert (row > 0).float().mean() == pytest.approx(rate.item(), abs=0.05)
    used = []
    forward = model.teacher.forward
    model.teacher.forward = lambda x, masks: used.append(masks) or forward(x, masks)
    model.draw_masks = lambda batch: masks[:, :, :batch]
    model.features(IMAGES)
    assert torch.equal(used[0], masks[:, :, :6])
    model.eval().features(IMAGES)
    assert len(used) == 1  # alone, and whole, when it is judged


MIXERS = [name for name in ("sra", "linformer", "performer", "nystrom", "hybrid", "soft") if name in attention.MIXERS]


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_learns_attention_on_its_own_keys(mixer):
    options = {"linformer": {"rank": 4}, "nystrom": {"landmarks": 4}, "hybrid": {"window": 2, "dilations": [1]}}
    model = AttentionTransfer(pupil(mixer=mixer, mixer_options=options.get(mixer)), vit(), mode="distill").train()
    before = attention_gap(model, IMAGES)
    optimizer = torch.optim.Adam(model.student.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        model.features(IMAGES)[1].backward()
        optimizer.step()
    assert math.isfinite(before) and attention_gap(model, IMAGES) < 0.9 * before


def test_matching_a_spread_map_is_matching_the_pooled_keys():
    generator = torch.Generator().manual_seed(3)
    pooled = torch.randn(2, 4, 17, 5, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randn(2, 4, 17, 17, generator=generator, dtype=torch.float64).softmax(-1)
    cells = torch.arange(4).view(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten() + 1
    where = F.one_hot(torch.cat([torch.zeros(1, dtype=torch.long), cells])).double()  # (17, 5)
    direct = cross_entropy(pooled.log_softmax(-1), target @ where)
    spread = cross_entropy(*on_key_set(pooled.softmax(-1) @ (where / where.sum(0)).T, target))
    first, second = (torch.autograd.grad(loss, pooled, retain_graph=True)[0] for loss in (direct, spread))
    torch.testing.assert_close(first, second)


def test_keys_that_a_mixer_lacks_are_left_out_of_the_target():
    maps = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    log_map, target = on_key_set(maps, torch.tensor([[[[0.25, 0.25, 0.5]]]]))
    assert target.tolist() == [[[[0.5, 0.5, 0.0]]]]
    assert cross_entropy(log_map, target).item() == pytest.approx(math.log(2))
    assert (cross_entropy(log_map, target) - entropy(target)).item() == pytest.approx(0, abs=1e-7)


def test_a_wrong_pair_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(8, 8\) patches"):
        AttentionTransfer(pupil(), vit(img_size=64))
    with pytest.raises(ValueError, match=r"\(8, 4\) and \(4, 8\) patches"):  # as many, but elsewhere
        AttentionTransfer(pupil(img_size=(64, 32)), vit(img_size=(32, 64)))
    with pytest.raises(ValueError, match="a drop path of its own"):
        AttentionTransfer(pupil(drop_path_rate=0.1), mode="none")
    for mode in ("copy", "distill"):
        with pytest.raises(ValueError, match="block 0 of the student has attention dropout"):
            AttentionTransfer(pupil(attn_drop_rate=0.1), vit(), mode=mode)
    with pytest.raises(ValueError, match="4 and 2 heads"):
        AttentionTransfer(pupil(), vit(num_heads=2))
    with pytest.raises(ValueError, match="did you mean distill"):
        AttentionTransfer(pupil(), vit(), mode="distil")
    with pytest.raises(ValueError, match="needs a teacher"):
        AttentionTransfer(pupil())
    with pytest.raises(ValueError, match="'sra': copy needs MHA"):
        AttentionTransfer(pupil(mixer="sra"), vit(), mode="copy")
    used = AttentionTransfer(pupil(), vit(), mode="copy").student
    with pytest.raises(ValueError, match="'CopiedAttention': copy needs MHA"):
        AttentionTransfer(used, vit(), mode="copy")
    plain = VisionTransformer(**TINY, num_classes=5)  # with timm's own attention
    assert AttentionTransfer(plain, vit()).train()(IMAGES).shape == (6, 5)
    for mixer in ("pool", "identity"):
        with pytest.raises(ValueError, match=f"'{mixer}' .block 0. has no attention map"):
            AttentionTransfer(pupil(mixer=mixer), vit())
    with pytest.raises(ValueError, match="built from timm's Attention|instead of attention"):
        AttentionTransfer(pupil(), backbone.swap(vit(), "sra"))
    with pytest.raises(ValueError, match="distill_q needs heads of one width: 16, teacher 8"):
        AttentionTransfer(pupil(embed_dim=64), vit(), mode="distill_q")
    with pytest.raises(ValueError, match="end_layer=-5"):
        AttentionTransfer(pupil(), vit(), end_layer=-5)
    for wrong in ({"layers": [4]}, {"layers": [0, 0]}, {"heads": [4]}, {"heads": 0}, {"heads": []}, {"drop_path": 1}):
        with pytest.raises(ValueError, match="layers|heads|drop_path"):
            AttentionTransfer(pupil(), vit(), **wrong)
    with pytest.raises(ValueError, match="average"):
        AttentionTransfer(pupil(), vit(), mode="copy_q", average="heads")
    with pytest.raises(ValueError, match="plain blocks"):
        AttentionTransfer(pupil(), torch.nn.Linear(2, 2))


MAE = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"} | {
    f"blocks.{i}.{name}.{kind}"
    for i in range(4)
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}


def test_a_checkpoint_with_maes_keys_loads_into_teacher_and_student(tmp_path):
    source = vit()
    state = {key: value for key, value in source.state_dict().items() if key in MAE}
    assert set(state) == MAE
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_tiny.pth")
    read, _ = weights.read(tmp_path / "mae_pretrain_vit_tiny.pth")
    teacher = backbone.load_weights(vit(seed=2), tmp_path / "mae_pretrain_vit_tiny.pth")
    assert all(torch.equal(teacher.state_dict()[key], state[key]) for key in MAE)
    student = pupil()
    head = {key: value.clone() for key, value in student.state_dict().items() if key.startswith(("fc_norm", "head"))}
    load_encoder(student, read, "the file")
    assert len(head) == 4 and all(torch.equal(student.state_dict()[key], head[key]) for key in head)
    assert all(torch.equal(student.state_dict()[key], state[key]) for key in MAE - {"norm.weight", "norm.bias"})
    larger = load_encoder(pupil(img_size=64), read, "the file")
    assert torch.equal(larger.pos_embed[:, :1], state["pos_embed"][:, :1]) and larger.pos_embed.shape == (1, 65, 32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("blocks.2.attn.qkv.bias"), "1 missing .blocks.2.attn.qkv.bias"),
        (lambda s: s.update({"decoder_embed.weight": torch.zeros(2)}), "1 unexpected .decoder_embed.weight"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, 48)}), r"cls_token \(1, 1, 48\) \(model: \(1, 1, 32\)\)"),
    ],
)
def test_another_checkpoint_is_refused_with_the_keys_named(change, named):
    state = {key: value for key, value in vit().state_dict().items() if key in MAE}
    change(state)
    student = pupil()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=named):
        load_encoder(student, state, "mae.pth")
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("mode", "mixer", "options"), [("copy", "mha", {"heads": 3}), ("distill", "sra", {"ratio": 4})]
)
def test_an_exported_student_computes_the_same(tmp_path, mode, mixer, options):
    heads = options.pop("heads", None)
    student = create_student("demo", 5, mixer=mixer, architecture=TINY, **options)
    model = AttentionTransfer(student, vit(), mode=mode, heads=heads, end_layer=-1).eval()
    model.mean.fill_(0.4)
    path = export(model, tmp_path / "student.safetensors")
    again = load(path, teacher=vit() if mode == "copy" else None)
    assert torch.equal(again(IMAGES), model(IMAGES))
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        assert mode != "copy" or file.get_tensor("blocks.0.attn.rows.weight").shape == (32 + 2 * 8, 32)
    assert not any(key.startswith("teacher") for key in keys)
    if mode == "copy":
        with pytest.raises(ValueError, match="needs a teacher"):
            load(path)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="was not written by"):
        load(tmp_path / "other.safetensors")


class Pixels:
    """Bright images are of class 1, dark ones of class 0: learnt in a few steps."""

    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = np.arange(count) % 2
        shade = torch.from_numpy(self.labels)[:, None, None, None] * 80 + 60
        self.images = (shade + torch.randint(0, 60, (count, 3, 32, 32), generator=generator)).to(torch.uint8)
        self.digests = [str(i) for i in range(count)]
        self.usable = np.ones(count, bool)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        return self.images[rows]


TRAIN, VAL = Pixels(32), Pixels(12, seed=1)
RECIPE = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "schedule": "cosine", "warmup_epochs": 0.5, "min_lr": 1e-5}
RECIPE |= {
    "layer_decay": 0.75,
    "ema_decay": 0.9,
    "augmentation": {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5},
    **FAST,
}


def transfer(mode="distill", seed=1, **options):
    student = create_student("demo", 2, architecture=TINY, seed=seed)
    return AttentionTransfer(student, vit(), mode=mode, end_layer=-1, drop_path=0.2, **options)


def trained(model, **options):
    rows = train_classifier(model, TRAIN, TRAIN.labels, (VAL, VAL.labels), **RECIPE | options)
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_s")} for row in rows]


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_an_interrupted_run_resumed_by_allow_is_the_unbroken_one_bit_for_bit(tmp_path, monkeypatch, mode):
    whole, broken, resumed = transfer(mode), transfer(mode), transfer(mode)
    rows = trained(whole)
    calls = []

    def interrupted(self, images):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return features(self, images)

    features = AttentionTransfer.features
    monkeypatch.setattr(
        AttentionTransfer,
        "features",
        lambda self, images: interrupted(self, images) if self.training else features(self, images),
    )
    with pytest.raises(KeyboardInterrupt):
        trained(broken, checkpoint=tmp_path / "run", resume="allow")
    monkeypatch.undo()
    assert trained(resumed, checkpoint=tmp_path / "run", resume="allow") == rows
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="is of another run"):
        trained(AttentionTransfer(create_student("demo", 2, architecture=TINY), vit(), mode=mode, drop_path=0.2),
                checkpoint=tmp_path / "run", resume="allow")  # fmt: skip
    with pytest.raises(ValueError, match="task.teacher:"):
        trained(transfer_from(vit(seed=5), mode), checkpoint=tmp_path / "run", resume="allow")


def test_a_student_of_other_mixer_options_is_refused(tmp_path):
    def student(kernel):
        return create_student("demo", 2, mixer="pool", kernel=kernel, architecture=TINY)

    trained(AttentionTransfer(student(3), mode="none"), checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"\(model.description student.kernel: 3 there, 5 here\)"):
        trained(AttentionTransfer(student(5), mode="none"), checkpoint=tmp_path)


def transfer_from(teacher, mode):
    student = create_student("demo", 2, architecture=TINY, seed=1)
    return AttentionTransfer(student, teacher, mode=mode, end_layer=-1, drop_path=0.2)


@pytest.mark.parametrize("mode", ["copy", "distill"])
def test_the_teacher_is_never_trained_copied_or_stored(tmp_path, mode):
    model = transfer(mode)
    before = {key: value.clone() for key, value in model.teacher.state_dict().items()}
    trained(model, checkpoint=tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not any("teacher" in name for name in model.state_dict())
    assert copy.deepcopy(model).teacher is model.teacher
    size = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 4.2 * sum(p.numel() for p in model.student.parameters()) + 20_000
    assert model.to(torch.float64).teacher.backbone.cls_token.dtype == torch.float64  # it follows to a device


def test_training_learns_and_layer_decay_scales_the_rates():
    model = transfer("copy")
    rows = trained(model, epochs=4, augmentation={"flip": 0.0, "smoothing": 0.0}, ema_decay=None, lr=3e-3)
    assert max(row["accuracy"] for row in rows) == 1.0
    scores = predict(model, VAL)
    assert accuracy_row(scores, VAL.labels)["value"] == 1.0 and accuracy_row(scores, VAL.labels)["n"] == 12
    start = create_student("demo", 2, architecture=TINY, seed=1)
    one = AttentionTransfer(start, mode="none")
    first = {name: p.detach().clone() for name, p in one.student.named_parameters()}
    options = {"epochs": 1, "batch_size": 32, "schedule": "constant", "warmup_epochs": 0, "weight_decay": 0.0}
    trained(one, **options, ema_decay=None, augmentation={}, lr=1e-3)
    moved = {name: float((p.detach() - first[name]).abs().max()) for name, p in one.student.named_parameters()}
    assert moved["head.weight"] == pytest.approx(1e-3, rel=1e-2)  # Adam's first step is the rate itself
    assert moved["blocks.3.mlp.fc1.weight"] == pytest.approx(0.75e-3, rel=1e-2)
    assert moved["patch_embed.proj.weight"] == pytest.approx(0.75**5 * 1e-3, rel=1e-2)


def test_batches_and_rates_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="batch_size=7 must be even"):
        trained(transfer(), batch_size=7)
    with pytest.raises(ValueError, match="min_lr=0.01 lies above lr=0.001"):
        trained(transfer(), min_lr=0.01)
    with pytest.raises(ValueError, match="32 images do not fill one batch of 64"):
        trained(transfer(), batch_size=64)


def test_both_ensembles():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 6.0]])
    found = ensemble(a, b)
    torch.testing.assert_close(found["logits"], torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(found["probabilities"], (a.softmax(1) + b.softmax(1)) / 2)


def metric(mixer="mha", seed=0, **options):
    model = vit(seed=seed)
    model.recipe = {"name": "tiny", "img_size": 32, "mixer": "mha", "layers": None, "mixer_options": {}}
    return perceptual.Metric(backbone.swap(model, mixer, **options))


class Triplets:
    index = np.arange(12).reshape(4, 3)
    right_vote = np.array([1.0, 0.0, 1.0, 0.0])


def test_a_metric_learns_to_embed_and_to_attend():
    teacher, images = metric(), Pixels(32, seed=4)
    options = {"epochs": 4, "batch_size": 8, "lr": 2e-3, **FAST}

    def cosine(student):
        pairs = [perceptual.embed_pixels(m, images, progress=False) for m in (student, teacher)]
        return float(F.cosine_similarity(*pairs).mean())

    def gap(student):
        return attention_gap(AttentionTransfer(copy.deepcopy(student.backbone), teacher.backbone), IMAGES)

    untrained = metric("sra", seed=3)
    start = cosine(untrained), gap(untrained)
    found = {}
    for name, parts in {"embedding": (0.0, 1.0), "attention": (1.0, 0.0)}.items():
        student = metric("sra", seed=3)
        rows = distil_metric(student, teacher, images, Triplets, VAL, attention=parts[0], embedding=parts[1], **options)
        assert rows[-1]["loss"] < rows[0]["loss"] and 0 <= rows[-1]["2afc"] <= 1
        assert all(p.requires_grad for p in student.backbone.parameters())
        found[name] = cosine(student), gap(student)
    assert found["embedding"][0] > start[0] and found["attention"][1] < start[1]
    assert found["attention"][1] < found["embedding"][1]
    with pytest.raises(ValueError, match="nothing to learn"):
        distil_metric(metric(), teacher, images, Triplets, VAL, attention=0, embedding=0, **options)
    with pytest.raises(ValueError, match="feature="):
        distil_metric(perceptual.Metric(vit(), "cls_norm"), teacher, images, Triplets, VAL, **options)


def test_metrics_taught_side_by_side_are_those_taught_one_by_one(two_threads):
    data, objectives = (metric(), Pixels(16, seed=4), Triplets, VAL), ({"attention": 0.0}, {"embedding": 0.0}, {})
    options = {"epochs": 1, "batch_size": 8, "lr": 2e-3, **FAST}
    together = distil_each([(metric("sra", seed=3), own) for own in objectives], *data, **options)
    torch.set_num_threads(1)
    for student, own in zip(together, objectives, strict=True):
        alone = metric("sra", seed=3)
        distil_metric(alone, *data, **own, **options)
        weights = student.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in alone.state_dict().items())
        assert all(p.requires_grad for p in student.backbone.parameters())


def test_a_metric_of_other_mixer_options_is_refused(tmp_path):
    options = {"attention": 0.0, "epochs": 1, "batch_size": 8, "lr": 1e-3, "checkpoint": tmp_path, **FAST}
    data = metric(), Pixels(8, seed=4), Triplets, VAL
    distil_metric(metric("pool", kernel=3), *data, **options)
    with pytest.raises(ValueError, match=r"\(model.recipe student.mixer_options.kernel: 3 there, 5 here\)"):
        distil_metric(metric("pool", kernel=5), *data, **options)


TWO_PROCESSES = """
import os, signal, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_attention_transfer as tests
killed = not os.path.exists({out!r} + ".killed")
if killed and os.environ["RANK"] == "1":
    calls, draw = [], tests.Pixels.__getitem__
    def dying(self, rows):
        calls.append(1)
        if len(calls) == 6:  # in the second epoch of four batches
            open({out!r} + ".killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, rows)
    tests.Pixels.__getitem__ = dying
modes = "copy", "distill"
found = {{mode: tests.two_epochs(mode, 4, checkpoint={folder!r} + mode, resume="allow") for mode in modes}}
if os.environ["RANK"] == "1":  # the process that neither evaluated nor wrote
    torch.save(found, {out!r})
"""


def two_epochs(mode, batch_size, **options):
    model = transfer(mode)
    model.drop_path = 0.0
    data = model, TRAIN, TRAIN.labels, (VAL, VAL.labels)
    recipe = {"epochs": 2, "lr": 1e-3, "augmentation": {"flip": 0.0}, "ema_decay": 0.9, **FAST}
    return train_classifier(*data, batch_size=batch_size, **recipe, **options), model.state_dict()


def test_two_processes_one_killed_and_started_again_do_what_one_does_with_twice_the_batch(tmp_path):
    here, script, out = Path(__file__).resolve(), tmp_path / "train.py", tmp_path / "out.pt"
    places = {"root": str(here.parents[1]), "tests": str(here.parent), "folder": str(tmp_path / "run-")}
    script.write_text(TWO_PROCESSES.format(**places, out=str(out)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    settings = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 400, "capture_output": True}
    assert subprocess.run(launch, check=False, **settings).returncode != 0
    assert (tmp_path / "run-copy" / "state.pt").exists() and not out.exists()
    subprocess.run(launch, check=True, **settings)
    found = torch.load(out, weights_only=True)
    for mode, (rows, state) in found.items():
        expected, alone = two_epochs(mode, 8)
        for row, single in zip(rows, expected, strict=True):
            for key in ("loss", "accuracy", "val_loss", "lr"):
                assert row[key] == pytest.approx(single[key], abs=1e-5)
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-4, msg=name)


def stub(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


def test_the_batch_file_starts_one_torchrun_a_node_and_requeues_itself(tmp_path):
    said = tmp_path / "said"
    stub(tmp_path / "bin" / "srun", 'shift; SLURM_NODEID=1 exec "$@"\n')
    stub(
        tmp_path / "bin" / "scontrol",
        f'[ "$1" = show ] && printf "first\\nsecond\\n" || echo "scontrol $*" >> {said}\n',
    )
    stub(tmp_path / ".venv" / "bin" / "python", f'echo "$OMP_NUM_THREADS $*" >> {said}; exec sleep 60\n')
    script = Path(__file__).resolve().parents[1] / "profiles" / "slurm" / "attention_transfer.sbatch"
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_NODELIST": "n[1-2]", "JOB_ID": "77", "NNODES": "2"}
    slurm |= {"GPUS_ON_NODE": "4", "CPUS_PER_TASK": "40"}
    known = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    own = {f"SLURM_{name}": value for name, value in slurm.items()} | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    }
    job = subprocess.Popen(
        ["bash", str(script), "-p", "seed", "3"], env=known | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (said.exists() and said.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    started, queued = said.read_text().splitlines()
    threads, *arguments = started.split()
    assert threads == "10" and arguments[:2] == ["-m", "torch.distributed.run"]
    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=4", "--master-addr=first"} <= set(arguments)
    expected = ["-m", "thesis_lib.execute", "05_attention_transfer", "--profile", "thesis", "-p", "seed", "3"]
    assert arguments[-8:] == expected and queued == "scontrol requeue 77"


def test_a_branch_that_every_image_drops_adds_nothing_and_still_has_gradients():
    layer, x = torch.nn.Linear(8, 8), torch.randn(3, 5, 8)
    for factors in ([0.0, 0.0, 0.0], [2.0, 0.0, 2.0], [1.5, 1.5, 1.5]):
        mask = torch.tensor(factors).view(3, 1, 1)
        out = add_branch(x, mask, layer)
        torch.testing.assert_close(out, x + layer(x) * mask)
        layer.zero_grad()
        out.sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.any() == any(factors)
    seen = []
    add_branch(x, torch.tensor([2.0, 0.0, 2.0]).view(3, 1, 1), lambda kept: seen.append(len(kept)) or kept)
    assert seen == [2]  # the image that drops the branch is not computed
