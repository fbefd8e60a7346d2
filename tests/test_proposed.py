import itertools
import random

import numpy as np
import pandas as pd
import pytest
import torch
from proposed_models import images, untrained_teacher
from timm.models.vision_transformer import Block, VisionTransformer
from torch.testing import assert_close

from thesis_lib import attention, backbone, class_token, export, perceptual, proposed
from thesis_lib.layer_plan import DROP, KEEP, Plan, apply_plan, plan_of
from thesis_lib.perceptual import Metric
from thesis_lib.token_merging import merge_tokens

DEPTH, TINY = 6, dict(img_size=32, patch_size=8, embed_dim=32, depth=6, num_heads=2, num_classes=0)


@pytest.fixture
def teacher() -> Metric:
    return untrained_teacher()


@pytest.fixture
def tiny() -> Metric:
    torch.manual_seed(0)
    return Metric(VisionTransformer(**TINY).eval()).requires_grad_(False)


# The plan ---------------------------------------------------------------------------------------------------------


def test_dropped_blocks_and_the_halved_grid_do_what_they_say(teacher):
    plan = Plan(("mha", "drop", "pool", "mha", "identity", "drop"), merge=2)
    model, whole = proposed.planned(teacher, plan).backbone, teacher.backbone
    x = (images() - teacher.mean) / teacher.std
    tokens = whole.blocks[0](whole._pos_embed(whole.patch_embed(x)))  # (B, 1 + 64, D)
    cells = tokens[:, 1:].unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2)  # 2 x 2 patches of the 8 x 8 grid
    tokens = torch.cat([tokens[:, :1], cells], 1)
    for source, mixer in ((2, "pool"), (3, "mha"), (4, "identity")):
        block = whole.blocks[source]
        block.attn = backbone.attention.get(mixer).from_attention(block.attn, (4, 4), 1)
        tokens = block(tokens)
    found = model.forward_intermediates(x, indices=1, return_prefix_tokens=True, output_fmt="NLC")[1][0]
    assert_close(found[1][:, 0], tokens[:, 0], atol=1e-5, rtol=1e-5)
    assert_close(found[0], tokens[:, 1:], atol=1e-5, rtol=1e-5)
    assert len(model.blocks) == 4 and [b.attn.name for b in model.blocks] == ["mha", "pool", "mha", "identity"]


def test_the_class_token_alone_is_the_same_after_any_plan(teacher):
    metric = proposed.planned(teacher, Plan(("mha", "pool", "drop", "mha", "drop", "mha"), merge=3))
    assert class_token.applies(metric.backbone)
    quick = metric.embed(images())
    handle = metric.backbone.blocks[-1].register_forward_hook(lambda *_: None)  # asks for all tokens
    assert not class_token.applies(metric.backbone)
    assert_close(metric.embed(images()), quick, atol=1e-6, rtol=1e-5)
    handle.remove()


def test_the_teacher_is_left_as_it_was(teacher):
    before = teacher.embed(images())
    proposed.planned(teacher, Plan(("drop", "pool", "sra", "identity", "mha", "mha"), merge=2))
    assert torch.equal(teacher.embed(images()), before) and "plan" not in teacher.backbone.recipe


@pytest.mark.parametrize(
    "plan",
    [
        Plan(("mha", "drop", "drop", "mha", "mha", "mha")),
        Plan(("sra", "mha", "pool", "identity", "mha", "drop")),
        Plan(("mha", "drop", "mha", "pool", "drop", "mha"), merge=2),
    ],
)
def test_a_planned_metric_is_saved_and_loaded(teacher, tmp_path, plan):
    metric = proposed.planned(teacher, plan)
    loaded, preprocess = perceptual.load(perceptual.save(metric, tmp_path / "planned"))
    assert torch.equal(loaded.embed(images()), metric.embed(images()))
    assert Plan(**loaded.backbone.recipe["plan"]) == plan
    assert [type(b) for b in loaded.backbone.blocks] == [type(b) for b in metric.backbone.blocks]


def test_a_planned_metric_is_exported(teacher, tmp_path):
    metric = proposed.planned(teacher, Plan(("mha", "drop", "pool", "mha", "drop", "mha"), merge=2))
    run = export.load(export.save_program(metric, tmp_path / "embed.pt2"))
    assert_close(run(images(5)), metric.embed(images(5)), atol=1e-4, rtol=0)


