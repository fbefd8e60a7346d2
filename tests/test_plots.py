import itertools
import json
import runpy
import shutil
import subprocess
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from thesis_lib import paths, plots, results, summary
from thesis_lib.placement import apart, label_ends, label_line, label_points

fakes = runpy.run_path(str(Path(__file__).with_name("fakes.py")))


@pytest.fixture(autouse=True)
def closed():
    """Close the figures of each test: pyplot keeps them, and warns of too many."""
    yield
    plt.close("all")


@pytest.fixture(scope="module", autouse=True)
def theme():
    with mpl.rc_context():
        mpl.use("agg")
        plots.set_theme()
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def triplets() -> pd.DataFrame:
    return fakes["triplets"]()


@pytest.fixture(scope="module")
def rows(triplets) -> pd.DataFrame:
    curves = [fakes["curve"](), fakes["curve"]("identity", end=0.835)]
    return pd.concat([fakes["accuracy"](triplets), fakes["options"](), *curves], ignore_index=True)


def names_of_mixers(ax: plt.Axes) -> list[plt.Text]:
    return [text for text in ax.texts if text.get_text().split(",")[0] in summary.MIXERS.values()]


def assert_apart(ax: plt.Axes) -> None:
    """No mixer's name covers another, and none leaves the page."""
    ax.figure.draw_without_rendering()
    texts = names_of_mixers(ax)
    boxes = [Text.get_window_extent(text) for text in texts]  # an annotation's own is with its line
    page = ax.figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, texts[i]
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]


def test_each_mixer_has_one_colour_and_marker():
    assert len(set(plots.COLOURS.values())) == len(set(plots.MARKERS.values())) == len(summary.MIXERS)


@pytest.mark.parametrize("cost", ["macs", "latency"])
def test_accuracy_against_cost_names_every_mixer_without_overlap(rows, cost):
    ax = plots.accuracy_against_cost(pd.concat([rows, fakes["efficiency"]()]), cost=cost)
    assert_apart(ax)
    assert {text.get_text() for text in names_of_mixers(ax)} == {"MHA", "SRA", "Pool", "MoH", "SOFT", "Identity"}
    drawn = {round(float(line.get_ydata()[0]), 6) for line in ax.lines if line.get_marker() in plots.MARKERS.values()}
    assert drawn == {round(100 * value, 6) for value in summary.scores(rows)["value"]}


def test_equal_costs_stand_side_by_side_and_others_stay():
    x = apart(pd.Series({"a": 100.0, "b": 100.0, "c": 200.0}))
    assert x["a"] != x["b"] and (x["a"] + x["b"]) / 2 == pytest.approx(100) and x["c"] == 200
    assert (apart(pd.Series({"a": 1.0})) == 1).all()


def test_distillation_curve_rings_the_epoch_kept(rows):
    ax = plots.distillation_curve(rows)
    assert_apart(ax)
    val = rows.query("mixer == 'pool' and metric == '2afc' and split == 'val'")
    rings = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert val.loc[val["value"].idxmax(), "epoch"] in rings and len(rings) == 2
    with pytest.raises(ValueError, match="04_distillation"):
        plots.distillation_curve(rows.drop(columns="epoch"))


def test_curves_without_intervals_and_with_two_splits_are_drawn(rows):
    log = fakes["curve"]().assign(low=np.nan, high=np.nan)
    log = pd.concat([log, log[log["metric"] == "loss"].assign(split="val", value=lambda t: t["value"] + 0.02)])
    assert_apart(plots.distillation_curve(log))
    ax = plots.distillation_curve(log, metric="loss")
    assert_apart(ax)
    assert {text.get_text() for text in ax.texts} == {"Pool, train", "Pool, val"}


def test_recovered_share_and_paired_differences_have_a_line_a_mixer(triplets):
    shares = summary.recovered(triplets)
    for ax in (plots.recovered_share(shares), plots.paired_differences(summary.paired(triplets))):
        assert [text.get_text() for text in ax.get_yticklabels()] == ["SRA", "Pool", "SOFT", "MoH", "Identity"]
    unknown = shares.assign(value=shares["value"].where(shares["mixer"] != "sra"))  # nothing lost, nothing to recover
    assert len(plots.recovered_share(unknown).get_yticklabels()) == 4
    assert not plots.recovered_share(shares.assign(value=np.nan)).get_yticklabels()


def test_latency_names_lines_at_their_ends(rows):
    ax = plots.latency_against_tokens(fakes["efficiency"](), backbone="demo")
    assert_apart(ax)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["65", "145", "257", "577"]
    with pytest.raises(ValueError, match="03_efficiency_analysis"):
        plots.latency_against_tokens(fakes["efficiency"](), backbone="another")


def test_a_crowd_at_the_ends_of_lines_is_moved_apart_whole():
    ax = plt.subplots(figsize=(5.9, 3.0))[1]
    values = (53.2, 46.8, 44.9, 41.3, 40.9, 38.2, 35.0, 31.9, 31.4, 20.2, 16.1)
    ax.set(yscale="log", xlim=(0, 1.3), ylim=(3.7, 61))
    label_ends(ax, [(summary.label(m), 1.0, v, "black") for m, v in zip(summary.MIXERS, values, strict=False)])
    assert_apart(ax)
    assert len(names_of_mixers(ax)) == len(values)
    heights = [Text.get_window_extent(text).y0 for text in ax.texts]
    assert heights == sorted(heights)


def test_gallery_frames_the_chosen_picture():
    table = fakes["gallery"](3)
    figure = plots.triplet_gallery(table)
    framed = [ax.spines["left"].get_visible() for ax in figure.axes]
    expected = [chosen for vote in table["right_vote"] for chosen in (vote == 0, False, vote == 1)]
    assert framed == expected
    assert [ax.get_xlabel() for ax in figure.axes[:3]].count("7 of 7") == 1


