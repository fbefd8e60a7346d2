import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from thesis_lib import backbone
from thesis_lib.correspondence import objectives
from thesis_lib.correspondence.features import ViTFeatures
from thesis_lib.correspondence.objectives import (
    centres,
    map_mse,
    point_cross_entropy,
    point_mse,
    positions,
    released_cross_entropy,
    similarities,
    softmax_cross_entropy,
    to_grid,
)
from thesis_lib.correspondence.students import Student, Upsampler, merge, tune
from thesis_lib.correspondence.training import expand, pair_points, retrieval_pairs, train, validate


def cosines(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ------------------------------------------------------------------------------------------------- objectives


def test_equal_similarities_give_the_teachers_entropy_and_no_gradient():
    teacher = cosines(2, 5, 16)
    student = teacher.clone().requires_grad_()
    loss = softmax_cross_entropy(student, teacher, torch.ones(2, 5), temperature=0.1)
    p = (teacher / 0.1).softmax(-1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(-1).mean())
    loss.backward()
    assert student.grad.abs().max() < 1e-6


def test_the_intended_loss_is_not_the_released_one():
    student, teacher = cosines(2, 5, 7), cosines(2, 5, 7, seed=1)
    p, t = (student / 0.1).softmax(-1), (teacher / 0.1).softmax(-1)
    released = -(t * p.log_softmax(1)).sum(1).mean()  # over source positions, of probabilities
    torch.testing.assert_close(released_cross_entropy(student, teacher, 0.1), released)
    loop = sum(-(t[b, i] * p[b, i].log()).sum() for b in range(2) for i in range(5)) / 10
    torch.testing.assert_close(softmax_cross_entropy(student, teacher, torch.ones(2, 5), 0.1), loop)
    assert abs(loop - released) > 0.5


def test_padded_positions_weigh_nothing():
    student, teacher, weights = cosines(1, 3, 4), cosines(1, 3, 4, seed=1), torch.tensor([[1.0, 1.0, 0.0]])
    for loss in (softmax_cross_entropy, map_mse):
        whole = loss(student, teacher, weights)
        torch.testing.assert_close(whole, loss(student[:, :2], teacher[:, :2], torch.ones(1, 2)))


def test_point_losses_are_least_at_the_truth():
    grid, at = (4, 6), torch.tensor([[[0.75, 0.375]]])  # cell (1, 4)
    for loss in (point_cross_entropy, point_mse):
        values = []
        for cell in range(24):
            similarity = torch.full((1, 1, 24), -1.0)
            similarity[0, 0, cell] = 1
            values.append(loss(similarity, grid, at, torch.ones(1, 1), temperature=0.05).item())
        assert int(np.argmin(values)) == 1 * 6 + 4, loss.__name__
    sharp = point_cross_entropy(similarity, grid, at, torch.ones(1, 1), temperature=1.0, blur=0)
    torch.testing.assert_close(sharp, -similarity[0, 0].log_softmax(-1)[10])


def test_similarities_are_cosines_at_positions():
    source, target = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 3, 3)
    found = similarities(source, target, centres(4, 6).expand(2, -1, -1))
    expected = F.normalize(source.flatten(2), dim=1).mT @ F.normalize(target.flatten(2), dim=1)
    torch.testing.assert_close(found, expected)
    assert to_grid(found, (3, 3), (6, 6)).shape == (2, 24, 36)


def test_positions_of_every_sampling():
    maps = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0)) * 0.05
    maps[:, 0] -= 1
    maps[:, 0, 3:7, 3:7] += 2
    points = torch.tensor([[[0.2, 0.4], [torch.nan, torch.nan]], [[0.1, 0.1], [0.9, 0.8]]])
    draw = lambda sampling, seed=0: positions(sampling, maps, points, 9, torch.Generator().manual_seed(seed))
    assert torch.equal(draw("full")[0][0], centres(10, 10)) and torch.equal(draw("grid")[0][1], centres(3, 3))
    at, weights = draw("foreground")
    assert at.shape == (2, 9, 2) and (at >= 0.3).all() and (at <= 0.7).all() and (weights == 1).all()
    assert draw("random")[0].max() > 0.75 and torch.equal(draw("random")[0], draw("random")[0])
    assert not torch.equal(draw("random")[0], draw("random", 1)[0])
    at, weights = draw("ground_truth")
    assert weights.tolist() == [[1, 0], [1, 1]] and at[0, 0].tolist() == pytest.approx([0.2, 0.4])
    with pytest.raises(ValueError, match="did you mean foreground"):
        draw("forground")
    assert set(objectives.SAMPLINGS) == {"full", "grid", "random", "foreground", "ground_truth"}


