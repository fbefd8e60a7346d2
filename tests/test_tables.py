import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from thesis_lib import attention, latex, summary, tables

fakes = runpy.run_path(str(Path(__file__).with_name("fakes.py")))
SETTING = {"backbone": "demo", "image_size": 64}


@pytest.fixture(scope="module")
def triplets() -> pd.DataFrame:
    return fakes["triplets"]()


@pytest.fixture(scope="module")
def rows(triplets) -> pd.DataFrame:
    return pd.concat([fakes["accuracy"](triplets), fakes["options"](), fakes["curve"]()], ignore_index=True)


@pytest.fixture(scope="module")
def costs() -> pd.DataFrame:
    return fakes["efficiency"]()


def body(table: latex.Table) -> list[list[str]]:
    """The cells of a table's data rows as LaTeX shows them."""
    text = table.latex("a test").split(r"\midrule")[1].split(r"\bottomrule")[0]
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    return [[cell.strip() for cell in line[:-2].split("&")] for line in lines]


def note(table: latex.Table) -> str:
    """The note under a table, its lines joined."""
    lines = table.latex("a test").splitlines()
    return " ".join(line.split(r"\footnotesize ")[1][: -len(r"} \\")] for line in lines if r"\footnotesize" in line)


def test_tables_and_figures_need_no_torch():
    code = "import sys; from thesis_lib import tables, plots, results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_every_registered_mixer_has_its_label():
    assert {name: summary.label(name) for name in attention.MIXERS} == {
        m.name: m.label for m in attention.MIXERS.values()
    }
    assert summary.KINDS == {m.name: m.kind for m in attention.MIXERS.values()}
    assert list(dict.fromkeys(summary.KINDS[name] for name in summary.MIXERS)) == list(attention.KINDS)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012345, "0.0123"), (1.005e3, "1000"), (9.996, "10.0"), (0.09996, "0.100"), (123.4, "123"), (0.0, "0.00")],
)
def test_three_significant_digits(value, text):
    assert latex.significant(value) == text


def test_holm_is_step_down_and_keeps_the_order():
    # R: p.adjust(c(0.04, 0.01, 0.03, 0.005), "holm")
    np.testing.assert_allclose(summary.holm([0.04, 0.01, 0.03, 0.005]), [0.06, 0.03, 0.06, 0.02])
    assert (summary.holm([0.5, 0.9]) == [1.0, 1.0]).all()


@pytest.mark.parametrize("share", [0.7035, 0.4415, 0.0005, 0.12345, 1.0])
def test_numbers_in_prose_are_rounded_as_the_tables_are(share):
    column = (100 * pd.Series([share])).round(1)
    assert latex.percentage(share) == f"{column[0]:.1f}"


def test_a_note_is_read_by_latex_as_it_stands_and_says_what_is_synthetic(tmp_path):
    frame = pd.DataFrame({"Mixer": ["a_b"], "2AFC (%)": [50.0]})
    table = latex.Table(frame, {"2AFC (%)": 1}, note="vit_base_patch16_224.dino & n = 5, 95 % CI, ≤ 3 $, #1, PCK@α")
    written = table.write(tmp_path / "a.tex", source="a test", synthetic=True).read_text()
    note = " ".join(re.findall(r"\\footnotesize (.*)\} ", written))
    assert note.startswith(r"vit\_base\_patch16\_224.dino \& n = 5, 95 \% CI, $\le$ 3 \$, \#1, PCK@$\alpha$")
    assert note.endswith(latex.SYNTHETIC)
    quoted = latex.Table(frame, note="Quoted.", data=False)
    assert latex.SYNTHETIC not in quoted.write(tmp_path / "b.tex", source="a test", synthetic=True).read_text()
    assert latex.SYNTHETIC not in table.write(tmp_path / "c.tex", source="a test").read_text()


def test_comparison_shows_percent_intervals_and_bolds_the_best(rows, costs):
    table = tables.mixer_comparison(rows, costs)
    cells = {line[0]: line[1:] for line in body(table)}
    assert list(cells) == ["MHA", "SRA", "Pool", "SOFT", "MoH", "Identity"]
    assert table.latex("a test").count(r"\addlinespace") == 4  # between exact, pooled, kernel, sparse, none
    assert "Kinds, from the top: exact, pooled, kernel, sparse, none." in note(table)
    mha = rows.query(
        "mixer == 'mha' and stage == 'zero-shot' and split == 'test' and feature == 'cls' and normalize"
    ).iloc[0]
    assert cells["MHA"][0] == rf"\bfseries {100 * mha.value:.1f}"
    assert cells["MHA"][1] == f"[{100 * mha.low:.1f}, {100 * mha.high:.1f}]"
    assert cells["MHA"][4] == "{--}" and cells["MHA"][5] == ""  # never distilled
    assert cells["Pool"][6] == r"\bfseries 117" == cells["Identity"][6]  # equals are both best
    spent = costs.query("metric == 'latency' and backbone == 'demo'").set_index(["mixer", "image_size"])["value"]
    assert cells["MHA"][7] == latex.significant(spent["mha", rows["image_size"].iloc[0]])
    assert sum(line.count("bfseries") for line in cells["SRA"]) == 0