def test_files_are_the_same_bytes_again_with_embedded_type(tmp_path, triplets):
    written = []
    for name in ("once", "again"):
        ax = plots.recovered_share(summary.recovered(triplets))
        written.append([path.read_bytes() for path in plots.save(ax.figure, tmp_path / name)])
    assert written[0] == written[1] and written[0][0].startswith(b"%PDF")
    assert b"/FontFile2" in written[0][0] or b"TrueType" in written[0][0]  # Type 42, not Type 3


def test_notebook_makes_every_item_and_latex_prints_it(tmp_path, monkeypatch, triplets, rows):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    for mixer, part in rows.groupby("mixer"):
        for stem, mine in (("04_distillation", part["stage"] == "distilled"), ("02_attention_evaluation", True)):
            mine = part[mine if stem.startswith("04") else part["stage"] != "distilled"]
            score = triplets[(triplets["mixer"] == mixer) & triplets["stage"].isin(mine["stage"])]
            if len(mine) and len(score):
                results.write(mine, f"{stem}-{mixer}", profile="demo")
                results.write_table(score, f"{stem}-{mixer}.triplets", profile="demo")
    results.write(fakes["efficiency"](), "03_efficiency_analysis", profile="demo")
    results.write_table(fakes["gallery"](), "01_data_preparation.gallery", profile="demo")
    notebook = json.loads((paths.NOTEBOOKS / "09_thesis_figures.ipynb").read_text())
    show = lambda item: item._repr_html_() if hasattr(item, "_repr_html_") else item._repr_mimebundle_()
    scope = {"display": lambda *items: [show(item) for item in items]}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), scope)
    made = results.read("09_thesis_figures", profile="demo")
    assert len(made) == 10 + 2 * 6 and made["path"].is_unique  # tables, numbers and items; figures twice
    preview = paths.ROOT / "figures" / "thesis_preview.tex"
    source = preview.read_text()
    for path in map(Path, made["path"]):
        assert path.stem in ("numbers", "items") or f"{{{path.stem}}}" in source, f"{path} is not in the preview"
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not installed: the items were made, not typeset")
    shutil.copy(preview, tmp_path / "figures")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "thesis_preview"]
    log = subprocess.run(command, cwd=tmp_path / "figures", capture_output=True, text=True, errors="replace")
    assert log.returncode == 0, log.stdout[-2000:]
    assert "Overfull" not in log.stdout and "undefined" not in log.stdout, log.stdout


def test_labels_in_a_crowd_cover_neither_one_another_nor_the_error_bars():
    figure, ax = plt.subplots(figsize=(2.2, 2.2))
    crowd = [("Nyströmformer", 4.0, 90), ("SRA", 1.0, 89), ("MoH", 2.0, 86), ("Agent", 2.3, 85), ("Performer", 3.1, 84)]
    spans = [(x, y - 3, y + 3) for _, x, y in crowd]
    ax.vlines(*zip(*spans, strict=True))
    ax.set(xlim=(0, 5), ylim=(40, 100))
    ax.text(0.5, 92, "before")
    label_points(ax, [(*point, "black") for point in crowd], spans=spans)
    renderer = figure.canvas.get_renderer()
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in ax.texts if text.get_text()}
    assert boxes.keys() == {"before", *(name for name, *_ in crowd)}
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.overlaps(b), f"{one} and {other}"
    for name, *_ in crowd:
        for x, low, high in spans:
            assert not boxes[name].overlaps(Bbox(ax.transData.transform([(x, low), (x, high)]))), name
    lines = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert 0 < len(lines) < len(crowd)  # only who found no room beside the point
    for line in lines:
        end = ax.transData.transform(line.xy) + np.array(line.xyann) * figure.dpi / 72
        assert not [name for name, box in boxes.items() if box.contains(*end)]  # it stops before the name


@pytest.mark.parametrize("taken", [(), (9.5,), (9.5, 7.5, 0.5), (0.5, 3.0)])
def test_the_word_under_a_line_stands_where_no_data_is(taken):
    figure, ax = plt.subplots(figsize=(2.6, 2.6))
    ax.set(xlim=(0, 10), ylim=(40, 100))
    spans = [(x, 44.0, 54.0) for x in taken]
    label_line(ax, "chance", 50, "black", spans=spans)
    (word,) = ax.texts
    box, frame = word.get_window_extent(figure.canvas.get_renderer()), ax.get_window_extent()
    assert not any(box.overlaps(Bbox(ax.transData.transform([(x, low), (x, high)]))) for x, low, high in spans)
    line = ax.transData.transform((0, 50))[1]
    assert line - 20 < box.y0 < box.y1 < line and frame.x0 <= box.x0 < box.x1 <= frame.x1 + 1
    assert (word.xy[0] == 1) == (9.5 not in taken)  # at the right end where that is free


def test_no_labels_line_runs_across_other_data():
    figure, ax = plt.subplots(figsize=(2.6, 2.6))
    ax.set(xlim=(0, 10), ylim=(0, 10))
    walls = [(4.0, 2.0, 9.5), (6.0, 2.0, 9.5)]  # the next free place is behind one of them
    label_points(ax, [("a long name", 5.0, 5.0, "black")], spans=[*walls, (5.0, 5.5, 9.5)])
    boxes = [Bbox(ax.transData.transform([(x, low), (x, high)])).padded(1) for x, low, high in walls]
    for line in ax.texts[1:]:
        start, way = ax.transData.transform(line.xy), np.array(line.xyann) * figure.dpi / 72
        assert not any(box.contains(*(start + share * way)) for box in boxes for share in np.linspace(0, 1, 50))
