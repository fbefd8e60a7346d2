"""NIGHTS in its published layout, and every way it can be broken."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from thesis_lib.datasets.nights import NIGHTS

COLUMNS = ["id", "left_vote", "right_vote", "votes", "ref_path", "left_path", "right_path", "split", "is_imagenet"]


def triplet(number: int, *, right=0, votes=6, split="test", imagenet="TRUE") -> dict:
    folder, name = f"{number // 1000:03d}", f"{number % 1000:03d}"
    paths = [f"ref/{folder}/{name}.png", f"distort/{folder}/{name}_0.png", f"distort/{folder}/{name}_1.png"]
    return dict(zip(COLUMNS, [number, 1 - right, right, votes, *paths, split, imagenet], strict=True))


def write(root, rows, images=True):
    root.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(root / "data.csv", index=False)
    for row in rows if images else []:
        for k, column in enumerate(["ref_path", "left_path", "right_path"]):
            path = root / str(row[column])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (k, row["id"] % 256, row["id"] // 256)).save(path)
    return root


ROWS = [
    triplet(2, right=1),
    triplet(57_415, right=0, imagenet="FALSE"),
    triplet(9, right=1, votes=5),
    triplet(1_003, right=1, votes=7, imagenet="FALSE"),
    triplet(4, split="train"),
    triplet(5, split="val", right=1),
]


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("train", [4]),
        ("val", [5]),
        ("test", [2, 57_415, 1_003]),
        ("test_imagenet", [2]),
        ("test_no_imagenet", [57_415, 1_003]),
        ("all", [2, 57_415, 1_003, 4, 5]),
    ],
)
def test_splits_keep_the_triplets_with_six_votes(tmp_path, split, ids):
    assert NIGHTS(write(tmp_path, ROWS), split).ids.tolist() == ids


def test_columns_are_found_by_name_in_any_order(tmp_path):
    rows = [dict(reversed(row.items()), prompt="An image of a cat") for row in ROWS]
    dataset = NIGHTS(write(tmp_path, rows), "test", min_votes=0)
    assert dataset.ids.tolist() == [2, 57_415, 9, 1_003]
    assert dataset.right_vote.dtype == np.float32 and dataset.right_vote.tolist() == [1, 0, 1, 1]
    assert dataset.is_imagenet.tolist() == [True, False, True, False]


def test_a_sample_is_reference_left_right_vote_and_id(tmp_path):
    ref, left, right, vote, number = NIGHTS(write(tmp_path, ROWS), "test")[1]
    colours = [image.getpixel((0, 0)) for image in (ref, left, right)]
    assert colours == [(k, 57_415 % 256, 57_415 // 256) for k in range(3)]
    assert (ref.mode, vote, number) == ("RGB", 0.0, 57_415)


def test_index_points_into_the_distinct_images(tmp_path):
    shared = triplet(3) | {"ref_path": ROWS[0]["ref_path"]}
    dataset = NIGHTS(write(tmp_path, [ROWS[0], shared]), "test")
    assert len(dataset.paths) == 5 and dataset.index.dtype == np.int64
    assert dataset.index.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert dataset.paths[4] == tmp_path / "distort/000/003_1.png"


@pytest.mark.parametrize("yes_no", [("TRUE", "FALSE"), ("True", "False"), (1, 0), ("1.0", "0.0")])
def test_is_imagenet_is_read_however_it_was_written(tmp_path, yes_no):
    rows = [triplet(k, imagenet=yes_no[k % 2]) for k in range(4)]
    assert NIGHTS(write(tmp_path, rows), "test").is_imagenet.tolist() == [True, False, True, False]


def test_an_unreadable_is_imagenet_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.csv: 1 rows with an is_imagenet .*'id': 4"):
        NIGHTS(write(tmp_path, [triplet(3), triplet(4, imagenet="maybe")]), "test")


def test_blanks_around_a_split_are_no_part_of_it(tmp_path):
    root = write(tmp_path, [triplet(3), triplet(4, split=" test "), triplet(5, split="train")])
    assert NIGHTS(root, "test").ids.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "tst"}, "a split that is none of train, val, test; first: .*'id': 4"),
        ({"split": "Train"}, "a split that is none of train, val, test; first: .*'id': 4"),
        ({"id": None}, "no id; first: .*004.png"),
        ({"id": 3}, "the id of a row above; first: .*004.png"),
    ],
)
def test_a_row_of_no_split_or_without_an_id_of_its_own_is_refused(tmp_path, changed, message):
    root = write(tmp_path, [triplet(3), triplet(4) | changed, triplet(5)], images=False)
    with pytest.raises(ValueError, match=rf"data\.csv: 1 rows with {message}"):
        NIGHTS(root, "test")


def test_max_samples_is_a_fixed_balanced_nested_subset(tmp_path):
    rows = [triplet(k, right=int(k < 30), imagenet="TRUE" if k % 3 else "FALSE") for k in range(60)]
    root = write(tmp_path, rows, images=False)
    write(root, rows)
    small, large = NIGHTS(root, "test", max_samples=12), NIGHTS(root, "test", max_samples=24)
    assert small.ids.tolist() == NIGHTS(root, "test", max_samples=12).ids.tolist() == sorted(small.ids)
    assert set(small.ids) < set(large.ids) and len(large) == 24
    assert small.right_vote.sum() == 6 and small.is_imagenet.sum() == 8
    assert small.ids.tolist() != list(range(0, 60, 5)) and len(NIGHTS(root, "test", max_samples=999)) == 60
    for wrong in (0, 1.5, "3"):
        with pytest.raises(ValueError, match=f"max_samples must be a whole number from 1, .* got {wrong!r}"):
            NIGHTS(root, "test", max_samples=wrong)


def test_a_missing_root_says_what_where_how_large_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        NIGHTS(tmp_path / "nowhere", "test")
    for part in (str(tmp_path / "nowhere"), "20,019", "58 GB", "https://data.csail.mit.edu/nights/", "`dataset_root`"):
        assert part in str(error.value)


def test_a_missing_csv_is_told_apart(tmp_path):
    (tmp_path / "ref").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data\.csv is not \(the download in 200 parts lacks it\)"):
        NIGHTS(tmp_path, "test")
    write(tmp_path / "above" / "nights", ROWS)
    with pytest.raises(FileNotFoundError, match="one folder deeper, at .*nights"):
        NIGHTS(tmp_path / "above", "test")


def test_a_missing_column_is_named_with_those_found(tmp_path):
    rows = [{key: value for key, value in row.items() if key not in ("votes", "split")} for row in ROWS]
    with pytest.raises(ValueError, match="no column votes, split; it has id, left_vote, right_vote, ref_path"):
        NIGHTS(write(tmp_path, rows), "test")


def test_an_empty_file_is_not_a_csv(tmp_path):
    (tmp_path / "data.csv").touch()
    with pytest.raises(ValueError, match=r"data\.csv is not a readable csv file"):
        NIGHTS(tmp_path, "test")


@pytest.mark.parametrize("path", ["../secret.png", "ref/../../secret.png", "/etc/secret.png", "C:\\secret.png"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path, path):
    rows = [triplet(3), triplet(4) | {"left_path": path}]
    write(tmp_path / "nights", rows[:1])
    pd.DataFrame(rows).to_csv(tmp_path / "nights" / "data.csv", index=False)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"1 rows with a left_path that leaves the data set's root.*secret"):
        NIGHTS(tmp_path / "nights", "test")


@pytest.mark.parametrize("linked", ["ref/000/003.png", "ref"])
def test_a_link_that_leaves_the_root_is_refused(tmp_path, linked):
    root = write(tmp_path / "nights", [triplet(3)])
    (root / linked).rename(tmp_path / "elsewhere")
    (root / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"003\.png is a link that leaves the data set's root"):
        NIGHTS(root, "test")


def test_links_within_the_root_and_a_linked_root_are_fine(tmp_path):
    root = write(tmp_path / "nights", [triplet(3)])
    (root / "ref").rename(root / "moved")
    (root / "ref").symlink_to(root / "moved")
    (tmp_path / "link").symlink_to(root)
    assert len(NIGHTS(tmp_path / "link", "test")) == 1


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    root = write(tmp_path, ROWS)
    (root / ROWS[0]["left_path"]).unlink()
    (root / ROWS[1]["ref_path"]).unlink()
    (root / ROWS[4]["ref_path"]).unlink()  # of another split
    with pytest.raises(FileNotFoundError, match=r"2 of the 9 images .*first .*distort/000/002_0\.png"):
        NIGHTS(root, "test")


@pytest.mark.parametrize("votes", [(1, 1), (0, 0), (2, -1), (0.5, 0.4)])
def test_votes_must_be_shares_of_one(tmp_path, votes):
    row = triplet(4) | {"left_vote": votes[0], "right_vote": votes[1]}
    with pytest.raises(ValueError, match=r"1 rows with votes that are not shares.*'id': 4"):
        NIGHTS(write(tmp_path, [triplet(3), row]), "test")


def test_soft_votes_are_kept(tmp_path):
    row = triplet(4) | {"left_vote": 0.7, "right_vote": 0.3}
    assert NIGHTS(write(tmp_path, [row]), "test").right_vote[0] == np.float32(0.3)


@pytest.mark.parametrize(("column", "value"), [("votes", "many"), ("right_vote", None), ("ref_path", None)])
def test_an_empty_or_strange_cell_is_refused(tmp_path, column, value):
    rows = [triplet(3), triplet(4) | {column: value}]
    with pytest.raises(ValueError, match=rf"1 rows with no \w+ in the column {column}; first: .*'id': 4"):
        NIGHTS(write(tmp_path, rows, images=False), "test")


def test_an_empty_split_says_why(tmp_path):
    write(tmp_path, [triplet(3, votes=4), triplet(4, votes=5, split="train")])
    with pytest.raises(
        ValueError, match=r"'test' of .* is empty: 1 of its 2 rows belong to the split, .* least 6 votes"
    ):
        NIGHTS(tmp_path, "test")


def test_a_misspelt_split_names_the_near_one(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'test_imagenet'"):
        NIGHTS(tmp_path, "test_imagnet")