def test_a_plan_keeps_its_dashes_and_bold_is_explained(tmp_path):
    frame = pd.DataFrame({"Plan": ["M/M--MM", "--/M---M", "a–b"], "2AFC (%)": [50.0, None, 60.0]})
    table = latex.Table(frame, {"2AFC (%)": 1}, {"2AFC (%)": "max"}, "P.")
    assert [line[:2] for line in body(table)] == [
        ["M/M-{}-MM", "50.0"], ["-{}-/M-{}-{}-M", "{--}"], ["a--b", r"\bfseries 60.0"],
    ]  # fmt: skip
    written = table.write(tmp_path / "a.tex", source="a test").read_text()
    assert " ".join(re.findall(r"\\footnotesize (.*)\} ", written)) == f"P. {latex.BOLD}"
    numbers = latex.write_numbers({"Plan": "M/M--MM"}, tmp_path / "numbers.tex", source="a test").read_text()
    assert r"\newcommand{\Plan}{M/M-{}-MM}" in numbers


def test_latex_is_a_bare_tabular_with_its_source(rows):
    lines = tables.nights_splits(rows).latex("somewhere, profile demo").splitlines()
    assert lines[0] == "% generated by somewhere, profile demo"
    assert (
        lines[2].startswith(
            r"\begin{tabular}{@{}l@{\hspace{0.75em}}l@{\hspace{0.75em}}S[table-format=2.1]@{\hspace{0.4em}}l"
        )
        and lines[-1] == r"\end{tabular}"
    )
    assert r"\cmidrule(lr){3-4} \cmidrule(lr){5-6} \cmidrule(lr){7-8}" in lines
    assert lines.count(r"\addlinespace") == 3  # between the four stages
    text = note(tables.nights_splits(rows))
    assert "All: n = 600" in text and "CLS before the final norm" in text
    assert not re.search(r"(?<!\\)%|[–−<]", "\n".join(lines[1:]).replace("% needs", "")), "LaTeX would not print this"


def test_each_stage_has_its_own_best(rows):
    best = [line[2] for line in body(tables.nights_splits(rows)) if line[2].startswith(r"\bfseries")]
    assert len(best) == 3  # zero-shot, teacher's LoRA, LoRA; a single student has no rival


def test_paired_tests_count_wins_on_the_same_triplets(triplets):
    table = summary.paired(triplets).set_index(["mixer", "stage"]).sort_index()
    score = triplets.set_index(["mixer", "stage", "id"])["score"].sort_index()
    difference = score["pool", "distilled"] - score["mha", "lora"]
    row = table.loc["pool", "distilled"]
    assert row["reference"] == "lora" and row["difference"] == pytest.approx(difference.mean())
    assert (row["wins"], row["losses"]) == ((difference > 0).sum(), (difference < 0).sum())
    assert (table["p_holm"] >= table["p_value"]).all() and table.loc["sra", "lora"]["reference"] == "lora"
    assert "Distilled: with LoRA-tuned MHA" in note(tables.paired_tests(triplets))


def test_triplets_of_other_images_are_refused(triplets):
    with pytest.raises(ValueError, match="mha lora and pool .*different triplets: run notebook 02"):
        summary.recovered(triplets[(triplets["mixer"] != "pool") | (triplets["id"] > 0)])


def test_recovered_share_is_one_for_the_tuned_model_itself(triplets):
    copy = triplets.query("mixer == 'mha' and stage == 'lora'").assign(mixer="sra")
    others = triplets[~((triplets["mixer"] == "sra") & (triplets["stage"] == "lora"))]
    share = summary.recovered(pd.concat([others, copy])).set_index(["mixer", "stage"])["value"]
    assert share["sra", "lora"] == pytest.approx(1.0) and share["pool", "lora"] < 0.8


