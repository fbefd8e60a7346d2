"""From result rows to what a table or a figure shows: names, selections, paired tests, recovered shares. No torch here.

Every function takes rows as `thesis_lib.results.read` returns them: long-form rows (metric, value, low, high, n and the
protocol), or a triplet table (id, split, mixer, stage, score).
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from thesis_lib import statistics

# The names a reader sees and the kinds, in the order of every table and figure. (The mixers' own live beside torch.)
MIXERS = {
    "mha": "MHA",
    "sra": "SRA",
    "pool": "Pool",
    "linformer": "Linformer",
    "nystrom": "Nyströmformer",
    "agent": "Agent",
    "soft": "SOFT",
    "performer": "Performer",
    "moh": "MoH",
    "hybrid": "Hybrid",
    "identity": "Identity",
}
KINDS = dict(mha="exact", sra="pooled", pool="pooled", linformer="low-rank", nystrom="low-rank", agent="low-rank")
KINDS |= dict(soft="kernel", performer="kernel", moh="sparse", hybrid="sparse", identity="none")
STAGES = {
    "zero-shot": "Zero-shot",
    "teacher-lora": "Teacher's LoRA",
    "lora": "LoRA-tuned",
    "distilled": "Distilled",
}
SPLITS = {"test": "All", "test_imagenet": "ImageNet", "test_no_imagenet": "Not ImageNet"}
FEATURES = {
    "cls": "CLS before the final norm",
    "cls_norm": "CLS after the final norm",
    "cls_patch": "CLS and mean of the patches",
}
# DreamSim reads its CLS before the final norm, and its package centres and normalises: rows of these make the tables.
FEATURE, NORMALIZE = "cls", True


def ordered(mixers: Iterable[str]) -> list[str]:
    """Return the distinct mixers in the order of every table; unknown ones come last, by name."""
    known = list(MIXERS)
    return sorted(set(mixers), key=lambda name: (known.index(name) if name in known else len(known), name))


def vit_names(text: str) -> str:
    """Write timm's names of Vision Transformers within a text as papers do: vit_base_patch16_224.dino as ViT-B/16."""
    return re.sub(r"vit_(\w)\w+?_patch(\d+)[\w.]*", lambda found: f"ViT-{found[1].upper()}/{found[2]}", text)


def label(mixer: str) -> str:
    """Return the name a reader sees."""
    return MIXERS.get(mixer, mixer.capitalize())


def scores(rows: pd.DataFrame, *, split: str = "test", metric: str = "2afc") -> pd.DataFrame:
    """Return the one row of each mixer and stage on a split, at the default embedding, in display order.

    Raises ValueError if there is none, or if a mixer and stage has several (two backbones, seeds, or runs at once).
    """
    rows = rows[(rows["metric"] == metric) & (rows["split"] == split) & rows["mixer"].notna()]
    for column, default in (("feature", FEATURE), ("normalize", NORMALIZE)):
        if column in rows:
            rows = rows[rows[column].isna() | (rows[column] == default)]
    if rows.empty:
        raise ValueError(f"no row has metric {metric!r} on split {split!r}: run notebook 02_attention_evaluation first")
    twice = rows.duplicated(["mixer", "stage"], keep=False)
    if twice.any():
        first = rows[twice].iloc[0]
        several = rows[(rows["mixer"] == first["mixer"]) & (rows["stage"] == first["stage"])]
        differ = [c for c in several if c not in ("value", "low", "high") and several[c].astype(str).nunique() > 1]
        raise ValueError(
            f"mixer {first['mixer']!r} has several rows of stage {first['stage']!r} on {split!r}; "
            f"they differ in {', '.join(differ) or 'nothing but their values'}: pass rows of one of them"
        )
    stages, mixers = list(dict.fromkeys([*STAGES, *rows["stage"]])), ordered(rows["mixer"])
    keys = zip(rows["stage"].map(stages.index), rows["mixer"].map(mixers.index), range(len(rows)), strict=True)
    return rows.iloc[[position for *_, position in sorted(keys)]].reset_index(drop=True)


def costs(rows: pd.DataFrame, metric: str, *, backbone: str, image_size: int, embedding: bool = False) -> pd.DataFrame:
    """Return one row a mixer of an efficiency metric, in display order; latency at batch 1, others at the largest.

    The largest batch is the largest that every mixer was measured at; see `one_protocol` for device and dtype.
    embedding: of a perceptual metric, whose last block computes the class token alone, where that was measured.
    Raises ValueError if that backbone was not measured at that image size.
    """
    if embedding:  # a mixer whose last block cannot be shortened costs what the whole ViT costs
        shorter = rows[rows["metric"] == f"{metric}_cls"].assign(metric=metric)
        keys = ["mixer", "backbone", "image_size"]
        done = pd.MultiIndex.from_frame(rows[keys]).isin(pd.MultiIndex.from_frame(shorter[keys]))
        rows = pd.concat([shorter, rows[~done]])
    rows = rows[(rows["metric"] == metric) & rows["value"].notna()]
    known = sorted({(name, int(size)) for name, size in zip(rows["backbone"], rows["image_size"], strict=True)})
    rows = rows[(rows["backbone"] == backbone) & (rows["image_size"] == image_size)]
    if rows.empty:
        raise ValueError(
            f"{metric!r} was not measured for {backbone!r} at {image_size} px, only for {known}: "
            "run notebook 03_efficiency_analysis with that backbone and size"
        )
    rows = one_protocol(rows)
    if metric not in ("macs", "macs_counted", "elementwise", "params"):
        counts = rows.groupby("batch")["mixer"].nunique()
        common = counts.index[counts == counts.max()]
        rows = rows[rows["batch"] == (common.min() if metric == "latency" else common.max())]
    rows = rows.drop_duplicates("mixer")
    return rows.set_index("mixer").loc[ordered(rows["mixer"])].reset_index()