# --------------------------------------------------------------------------------------------------- students


def student_of(vit) -> Student:
    return Student(ViTFeatures(copy.deepcopy(vit), (4,)))


def test_lora_starts_at_the_base_and_merging_changes_nothing(vit):
    x = torch.rand(1, 3, 64, 64)
    base = student_of(vit)(x)["student"]
    student = tune(student_of(vit), "lora", layers=(1, -3), rank=2)
    torch.testing.assert_close(student(x)["student"], base)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(".1." in n or ".3." in n for n in trained) and all("lora" in n for n in trained)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if p.requires_grad and "lora_B" in name:
                p.normal_(std=0.1)
    tuned = student(x)["student"]
    assert not torch.allclose(tuned, base)
    torch.testing.assert_close(merge(student)(x)["student"], tuned, atol=1e-5, rtol=1e-4)
    assert not any("lora" in name for name, _ in student.named_parameters())


def test_full_tuning_leaves_alone_what_comes_after_the_map(vit):
    trained = {name for name, p in tune(student_of(vit), "full").named_parameters() if p.requires_grad}
    assert any("blocks.4.mlp" in n for n in trained) and any("patch_embed" in n for n in trained)
    assert not any("blocks.5" in n or ".norm." in n for n in trained)


def test_an_upsampler_starts_as_plain_upsampling(vit):
    student = tune(student_of(vit), "upsampler", factor=4)
    x = torch.rand(1, 3, 64, 64)
    plain = F.interpolate(student.extractor(x)["4"], scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(student(x)["student"], plain)
    assert all(name.startswith("upsampler.") for name, p in student.named_parameters() if p.requires_grad)
    assert Upsampler(4, 2)(torch.rand(1, 4, 3, 5)).shape == (1, 4, 6, 10)


def test_wrong_students_are_refused(vit):
    with pytest.raises(ValueError, match="did you mean lora"):
        tune(student_of(vit), "loar")
    with pytest.raises(ValueError, match=r"layers \[9\]"):
        tune(student_of(vit), "lora", layers=(9,))
    with pytest.raises(ValueError, match="makes 4, not '5'"):
        Student(ViTFeatures(vit, (4,)), "5")
    with pytest.raises(ValueError, match="even number"):
        Upsampler(4, 3)


# --------------------------------------------------------------------------------------------------- training

OPTIONS = {"epochs": 3, "batch_size": 2, "device": "cpu", "progress": False}


@pytest.fixture
def pixels(pairs):
    return torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_supervision_lowers_its_loss(vit, pairs, pixels, loss):
    student = tune(student_of(vit), "full")
    log = train(student, pairs, pixels, loss=loss, temperature=0.1, lr=3e-4, **OPTIONS)
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("loss, sampling", [("cross_entropy", "full"), ("mse", "foreground"), ("mse", "ground_truth")])
def test_a_teacher_is_learnt_from_its_maps_alone(vit, pairs, pixels, loss, sampling):
    """The teacher's grid is finer than the student's; where the teacher is the student itself, nothing is learnt."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(6, 5, 12, 12, generator=generator)
    student = tune(student_of(vit), "full")
    options = {"loss": loss, "sampling": sampling, "positions": 8, "temperature": 0.1, "lr": 3e-4}
    log = train(student, pairs, pixels, teacher=lambda place: maps[place], teacher_name="noise", **options, **OPTIONS)
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_student_that_is_its_own_teacher_stays_itself(vit, pairs, pixels):
    student = tune(student_of(vit), "full")
    with torch.no_grad():
        maps = student(pixels.float() / 255)["student"]
    options = OPTIONS | {"loss": "mse", "lr": 1e-5, "epochs": 1}  # AdamW makes steps of the rate even of rounding noise
    (own,) = train(copy.deepcopy(student), pairs, pixels, teacher=lambda place: maps[place], **options)
    (other,) = train(copy.deepcopy(student), pairs, pixels, teacher=lambda place: maps[5 - place], **options)
    assert own["loss"] < 1e-6 < 1e-2 < other["loss"]  # of the images' own maps, and of other images'


def test_a_run_is_resumed_and_another_refused(vit, pairs, pixels, tmp_path):
    options = {"lr": 3e-4, "temperature": 0.1, "checkpoint": tmp_path / "run", "schedule": "constant"}
    whole = tune(student_of(vit), "full")
    train(whole, pairs, pixels, lr=3e-4, temperature=0.1, **OPTIONS)
    train(tune(student_of(vit), "full"), pairs, pixels, **options, **OPTIONS | {"epochs": 1})
    again = tune(student_of(vit), "full")
    train(again, pairs, pixels, **options, **OPTIONS)
    torch.testing.assert_close(whole.state_dict(), again.state_dict(), atol=0, rtol=0)
    with pytest.raises(ValueError, match="another run.*loss"):
        train(tune(student_of(vit), "full"), pairs, pixels, loss="mse", **options, **OPTIONS)
    keys = [tune(Student(ViTFeatures(copy.deepcopy(vit), (4,), (facet,))), "full") for facet in ("key", "query")]
    train(keys[0], pairs, pixels, **options | {"checkpoint": tmp_path / "keys"}, **OPTIONS)
    with pytest.raises(ValueError, match="task.key: 4.key there, 4.query here"):  # of the same weights
        train(keys[1], pairs, pixels, **options | {"checkpoint": tmp_path / "keys"}, **OPTIONS)


def test_validation_keeps_the_best_epoch(vit, pairs, pixels):
    student = tune(student_of(vit), "full")
    log = train(student, pairs, pixels, lr=3e-4, val=(pairs, [0, 2]), **OPTIONS)
    assert max(row["pck"] for row in log) == pytest.approx(validate(student, pairs, [0, 2]))


def test_retrieval_never_pairs_an_image_with_itself():
    embeddings = torch.eye(4).repeat_interleave(3, 0) + 0.01 * torch.randn(12, 4)
    index = retrieval_pairs(embeddings, 200, neighbours=2)
    assert index.shape == (200, 2) and (index[:, 0] != index[:, 1]).all()
    assert (index[:, 0] // 3 == index[:, 1] // 3).all()  # the two nearest are of the same group
    with pytest.raises(ValueError, match="at least two"):
        retrieval_pairs(embeddings[:1], 3)


def test_retrieved_pairs_need_a_teacher(vit, pairs, pixels):
    index = np.array([[0, 3], [1, 2]])
    student = tune(student_of(vit), "full")
    with pytest.raises(ValueError, match="no true points"):
        train(student, pairs, pixels, index=index, lr=1e-4, **OPTIONS)
    maps = torch.randn(6, 5, 8, 8)
    log = train(student, pairs, pixels, index=index, teacher=lambda p: maps[p], lr=1e-4, **OPTIONS | {"epochs": 1})
    assert np.isfinite(log[0]["loss"])
    with pytest.raises(ValueError, match="did you mean mse"):
        train(student, pairs, pixels, loss="msee", lr=1e-4, **OPTIONS)


def test_points_are_shares_of_their_image(pairs):
    points = pair_points(pairs)
    pair = pairs.pairs[2]
    assert points.shape == (5, 2, 4, 2)
    expected = (pair.target_points[1] + 0.5) / [40, 30]
    np.testing.assert_allclose(points[2, 1, 1], expected, rtol=1e-6)


def test_a_grid_is_all_with_all():
    runs = list(expand({"name": "s", "backbone": ["demo", "x"], "tune": ["full", "lora"], "lr": 1e-4}))
    assert [run["name"] for run in runs] == ["s-demo-full", "s-demo-lora", "s-x-full", "s-x-lora"]
    assert all(run["lr"] == 1e-4 for run in runs)


def test_students_evaluate_with_any_mixer(pairs):
    torch.manual_seed(0)
    pool = backbone.create("demo", "pool", pretrained=False)
    assert 0 <= validate(Student(ViTFeatures(pool)).eval(), pairs) <= 1