def test_where_nothing_was_lost_there_is_no_share(rows, triplets):
    same = triplets.assign(score=1.0)
    assert summary.recovered(same)["value"].isna().all()
    cells = {line[0]: line[-2:] for line in body(tables.lora_tuning(rows, same))}
    assert cells["SRA"] == ["{--}", ""]
    assert "SraLoraRecovered" not in tables.numbers(rows, same)


def test_missing_stages_leave_no_column(rows, triplets):
    only = rows[(rows["stage"] == "zero-shot")]
    groups = tables.mixer_comparison(only).frame.columns.get_level_values(0)
    assert set(groups) == {"", "Zero-shot"}
    table = tables.lora_tuning(rows[rows["mixer"].isin(["mha", "pool"])], triplets)
    assert len(table.frame) == 2
    with pytest.raises(ValueError, match="04_distillation"):
        tables.distillation(only, triplets)
    with pytest.raises(ValueError, match="02_attention_evaluation"):
        tables.mixer_comparison(rows[rows["split"] == "val"])


def test_two_runs_of_one_mixer_are_refused(rows):
    twice = pd.concat([rows, rows.assign(seed=1)])
    with pytest.raises(ValueError, match="'mha' has several rows of stage 'zero-shot'.*seed"):
        tables.mixer_comparison(twice)


def test_rows_of_other_embeddings_and_of_pixels_stay_out(rows):
    values = summary.scores(rows)
    assert len(values) == len(rows.query("split == 'test' and feature == 'cls' and normalize"))
    pixels = rows.iloc[:1].assign(mixer=None, value=0.99)
    assert len(summary.scores(pd.concat([rows, pixels]))) == len(values)
    marked = tables.embedding_options(rows).frame.set_index("Used")["Embedding"]
    assert marked["default"] == "CLS before the final norm" == marked.iloc[1] and len(marked) == 6


def test_efficiency_takes_one_setting_and_the_largest_common_batch(costs):
    other = costs.assign(backbone="vit_small_patch16_224.dino", value=1e12)
    lost = (costs["mixer"] == "soft") & (costs["batch"] == 32)
    failed = costs[lost & (costs["metric"] == "throughput")].assign(batch=64, value=np.nan)
    table = tables.efficiency(pd.concat([costs, other, failed]), **SETTING)
    assert ("Images/s", "batch 32") in table.frame.columns and table.frame["Cost", "MAC (M)"].max() < 200
    with pytest.raises(ValueError, match=r"not measured for 'demo' at 100 px, only for .*\('demo', 64\)"):
        tables.efficiency(costs, backbone="demo", image_size=100)


def test_distillation_names_the_best_epoch(rows, triplets):
    curve = rows.query("stage == 'distilled' and metric == '2afc' and split == 'val'")
    best = int(curve.loc[curve["value"].idxmax(), "epoch"])
    assert body(tables.distillation(rows, triplets))[0][-1] == f"{best} of 20"


def test_published_numbers_name_their_source_and_stand_alone():
    frame = tables.published().frame
    assert frame["Source"].str.len().min() > 0 and 96.2 in set(frame["Test (%)"])


def test_numbers_are_commands_of_letters(rows, triplets, costs, tmp_path):
    found = tables.numbers(rows, triplets, costs)
    value = rows.query("stage == 'distilled' and split == 'test'")["value"].item()
    assert found["PoolDistilled"] == f"{100 * value:.1f}" and found["NTest"] == "600"
    assert {
        "MhaZeroShot",
        "MhaLora",
        "PoolDistilledRecovered",
        "PoolMacs",
        "PoolLatency",
        "PoolLatencyInterval",
        "SraLoraPoints",
    } <= found.keys()
    text = latex.write_numbers(found, tmp_path / "numbers.tex", source="a test").read_text()
    assert text.startswith("% generated by a test\n\\newcommand{\\NTest}{600}\n")
    assert r"\newcommand{\PoolZeroShotP}{$<$ 0.001}" in text and "−" not in text
    assert latex.macro("vit-b16", "zero-shot") == "VitBOneSixZeroShot"
    signs = {"Loss": "-1.5", "Ends": "[−2.0, -1.0]", "Range": "2–65, 101", "Set": "CUB-200-2011"}
    text = latex.write_numbers(signs, tmp_path / "signs.tex", source="a test").read_text()
    typeset = ["$-$1.5", "[$-$2.0, $-$1.0]", "2--65, 101", "CUB-200-2011"]
    assert re.findall(r"\\newcommand\{\\\w+\}\{(.*)\}", text) == typeset
    with pytest.raises(ValueError, match="letters only"):
        latex.write_numbers({"Top5": "1"}, tmp_path / "numbers.tex", source="a test")
