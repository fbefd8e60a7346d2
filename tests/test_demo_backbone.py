import numpy as np
import pytest
import torch

from thesis_lib import backbone, demo_backbone
from thesis_lib.datasets import rendering, scenes
from thesis_lib.datasets.scenes import Stream
from thesis_lib.demo_backbone import CLASSES, FIELDS, PER_TOKEN


def drawn(seeds):
    pairs = [(scenes.draw_scene(Stream(3, i)), i) for i in seeds]
    things = np.stack([demo_backbone.describe(scene, view) for scene, view in pairs])
    return torch.from_numpy(things), torch.tensor([(scene.gaze, scene.pairing) for scene, _ in pairs])


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarter_turns", range(4))
def test_symmetries_move_picture_and_factors_together(quarter_turns, mirrored):
    side = 20
    images, things = torch.zeros(1, 3, side, side), torch.zeros(1, 2, len(FIELDS))
    pixels = torch.tensor([[3, 14], [11, 6]])  # rows and columns of two things; the first heads towards the second
    for i, (row, column) in enumerate(pixels):
        images[0, i, row, column] = 1
        things[0, i, :2] = (torch.tensor([column, row]) + 0.5) * 2 / side - 1
        things[0, i, 3:5] = things[0, i, :2].sign()
    things[0, 0, 5:7] = things[0, 1, :2] - things[0, 0, :2]
    turned, moved = demo_backbone.turn(images, things, quarter_turns, mirrored)
    for i in range(2):
        row, column = turned[0, i].nonzero()[0]
        expected = (torch.tensor([column, row]) + 0.5) * 2 / side - 1
        assert torch.allclose(moved[0, i, :2], expected)
        assert torch.equal(moved[0, i, 3:5], expected.sign())
    assert torch.allclose(moved[0, 0, 5:7], moved[0, 1, :2] - moved[0, 0, :2])


class Oracle(torch.nn.Module):
    """Answer with logits that were computed from the factors by hand."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, images):
        return self.answers


def answers(things, relations, side=8):
    """Name the factors by loops, independently of the loss."""
    cells, patches = torch.zeros(len(things), 9, PER_TOKEN), torch.zeros(len(things), side * side, PER_TOKEN)
    scene = torch.zeros(len(things), 7)
    axis = [(i + 0.5) * 2 / side - 1 for i in range(side)]

    def name(token, thing):
        start = 0
        for factor, classes in CLASSES.items():
            if thing is not None:
                token[start + int(thing[FIELDS.index(factor)]) + (factor == "kind")] = 30
            elif factor == "kind":
                token[start] = 30
            start += classes
        if thing is not None:
            token[-2:] = thing[5:7]

    for b, rows in enumerate(things):
        for cell in range(9):
            here = [t for t in rows if (t[3], t[4]) == (cell % 3 - 1, cell // 3 - 1)]
            name(cells[b, cell], here[0] if here else None)
        for p in range(side * side):
            x, y = axis[p % side], axis[p // side]
            near = min(rows, key=lambda t: float(((t[0] - x) ** 2 + (t[1] - y) ** 2) ** 0.5 / t[2]))
            covered = ((near[0] - x) ** 2 + (near[1] - y) ** 2) ** 0.5 < near[2]
            name(patches[b, p], near if covered else None)
        scene[b, relations[b, 0]] = scene[b, 4 + relations[b, 1]] = 30
    return cells, patches, scene


def test_loss_is_zero_for_the_true_names_only():
    things, relations = drawn(range(6))
    images = torch.zeros(6, 3, 64, 64)
    right = answers(things, relations)
    assert demo_backbone.naming_loss(Oracle(right), (images, things, relations)) < 1e-4
    shuffled = things.flip(1)  # the order in which a scene lists its things says nothing
    assert demo_backbone.naming_loss(Oracle(right), (images, shuffled, relations)) < 1e-4
    for part in range(3):
        wrong = [answer.clone() for answer in right]
        wrong[part] = wrong[part].roll(1, 0)
        assert demo_backbone.naming_loss(Oracle(wrong), (images, things, relations)) > 0.5


def test_pool_is_made_once_and_is_of_the_scenes_it_says(tmp_path):
    pool = demo_backbone.make_pool(tmp_path, 3, 32, workers=1)
    stream = Stream(demo_backbone.POOL_KEY, 2)
    scene, view = scenes.draw_scene(stream), stream.below(2**31)
    assert np.array_equal(pool["images"][2], rendering.render(scene, view, 32))
    assert np.array_equal(pool["things"][2], demo_backbone.describe(scene, view))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    demo_backbone.make_pool(tmp_path, 3, 32, workers=1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_training_runs_learns_and_repeats_itself(tmp_path):
    options = {"count": 48, "epochs": 2, "batch_size": 16, "lr": 1e-3, "seed": 1, "triplets": 20}
    backbones, rows = zip(*(demo_backbone.train(**options, cache=tmp_path / str(i)) for i in range(2)), strict=True)
    assert rows[0][-1]["loss"] < rows[0][0]["loss"]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in backbones), strict=True))
    assert [row["2afc"] for row in rows[0]] == [row["2afc"] for row in rows[1]]


def test_calibration_triplets_tell_the_shipped_backbone_from_a_random_one():
    calibration = demo_backbone.Calibration(60, 64, seed=5)
    assert len(calibration.index) == len(calibration.right_vote) <= 60
    torch.manual_seed(0)
    assert calibration.two_afc(backbone.create("demo")) > 0.8  # 0.92
    assert 0.3 < calibration.two_afc(backbone.create("demo", pretrained=False)) < 0.7