def test_no_two_plans_share_a_label():
    actions = (*attention.MIXERS, DROP)
    plans = [Plan((a, b, c, KEEP, KEEP), m) for a, b, c in itertools.product(actions, repeat=3) for m in (None, 3)]
    assert len({plan.label for plan in plans}) == len(plans)
    known = {"mha": "M", "sra": "S", "pool": "P", "identity": "I", DROP: "-"}  # of the runs that there are
    assert {action: Plan((action, KEEP, KEEP)).label[:-2] for action in known} == known
    assert Plan(("moh", "soft", "performer")).label == "MoSoPe"


def test_a_plan_is_stretched_by_place():
    plan = Plan(("mha", "pool", "drop", "mha"), merge=1)
    assert plan.stretched(8) == Plan(("mha",) * 2 + ("pool",) * 2 + ("drop",) * 2 + ("mha",) * 2, 2)
    assert plan.stretched(4) == plan and plan.label == "M/P-M"
    assert plan.stretched(6).merge == 2 and Plan(**plan.described()) == plan


@pytest.mark.parametrize(
    ("actions", "merge", "message"),
    [
        (("mha", "poool"), None, "did you mean pool"),
        (("mha", "drop"), None, "two blocks"),
        (("mha", "drop", "mha"), 1, "must be a block that stays"),
        (("mha", "mha", "drop"), 1, "not the last"),
    ],
)
def test_a_wrong_plan_is_refused(actions, merge, message):
    with pytest.raises(ValueError, match=message):
        Plan(actions, merge)


