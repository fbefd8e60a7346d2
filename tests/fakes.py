"""Plausible result rows for the tests of tables and figures: item-response models answer the same triplets."""

import io

import numpy as np
import pandas as pd
from PIL import Image

SKILL = {  # logits of the share correct at each stage, roughly what facts about these mixers suggest
    "mha": {"zero-shot": 2.3, "teacher-lora": 3.1, "lora": 3.1},
    "sra": {"zero-shot": 2.0, "teacher-lora": 2.4, "lora": 2.9},
    "pool": {"zero-shot": 0.5, "lora": 1.4, "distilled": 1.9},
    "moh": {"zero-shot": 2.2, "teacher-lora": 2.6, "lora": 3.0},
    "soft": {"zero-shot": 1.2, "teacher-lora": 1.4, "lora": 2.3},
    "identity": {"zero-shot": 0.2, "lora": 0.7},
}
MACS = {"mha": 184.6e6, "sra": 153.1e6, "pool": 117.4e6, "moh": 185.2e6, "soft": 178.3e6, "identity": 117.4e6}
PARAMS = {"mha": 2.81e6, "sra": 2.81e6, "pool": 1.92e6, "moh": 2.82e6, "soft": 2.59e6, "identity": 1.92e6}
PROTOCOL = {
    "profile": "demo",
    "dataset": "nights",
    "backbone": "demo",
    "image_size": 64,
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
}


def triplets(mixers: tuple[str, ...] = tuple(SKILL), n: int = 600) -> pd.DataFrame:
    """Per-triplet scores of every mixer and stage, as notebooks 02 and 04 write them."""
    rng = np.random.default_rng(7)
    ease, votes = rng.normal(size=n), rng.integers(0, 2, n).astype(float)
    imagenet = rng.random(n) < 0.57
    parts = []
    for mixer in mixers:
        for stage, skill in SKILL[mixer].items():
            margin = skill + 1.2 * ease + rng.normal(size=n)
            right = np.where(votes == 1, 1, -1) * margin * 0.05
            score = (margin > 0).astype(float)
            part = {
                "id": np.arange(n),
                "split": "test",
                "mixer": mixer,
                "stage": stage,
                "d_left": 0.4 + right,
                "d_right": 0.4,
            }
            parts.append(pd.DataFrame(part | {"right_vote": votes, "score": score, "is_imagenet": imagenet}))
    return pd.concat(parts, ignore_index=True)


def accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """The 2AFC rows that belong to a triplet table, on the three test splits."""
    records = []
    for (mixer, stage), part in table.groupby(["mixer", "stage"], sort=False):
        subsets = {
            "test": part,
            "test_imagenet": part[part["is_imagenet"]],
            "test_no_imagenet": part[~part["is_imagenet"]],
        }
        for split, rows in subsets.items():
            p, n = rows["score"].mean(), len(rows)
            half = 1.96 * np.sqrt(p * (1 - p) / n)
            records.append(
                PROTOCOL | _row("2afc", p, p - half, p + half, n) | {"split": split, "mixer": mixer, "stage": stage}
            )
    return pd.DataFrame(records).assign(epoch=np.nan, feature="cls", normalize=True)


def options(n: int = 600) -> pd.DataFrame:
    """Plain MHA at the other embeddings."""
    rng = np.random.default_rng(3)
    where = PROTOCOL | {"split": "test", "mixer": "mha", "stage": "zero-shot", "epoch": np.nan}
    kinds = [("cls", False), ("cls_norm", True), ("cls_norm", False), ("cls_patch", True), ("cls_patch", False)]
    values = 0.86 + 0.02 * rng.normal(size=len(kinds))
    return pd.DataFrame(
        [
            where | _row("2afc", value, value - 0.03, value + 0.03, n) | {"feature": feature, "normalize": normalize}
            for (feature, normalize), value in zip(kinds, values, strict=True)
        ]
    )


def curve(mixer: str = "pool", epochs: int = 20, every: int = 2, end: float = 0.84) -> pd.DataFrame:
    """A distillation's log: loss and cosine each epoch, 2AFC on val every second."""
    rng = np.random.default_rng(len(mixer))
    where = PROTOCOL | {"mixer": mixer, "stage": "distilled"}
    records = []
    for epoch in range(1, epochs + 1):
        rest = np.exp(-epoch / 5)
        loss, accuracy = 0.12 + 0.5 * rest, end - 0.2 * rest + 0.006 * rng.normal()
        records.append(where | _row("loss", loss, np.nan, np.nan, 6000) | {"split": "train", "epoch": epoch})
        records.append(where | _row("cosine", 0.97 - loss, np.nan, np.nan, 900) | {"split": "val", "epoch": epoch})
        if epoch % every == 0:
            ends = (accuracy - 0.04, accuracy + 0.04)
            records.append(where | _row("2afc", accuracy, *ends, 300) | {"split": "val", "epoch": epoch})
    return pd.DataFrame(records).assign(feature="cls", normalize=True)


def efficiency(mixers: tuple[str, ...] = tuple(SKILL), sizes: tuple[int, ...] = (64, 96, 128, 192)) -> pd.DataFrame:
    """Costs and times over token counts, as thesis_lib.efficiency measures them."""
    rng = np.random.default_rng(11)
    pace = {"mha": 1.0, "sra": 1.05, "pool": 0.66, "moh": 1.25, "soft": 1.6, "identity": 0.6}
    records = []
    for size in sizes:
        tokens = (size // 8) ** 2 + 1
        for mixer in mixers:
            where = PROTOCOL | {"image_size": size, "tokens": tokens, "mixer": mixer}
            growth = tokens / 65
            quadratic = (growth - 1) * 0.35 if mixer in ("mha", "moh") else 0
            latency = 5.2 * pace[mixer] * growth * (1 + quadratic) * (1 + 0.02 * rng.normal())
            records += [
                where | _row("macs", MACS[mixer] * growth * (1 + quadratic), np.nan, np.nan, 1, "MAC"),
                where | _row("params", PARAMS[mixer], np.nan, np.nan, 1, "1"),
                where | _row("latency", latency, 0.97 * latency, 1.04 * latency, 50, "ms") | {"batch": 1},
            ]
            for batch in (1, 32):
                speed = 1e3 * (1.0 if batch == 1 else 2.3) / latency
                records.append(
                    where | _row("throughput", speed, 0.98 * speed, 1.01 * speed, 50, "image/s") | {"batch": batch}
                )
                memory = 0.9 * batch * growth * pace[mixer]
                records.append(where | _row("peak_memory", memory, np.nan, np.nan, 1, "MiB") | {"batch": batch})
    return pd.DataFrame(records)


def gallery(n: int = 4, size: int = 96) -> pd.DataFrame:
    """Triplets of striped pictures as notebook 01 keeps them: PNG bytes in ref, left, right, and the votes."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:size, :size] / size
    records = []
    for i in range(n):
        right = int(rng.integers(0, 2))
        record = {"id": i, "split": "test", "left_vote": 1 - right, "right_vote": right, "votes": 7}
        for name in ("ref", "left", "right"):
            waves = 0.5 + 0.5 * np.sin(rng.uniform(3, 27) * (x + y)[..., None] + 6 * rng.random(3))
            buffer = io.BytesIO()
            Image.fromarray((255 * waves).astype(np.uint8)).save(buffer, "PNG")
            record[name] = buffer.getvalue()
        records.append(record)
    return pd.DataFrame(records)


def _row(metric: str, value: float, low: float, high: float, n: int, unit: str = "1") -> dict:
    return {"metric": metric, "value": value, "unit": unit, "low": low, "high": high, "n": n}
