import json
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import timm
import torch
from halting_models import VARIED, halting_vit, images, reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.testing import assert_close

from thesis_lib import backbone
from thesis_lib.adaptive_tokens import (
    PRESETS,
    AdaptiveViT,
    Halting,
    Trace,
    distribution_loss,
    halting_loss,
    load,
    ponder_loss,
    preset,
    save,
    target_distribution,
)

KINDS = [
    {},
    {"init_values": 0.5, "reg_tokens": 2, "no_embed_class": True},
    {"qk_norm": True, "scale_attn_norm": True},
]


@pytest.mark.parametrize("options", KINDS, ids=["plain", "registers", "qk-norm"])
def test_the_masked_form_is_the_algorithm_token_by_token(options):
    vit = halting_vit(**options)
    plain, model = deepcopy(vit), AdaptiveViT(vit, VARIED)
    x = images(6)
    with torch.no_grad():
        trace = model.run(x)
        logits, depth, rho = zip(*(reference(plain, model.halting, image[None]) for image in x), strict=True)
        assert_close(model(x), torch.cat(logits), rtol=0, atol=1e-5)
    seen = trace.depth.unique().tolist()
    assert len(seen) >= 4 and max(seen) == 5  # tokens do halt at different layers
    for i, (own_depth, own_rho) in enumerate(zip(depth, rho, strict=True)):
        known = own_depth > 0  # the reference stops with the class token
        assert torch.equal(trace.depth[i][known], own_depth[known])
        assert_close(trace.rho[i][known], own_rho[known], rtol=0, atol=1e-5)


def test_weights_sum_to_one_and_rho_is_depth_plus_remainder():
    trace = AdaptiveViT(halting_vit(), VARIED).run(images(6))
    assert_close(trace.weights.sum(0), torch.ones_like(trace.remainder), rtol=0, atol=1e-6)
    assert (trace.weights >= 0).all() and not (trace.weights * ~trace.alive).any()
    before_last = torch.arange(5)[:, None, None] < trace.depth - 1
    remainder = 1 - (trace.scores * before_last).sum(0)
    assert_close(trace.rho, trace.depth + remainder, rtol=0, atol=1e-6)
    assert ((trace.remainder > 0) & (trace.remainder <= 1)).all()
    assert (trace.alive[1:] <= trace.alive[:-1]).all() and trace.alive[0].all()  # nobody comes back


def test_tokens_that_all_halt_at_once_give_the_first_block():
    vit = halting_vit()
    plain, model = deepcopy(vit), AdaptiveViT(vit, Halting(0.0, 50.0))
    x = images(3)
    with torch.no_grad():
        trace = model.run(x)
        first = plain.blocks[0](plain._pos_embed(plain.patch_embed(x)))
        assert_close(trace.features, first[:, 0])
    assert (trace.depth == 1).all() and (trace.tokens[1:] == 0).all()


@pytest.mark.parametrize("name", ["tiny", "deit_tiny_patch16_224", "demo"])
def test_tokens_that_never_halt_give_the_plain_model(name):
    torch.manual_seed(0)
    if name == "tiny":
        vit, size = halting_vit(), 32
    elif name == "demo":
        vit, size = backbone.create("demo"), 64
    else:
        vit, size = timm.create_model(name, img_size=64).eval(), 64
    plain, model = deepcopy(vit), AdaptiveViT(vit, preset("paper", beta=-200.0))
    with torch.no_grad():
        x = images(2, size)
        expected = plain.forward_head(plain.forward_features(x))
        assert_close(model(x), expected, rtol=0, atol=2e-5)
        assert (model.run(x).depth == len(vit.blocks)).all()


def test_what_halted_tokens_hold_does_not_matter():
    model = AdaptiveViT(halting_vit(), VARIED)
    x = images(4)
    with torch.no_grad():
        trace, expected = model.run(x), model(x)
        assert (~trace.alive[1:]).any()
        for block, alive in zip(model.vit.blocks, trace.alive, strict=True):
            noise = 100 * torch.randn(*alive.shape, 32) * ~alive[..., None]
            block.drop_path2.register_forward_hook(lambda module, inputs, out, noise=noise: out + noise)
        assert torch.equal(model(x), expected)


