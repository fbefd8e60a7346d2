import numpy as np
import pytest
import torch
from halting_models import VARIED, halting_vit, images
from torch.testing import assert_close

from thesis_lib.adaptive_tokens import AdaptiveViT, Halting
from thesis_lib.closed_form import count_macs, model_cost
from thesis_lib.token_removal import (
    TokenRemoval,
    buckets_of,
    dense_macs,
    executed_macs,
)

PATTERNS = {
    "mixed": (VARIED, {}),
    "early": (Halting(1.0, 0.5), {}),
    "all at once": (Halting(0.0, 50.0), {}),
    "none": (Halting(0.0, -200.0), {}),
    "class token first": (Halting(1.0, -1.0), {"cls": 5.0}),
    "class token last": (Halting(1.0, -0.5), {"cls": -8.0}),
    "wide eps": (Halting(0.5, -1.5, eps=0.6), {}),
}


@pytest.mark.parametrize("step", [16, 1, 3, 100])
@pytest.mark.parametrize("name", PATTERNS)
def test_removing_equals_masking(name, step):
    halting, changes = PATTERNS[name]
    for seed, batch in ((0, 1), (1, 2), (2, 9)):
        model = AdaptiveViT(halting_vit(seed, **changes), halting)
        x = images(batch, seed=seed)
        with torch.no_grad():
            trace, removed = model.run(x), TokenRemoval(model, step).run(x)
            assert_close(removed.features, trace.features, rtol=0, atol=1e-5)
            assert_close(TokenRemoval(model, step)(x), model(x), rtol=0, atol=1e-5)
        assert torch.equal(removed.tokens, trace.tokens)


def test_the_patterns_are_what_they_say():
    depth = {}
    for name, (halting, changes) in PATTERNS.items():
        depth[name] = AdaptiveViT(halting_vit(0, **changes), halting).run(images(9)).depth
    assert len(depth["mixed"].unique()) >= 4
    assert (depth["all at once"] == 1).all() and (depth["none"] == 5).all()
    early = depth["class token first"]
    assert (early[:, 0] < 5).all() and (early[:, 0] <= early[:, 1:].amin(1)).any() and (early[:, 1:] == 5).any()
    assert (depth["class token last"][:, 0] == 5).all() and (depth["class token last"][:, 1:] < 5).any()


@pytest.mark.parametrize("options", [{"init_values": 0.5, "reg_tokens": 2}, {"qk_norm": True, "scale_attn_norm": True}])
def test_removing_equals_masking_in_other_architectures(options):
    model = AdaptiveViT(halting_vit(**options), VARIED)
    with torch.no_grad():
        assert_close(TokenRemoval(model)(images(6)), model(images(6)), rtol=0, atol=1e-5)


def test_half_precision():
    model = AdaptiveViT(halting_vit(), VARIED).bfloat16()
    x = images(4).bfloat16()
    with torch.no_grad():
        masked, removed = model(x), TokenRemoval(model)(x)
    assert masked.dtype == removed.dtype == torch.bfloat16 and masked.isfinite().all() and removed.isfinite().all()


def test_an_image_does_not_depend_on_its_batch():
    engine, x = TokenRemoval(AdaptiveViT(halting_vit(), VARIED)), images(7)
    alone = torch.cat([engine.run(image[None]).features for image in x])
    assert_close(engine.run(x).features, alone, rtol=0, atol=1e-5)


def test_an_image_is_done_when_its_class_token_halts():
    model = AdaptiveViT(halting_vit(cls=5.0), Halting(1.0, -1.0))
    x = images(9)
    tokens, trace = TokenRemoval(model).run(x).tokens, model.run(x)
    for image in range(9):
        ended = int(trace.depth[image, 0])
        assert (tokens[:ended, image] > 0).all() and (tokens[ended:, image] == 0).all()
    assert (trace.alive.sum(2)[-1] > 0).any()  # where masking goes on with the other tokens


@pytest.mark.parametrize("step", [16, 1, 4, 100])
@pytest.mark.parametrize("name", ["mixed", "class token first", "all at once", "none"])
def test_counted_multiply_adds_equal_the_closed_form(name, step):
    halting, changes = PATTERNS[name]
    model = AdaptiveViT(halting_vit(**changes), halting)
    engine, x = TokenRemoval(model, step), images(6)
    tokens = engine.run(x).tokens
    assert count_macs(engine, x) == executed_macs(model.vit, tokens, step=engine.step)
    if name == "mixed":
        assert executed_macs(model.vit, tokens, step=1) < executed_macs(model.vit, tokens, step=100)
        assert count_macs(engine, x) < 0.95 * count_macs(model, x)


def test_dense_cost_is_that_of_the_plain_model():
    vit = halting_vit()
    assert dense_macs(vit) == model_cost(vit).macs


def test_constants_changed_later_are_followed():
    model = AdaptiveViT(halting_vit(), Halting(0.0, 50.0))
    engine = TokenRemoval(model)
    assert (engine.run(images(2)).tokens[1:] == 0).all()
    model.halting = Halting(0.0, -200.0)
    assert (engine.run(images(2)).tokens == 17).all()


def test_weights_are_shared_and_results_usable_in_training():
    model = AdaptiveViT(halting_vit(), VARIED)
    engine = TokenRemoval(model)
    assert [id(p) for p in engine.parameters()] == [id(p) for p in model.parameters()]
    engine(images(2)).sum().backward()  # the head learns, the features are constants
    assert model.vit.head.weight.grad.any() and model.vit.blocks[0].mlp.fc1.weight.grad is None
    with pytest.raises(ValueError, match="step=0"):
        TokenRemoval(model, 0)


def test_no_images_give_no_features():
    model = AdaptiveViT(halting_vit(), VARIED)
    removed = TokenRemoval(model).run(images(1)[:0])
    assert removed.features.shape == (0, model.vit.embed_dim) and removed.tokens.shape == (5, 0)
    assert TokenRemoval(model)(images(1)[:0]).shape == model(images(1)[:0]).shape


def test_a_model_whose_tokens_do_not_halt_is_refused():
    with pytest.raises(ValueError, match=r"VisionTransformer do not halt: AdaptiveViT\(vit"):
        TokenRemoval(halting_vit())


def test_buckets():
    lengths = np.array([9, 9, 8, 5, 4, 1])
    assert buckets_of(lengths, 1, 9) == [(0, 2, 9), (2, 3, 8), (3, 4, 5), (4, 5, 4), (5, 6, 1)]
    assert buckets_of(lengths, 4, 9) == [(0, 2, 9), (2, 4, 8), (4, 6, 4)]  # never more than an image has
    assert buckets_of(lengths, 100, 9) == [(0, 6, 9)]
    assert buckets_of(lengths[:0], 4, 9) == []