def setting(rows: pd.DataFrame) -> dict:
    """Return backbone and image size of accuracy rows, the setting in which costs are compared."""
    return {"backbone": rows["backbone"].iloc[0], "image_size": int(rows["image_size"].iloc[0])}


def one_protocol(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep one device and one dtype of efficiency rows: the GPU where there is one, float32 where there is."""
    for column, preferred in (("device", "cuda"), ("dtype", "float32")):
        values = sorted(rows[column].dropna().unique(), key=lambda value, first=preferred: (value != first, value))
        if values:
            rows = rows[rows[column] == values[0]]
    return rows


def reference_stage(stages: Iterable[str], stage: str) -> str:
    """Return the stage of MHA that another mixer's `stage` is compared with: the same, else tuned, else plain."""
    stages = set(stages)
    return next((s for s in (stage, "lora", "teacher-lora", "zero-shot") if s in stages), stage)


def paired(triplets: pd.DataFrame, *, split: str = "test") -> pd.DataFrame:
    """Compare every mixer with MHA on the same triplets: exact McNemar test, Holm-corrected over all of them together.

    Columns mixer, stage, reference (MHA's stage), difference, low, high (shares), wins, losses, n, p_value, p_holm.
    Raises ValueError if a mixer was scored on other triplets than MHA, or if there is nothing to compare.
    """
    score = _score_table(triplets, split)
    stages = [stage for mixer, stage in score if mixer == "mha"]
    records = []
    for mixer, stage in score:
        if mixer == "mha" or not stages:
            continue
        reference = reference_stage(stages, stage)
        ours, theirs = _aligned(score, (mixer, stage), ("mha", reference))
        test = statistics.paired_difference(ours, theirs)
        names = ("difference", "low", "high", "wins", "losses", "n", "p_value")
        records.append(
            {"mixer": mixer, "stage": stage, "reference": reference} | {name: getattr(test, name) for name in names}
        )
    if not records:
        raise ValueError("nothing to compare: run 02_attention_evaluation for mha and for another mixer")
    frame = pd.DataFrame(records)
    return frame.assign(p_holm=holm(frame["p_value"]))


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Return Holm's step-down adjusted p-values (Scandinavian Journal of Statistics, 1979), in the order given."""
    p = np.asarray(list(p_values), dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def recovered(triplets: pd.DataFrame, *, split: str = "test") -> pd.DataFrame:
    """Return the share of the accuracy lost by the swap that each later stage of a mixer recovers, with its interval.

    Lost is what the plain swap lacks to MHA after LoRA (to plain MHA where none was tuned): at 1 the mixer is as good
    as the tuned model. The value is nan where nothing was lost. Columns mixer, stage, value, low, high, n, reference.
    """
    score = _score_table(triplets, split)
    stages = [stage for mixer, stage in score if mixer == "mha"]
    if not stages:
        raise ValueError("no triplets of MHA on this split: run notebook 02_attention_evaluation with mha")
    reference = reference_stage(stages, "lora")
    records = []
    for mixer, stage in score:
        if mixer == "mha" or stage == "zero-shot" or (mixer, "zero-shot") not in score:
            continue
        full, before, after = _aligned(score, ("mha", reference), (mixer, "zero-shot"), (mixer, stage))
        share = statistics.recovered_share(full, before, after)
        names = ("value", "low", "high", "n")
        records.append(
            {"mixer": mixer, "stage": stage, "reference": reference} | {name: getattr(share, name) for name in names}
        )
    return pd.DataFrame(records, columns=["mixer", "stage", "reference", "value", "low", "high", "n"])


def _score_table(triplets: pd.DataFrame, split: str) -> dict[tuple[str, str], pd.Series]:
    """The per-triplet scores of each (mixer, stage), a series by id, in display order."""
    rows = triplets[triplets["split"] == split]
    tables = {key: part.set_index("id")["score"].sort_index() for key, part in rows.groupby(["mixer", "stage"])}
    stages = dict.fromkeys([*STAGES, *rows["stage"]])
    return {(m, s): tables[m, s] for s in stages for m in ordered(rows["mixer"]) if (m, s) in tables}


def _aligned(score: Mapping, *keys: tuple[str, str]) -> list[np.ndarray]:
    for key in keys[1:]:
        if not score[keys[0]].index.equals(score[key].index):
            raise ValueError(
                f"{' '.join(keys[0])} and {' '.join(key)} were scored on different triplets: run notebook "
                "02_attention_evaluation (and 04_distillation) again with the same data, min_votes and max_samples"
            )
    return [score[key].to_numpy(dtype=float) for key in keys]