def test_no_gradient_passes_through_halted_tokens():
    model = AdaptiveViT(halting_vit(), Halting(0.0, 50.0))
    model(images(2)).sum().backward()
    assert model.vit.blocks[0].mlp.fc1.weight.grad.any()
    assert not model.vit.blocks[1].mlp.fc1.weight.grad.any()


def test_an_image_does_not_depend_on_its_batch():
    model = AdaptiveViT(halting_vit(), VARIED)
    x = images(5)
    with torch.no_grad():
        assert_close(model(x), torch.cat([model(image[None]) for image in x]), rtol=0, atol=1e-5)


def test_autocast_keeps_the_sums_exact():
    model = AdaptiveViT(halting_vit(), VARIED)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trace = model.run(images(4))
    assert trace.scores.dtype == torch.float32 and trace.features.isfinite().all()
    assert_close(trace.weights.sum(0), torch.ones_like(trace.remainder), rtol=0, atol=1e-6)


def stepping_model(steps=(0.5, -0.3, 0.9), start=(0.2, -0.4), gamma=2.0, beta=-0.5, **constants):
    """Three blocks that only add a constant to the first channel of a class token and one patch."""
    vit = VisionTransformer(img_size=8, patch_size=8, embed_dim=4, depth=3, num_heads=1, num_classes=2)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        vit.pos_embed[0, :, 0] = torch.tensor(start)
        for block, step in zip(vit.blocks, steps, strict=True):
            block.mlp.fc2.bias[0] = step
    return AdaptiveViT(vit.eval(), Halting(gamma, beta, **constants))


def hand_scores(steps, start, gamma=2.0, beta=-0.5):
    """Scores by layer and token in plain arithmetic."""
    first = [[s + sum(steps[: layer + 1]) for s in start] for layer in range(3)]
    return [[1 / (1 + math.exp(-(gamma * value + beta))) for value in row] for row in first]


def hand_rho(scores, eps):
    """Depth + remainder of each token."""
    found = []
    for token in zip(*scores, strict=True):
        total, depth = 0.0, 1
        while depth < 3 and total + token[depth - 1] < 1 - eps:
            total += token[depth - 1]
            depth += 1
        found.append(depth + 1 - total)
    return found


def test_ponder_loss_and_its_gradient_by_hand():
    steps, start = (0.5, -0.3, 0.9), (0.2, -0.4)
    model = stepping_model(steps, start)
    trace = model.run(torch.zeros(2, 3, 8, 8))
    h = hand_scores(steps, start)
    # class token: .71 + .57 > .99, so it halts in the second layer; the patch: .43 + .29 < .99, it halts in the last
    assert h[0][0] + h[1][0] > 0.99 > h[0][1] + h[1][1]
    assert trace.depth.tolist() == [[2, 3], [2, 3]]
    loss = ponder_loss(trace)
    assert loss.item() == pytest.approx((2 + 1 - h[0][0] + 3 + 1 - h[0][1] - h[1][1]) / 2, abs=1e-6)
    assert loss.item() == pytest.approx(sum(hand_rho(h, 0.01)) / 2, abs=1e-6)
    loss.backward()
    slope = [[2.0 * value * (1 - value) for value in row] for row in h]  # dh / d(first channel)
    by_hand = [-(slope[0][0] + slope[0][1] + slope[1][1]) / 2, -slope[1][1] / 2, 0.0]
    found = [block.mlp.fc2.bias.grad[0].item() for block in model.vit.blocks]
    assert found == pytest.approx(by_hand, abs=1e-6)


def hand_distribution(steps, start, depth, halted_after):
    """KL(H || T) in plain arithmetic; a token scores nothing once it has halted."""
    h = hand_scores(steps, start)
    mean = [sum(v for v, end in zip(row, halted_after, strict=True) if layer < end) / 2 for layer, row in enumerate(h)]
    density = [math.exp(-0.5 * (layer + 1 - depth) ** 2) for layer in range(3)]
    share, target = ([v / sum(values) for v in values] for values in (mean, density))
    return sum(s * math.log(s / t) for s, t in zip(share, target, strict=True))