def test_a_plan_that_does_not_fit_leaves_the_model_alone(teacher):
    with pytest.raises(ValueError, match="the plan is for 2 blocks, the model has 6"):
        apply_plan(teacher.backbone, ("mha", "mha"))
    odd = VisionTransformer(img_size=24, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
    with pytest.raises(ValueError, match="3x3 patches cannot be halved"):
        apply_plan(odd, ("mha",) * 3, merge=1)
    assert all(type(block) is Block for block in odd.blocks)
    with pytest.raises(ValueError, match="not from Pool"):
        apply_plan(backbone.create("demo", "pool", [0], pretrained=False), ("mha",) * 6)


# The search -------------------------------------------------------------------------------------------------------


def every_plan(loss, halving, seconds):
    """All plans with their predicted numbers, written from the definition."""
    depth = 1 + max(layer for layer, _ in loss)
    names = {name for name, *_ in seconds}
    for actions in itertools.product([*names, DROP], repeat=depth):
        kept = [i for i, action in enumerate(actions) if action != DROP]
        if len(kept) < 2:
            continue
        for merge in (None, *(p for p in halving if p in kept[:-1])):
            keys = [(actions[i], merge is not None and i >= merge, i == kept[-1]) for i in kept]
            if not all(key in seconds for key in keys):
                continue
            lost = sum(loss.get((i, action), 0) for i, action in enumerate(actions)) + halving.get(merge, 0)
            yield sum(seconds[key] for key in keys), lost, Plan(actions, merge)


@pytest.mark.parametrize("whole_grid", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_equals_brute_force(seed, whole_grid):
    draw, depth = random.Random(seed), 4
    loss = {(i, name): draw.randint(0, 9) / 10 for i in range(depth) for name in ("pool", "identity", DROP)}
    halving = {i: draw.randint(0, 9) / 10 for i in range(1, depth - 1)}
    keys = [(n, small, last) for n in (KEEP, "pool", "identity") for small in (False, True) for last in (False, True)]
    seconds = {key: draw.randint(1, 20) / 4 for key in keys if key[:2] != ("identity", True)}
    plans = [item for item in every_plan(loss, halving, seconds) if whole_grid or item[2].merge is not None]
    best = {
        (t, round(a, 9))
        for t, a, _ in plans
        if not any(s <= t and b < a - 1e-9 or s < t and b <= a + 1e-9 for s, b, _ in plans)
    }
    front = proposed.pareto_plans(loss, halving, seconds, whole_grid=whole_grid)
    assert {(t, round(a, 9)) for t, a, _ in front} == best and len(front) == len(best)
    found = {plan: (t, round(a, 9)) for t, a, plan in plans}
    assert all(found[plan] == (t, round(a, 9)) for t, a, plan in front)
    assert [t for t, *_ in front] == sorted(t for t, *_ in front)


def test_budgets_take_the_least_loss_that_they_allow():
    a, b, c = ((s, 1 / s, Plan((KEEP,) * 2)) for s in (1.0, 2.0, 4.0))
    assert proposed.within_budgets([a, b, c], (1.0, 0.6, 0.55, 0.3, 0.1), 4.0) == [c, b, a]


# The rule ---------------------------------------------------------------------------------------------------------


def table(**candidates):
    rows = [
        {"name": name, "accuracy": accuracy, "seconds": seconds} for name, (accuracy, seconds) in candidates.items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ({"slow": (0.93, 9), "quick": (0.89, 2), "wrong": (0.87, 1)}, "quick"),  # the fastest within two points
        ({"edge": (0.88, 1), "slow": (0.9, 3)}, "edge"),  # exactly two points
        ({"poor": (0.8, 1), "worse": (0.7, 0.5)}, "teacher"),  # nothing else qualifies
        ({"beaten": (0.885, 2), "better": (0.89, 2)}, "better"),  # as fast: only the better one is on the front
        ({"first": (0.89, 2), "second": (0.89, 2)}, "first"),  # equal in both
        ({"slower": (0.9, 11), "worse": (0.89, 12)}, "teacher"),
    ],
)
def test_the_rule_on_tables_made_by_hand(candidates, chosen):
    assert proposed.select(table(teacher=(0.9, 10), **candidates), "teacher") == chosen


def test_the_rule_needs_the_teacher_once():
    with pytest.raises(ValueError, match="one of the teacher 'teacher'"):
        proposed.select(table(a=(0.9, 1)), "teacher")
    twice = pd.concat([table(teacher=(0.9, 1), a=(0.8, 1)), table(a=(0.9, 2))])
    with pytest.raises(ValueError, match="one row each"):
        proposed.select(twice, "teacher")


def test_the_front_is_what_no_other_beats():
    frame = table(a=(0.9, 3), b=(0.9, 2), c=(0.8, 1), d=(0.7, 1), e=(0.95, 5), f=(0.95, 5))
    assert proposed.on_front(frame).tolist() == [False, True, True, False, True, True]


# What is measured -------------------------------------------------------------------------------------------------


class Triplets:
    index = np.arange(12).reshape(4, 3)
    right_vote = np.array([0.0, 1.0, 1.0, 0.0])


class Bytes:
    usable = np.ones(12, bool)

    def __init__(self, size: int = 32):
        self.values = (images(12, size) * 255).byte()

    def __len__(self):
        return 12

    def __getitem__(self, rows):
        return self.values[torch.as_tensor(rows)]


def test_sensitivity_has_a_row_for_every_change_and_sees_it(tiny):
    rows = pd.DataFrame(proposed.sensitivity(tiny, Triplets(), Bytes(), ["identity"], progress=False))
    distance = rows[rows["metric"] == "embedding_distance"].set_index(["layer", "action"])["value"]
    assert len(distance) == 2 * DEPTH + DEPTH - 2 and (distance > 0).all()
    changed = proposed.planned(tiny, Plan((KEEP, KEEP, DROP, KEEP, KEEP, KEEP)))
    pixels = Bytes().values.float() / 255
    expected = perceptual.distance(tiny.embed(pixels), changed.embed(pixels)).mean()
    assert distance[2, DROP] == pytest.approx(expected.item(), abs=1e-5)
    loss = rows[rows["metric"] == "2afc_loss"]
    assert (loss["n"] == 4).all() and (loss["low"] <= loss["value"]).all()


def test_blocks_are_timed_by_mixer_grid_and_place(tiny):
    found = proposed.block_seconds(tiny, {False: ["sra", "pool"], True: ["pool"]}, images(2, 32), rounds=1)
    wanted = {
        (n, small, last)
        for n, small in (("mha", False), ("sra", False), ("pool", False), ("mha", True), ("pool", True))
        for last in (False, True)
    }
    assert set(found) == wanted and min(found.values()) > 0


def test_a_model_says_its_plan(teacher):
    plan = Plan(("mha", "pool", "drop", "mha", "drop", "mha"), merge=1)
    assert plan_of(proposed.planned(teacher, plan).backbone) == (plan, [])
    assert plan_of(backbone.create("demo", "sra", pretrained=False)) == (Plan(("sra",) * DEPTH), [])
    merge_tokens(teacher.backbone, [0, 0, 0, 8, 8, 8])
    assert plan_of(teacher.backbone) == (Plan((KEEP,) * DEPTH), [0, 0, 0, 0.125, 0.125, 0.125])