def test_distribution_loss_and_its_gradient_by_hand():
    steps, start = (0.5, -0.3, 0.9), (0.2, -0.4)
    model = stepping_model(steps, start, target_depth=2.0)
    loss = distribution_loss(model.run(torch.zeros(2, 3, 8, 8)), model.halting)
    assert loss.item() == pytest.approx(hand_distribution(steps, start, 2.0, (2, 3)), abs=1e-6)
    loss.backward()
    for i, block in enumerate(model.vit.blocks):
        shifted = [[s + (d if j == i else 0) for j, s in enumerate(steps)] for d in (1e-5, -1e-5)]
        up, down = (hand_distribution(s, start, 2.0, (2, 3)) for s in shifted)
        assert block.mlp.fc2.bias.grad[0].item() == pytest.approx((up - down) / 2e-5, abs=1e-5)


def test_the_released_codes_target_to_five_digits():
    target = target_distribution(12, 8, peer_compat=True)
    expected = [0, 0, 0, 0, 0.00044, 0.01445, 0.17606, 0.78905, 1.30092, 0.78905, 0.17606, 0.01445]
    assert target.tolist() == pytest.approx(expected, abs=5e-6)
    assert target.sum().item() == pytest.approx(3.26048, abs=5e-6)  # no distribution
    assert target[:8].sum().item() == pytest.approx(0.98)
    own = target_distribution(12, 8)
    assert own.sum().item() == pytest.approx(1) and own.argmax() == 7  # the eighth layer


def test_the_released_codes_distribution_loss():
    scores = torch.rand(12, 3, 5, generator=torch.Generator().manual_seed(0))
    alive = torch.ones(12, 3, 5, dtype=torch.bool)
    alive[6:] = False  # which it ignores
    trace = Trace(torch.zeros(3, 4), scores, alive, scores, scores[0])
    halting = Halting(peer_compat=True)
    share = scores[:, 1:].mean((1, 2))
    share = (share / share.sum()).clamp(0.01, 0.99)
    target = target_distribution(12, 8, peer_compat=True).float()
    expected = nn.functional.kl_div(share.log(), target, reduction="batchmean")
    assert expected > 0
    assert_close(distribution_loss(trace, halting), expected)
    assert distribution_loss(trace, Halting()) != distribution_loss(trace, halting)
    with pytest.raises(ValueError, match="at least two"):
        distribution_loss(replace(trace, scores=scores[:, :1]), halting)


def test_the_distribution_loss_survives_scores_of_nearly_zero():
    model = AdaptiveViT(halting_vit(), preset("paper", beta=-200.0))
    loss = halting_loss(model.run(images(2)), model.halting)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_halting_loss_weighs_both_terms():
    model = stepping_model(alpha_ponder=0.3, alpha_distr=0.7, target_depth=2.0)
    trace = model.run(torch.zeros(1, 3, 8, 8))
    expected = 0.3 * ponder_loss(trace) + 0.7 * distribution_loss(trace, model.halting)
    assert_close(halting_loss(trace, model.halting), expected)


def test_presets_are_the_published_ones():
    columns = ("gamma", "beta", "alpha_ponder", "alpha_distr", "target_depth", "eps")
    table = {name: tuple(asdict(constants)[column] for column in columns) for name, constants in PRESETS.items()}
    assert table == {
        "paper": (5, -10, 5e-4, 0.1, 8, 0.01),
        "command-tiny": (10, -30, 5e-4, 1e-3, 8, 0.01),
        "command-small": (10, -75, 5e-4, 1e-3, 8, 0.01),
        "defaults": (100, -3, 1e-3, 0.01, 8, 0.01),
    }
    assert preset("paper", target_depth=4).target_depth == 4
    with pytest.raises(ValueError, match="did you mean paper"):
        preset("papr")
    with pytest.raises(ValueError, match="did you mean beta"):
        preset("paper", betta=1)


@pytest.mark.parametrize("eps", [0, 1, -0.1, 1.5, math.nan])
def test_eps_must_lie_between_0_and_1(eps):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Halting(eps=eps)


@pytest.mark.parametrize("wrong", [{"gamma": -1.0}, {"beta": math.inf}, {"target_depth": 0.0}, {"alpha_distr": -1.0}])
def test_other_constants_without_a_meaning(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Halting(**wrong)


def test_other_models_are_refused():
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    with pytest.raises(ValueError, match="pools by 'avg'"):
        AdaptiveViT(VisionTransformer(**tiny, global_pool="avg"))
    with pytest.raises(ValueError, match="ParallelScalingBlock"):
        AdaptiveViT(VisionTransformer(**tiny, block_fn=ParallelScalingBlock))
    with pytest.raises(ValueError, match="Linear"):
        AdaptiveViT(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pool"):
        AdaptiveViT(backbone.create("demo", "pool"))


FRESH = """
import sys, torch
from thesis_lib.adaptive_tokens import load
models = [load(path) for path in sys.argv[3:]]
x = torch.load(sys.argv[1])
torch.save([(model(x).detach(), model.halting.beta) for model in models], sys.argv[2])
"""


def test_a_saved_model_loads_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    models, files, x = [], [], images(3, 64)
    for name, vit in (
        ("demo", backbone.create("demo")),
        ("deit", timm.create_model("deit_tiny_patch16_224", img_size=64)),
    ):
        vit.reset_classifier(5)
        models.append(AdaptiveViT(vit, preset("paper", beta=-1.25, gamma=2.0)).eval())
        files.append(save(models[-1], tmp_path / name / "tiny-10-30.safetensors"))  # a name that must not be read
    torch.save(x, tmp_path / "x.pt")
    places = [str(path) for path in (tmp_path / "x.pt", tmp_path / "y.pt", *files)]
    subprocess.run([sys.executable, "-c", FRESH, *places], check=True)
    for model, (logits, beta) in zip(models, torch.load(tmp_path / "y.pt"), strict=True):
        assert beta == -1.25
        with torch.no_grad():
            assert_close(logits, model(x))


def test_files_that_cannot_be_loaded(tmp_path):
    demo = AdaptiveViT(backbone.create("demo"), Halting(eps=0.1))
    assert load(save(demo, tmp_path / "good.safetensors")).halting == demo.halting
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    plain = backbone.save_weights(backbone.create("demo"), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no halting constants"):
        load(plain)
    torch.save({"model": backbone.create("demo").state_dict()}, tmp_path / "tiny-10-30.pth")
    with pytest.raises(ValueError, match="no halting constants"):
        load(tmp_path / "tiny-10-30.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="corrupt"):
        load(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="registry"):
        save(AdaptiveViT(halting_vit()), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "wrong",
    [
        {"recipe": "["},
        {"name": "hf-hub:nobody/nothing"},  # of which timm would ask the hub
        {"name": "resnet18"},
        {"name": "vit_tiny_patch16_224.nobody"},
        {"name": None},
        {"img_size": "64"},
        {"num_classes": "five"},
        {"halting": "{"},
        {"halting": "[1]"},
        {"halting": '{"x": 1}'},
        {"halting": '{"gamma": "5"}'},
    ],
)
def test_a_file_with_another_description_is_refused_by_name(tmp_path, wrong, monkeypatch):
    path = save(AdaptiveViT(backbone.create("demo")), tmp_path / "good.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if changes := {k: v for k, v in wrong.items() if k not in metadata}:
        metadata["recipe"] = json.dumps(json.loads(metadata["recipe"]) | changes)
    save_file(load_file(path), tmp_path / "wrong.safetensors", metadata=metadata | (wrong if not changes else {}))
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", None)
    with pytest.raises(ValueError, match="wrong.safetensors.* corrupt"):
        load(tmp_path / "wrong.safetensors")


def test_any_name_and_the_home_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    demo = AdaptiveViT(backbone.create("demo"), Halting(eps=0.1))
    assert save(demo, "~/deep/model.SAFETENSORS") == tmp_path / "deep" / "model.SAFETENSORS"
    assert load("~/deep/model.SAFETENSORS").halting == demo.halting
