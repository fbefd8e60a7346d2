"""What notebook 08 does many times over: score a system on pairs, train a student by its recipe, keep both as rows."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thesis_lib import paths, perceptual
from thesis_lib.attention import suggest
from thesis_lib.correspondence import systems
from thesis_lib.correspondence.cache import features
from thesis_lib.correspondence.evaluate import FeatureMatcher, sweep
from thesis_lib.correspondence.features import ViTFeatures, combine, fingerprint
from thesis_lib.correspondence.pck import Protocol, point_table
from thesis_lib.correspondence.prompts import PromptMatcher
from thesis_lib.correspondence.students import Student, merge, tune
from thesis_lib.correspondence.systems import Part, System
from thesis_lib.correspondence.training import retrieval_pairs, train
from thesis_lib.datasets import pixels
from thesis_lib.datasets.pairs import Pairs

RUN = {  # a recipe's settings and their defaults
    "name": "",
    "model": "demo",
    "mixer": "mha",
    "mixer_options": {},
    "size": 64,
    "layer": -1,
    "tune": "full",
    "factor": 4,
    "lora": {},
    "pairs": "points",  # "points": true key-points; "weak": pairs of a category, "retrieval": nearest images: a teacher
    "loss": "cross_entropy",
    "sampling": "full",
    "positions": 64,
    "temperature": 0.05,
    "epochs": 3,
    "batch_size": 16,
    "lr": 3.0e-4,
    "schedule": "cosine",
    "mixed_precision": "no",
    "max_batches": None,
}


@dataclass
class Study:
    """The settings that every score shares: where it runs, where features are kept, the weights that are here."""

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16
    use_cache: bool = True
    reset_cache: bool = False
    weights: Mapping[str, str | Path] = field(default_factory=dict)
    folder: Path | None = None
    _fresh: set = field(default_factory=set)  # stores that this study has reset already

    def require(self, recipes: Iterable[Mapping[str, Any]], parts: str | Sequence[Mapping[str, Any]]) -> None:
        """Raise FileNotFoundError where recipes or a teacher's parts (see `sources`) name a system without weights."""
        parts = [{"model": parts}] if isinstance(parts, str) else parts
        models = [each.get("model", []) for each in (*recipes, *parts)]
        named = {name for model in models for name in (model if isinstance(model, list) else [model])}
        if absent := systems.missing(sorted(named & systems.SYSTEMS.keys()), self.weights):
            raise FileNotFoundError(
                f"`runs` or `teacher_parts` train with {', '.join(absent)}, whose weights are not here: put them into "
                "the hub's cache or name their folder in `weights` (data/README.md), or take them out of both"
            )

    @contextmanager
    def features(self, extractor: nn.Module, pairs: Pairs, geometry: str = "squash"):
        """Give an extractor's maps of all images of a set of pairs; a store is reset at most once."""
        about = (id(extractor), geometry)
        reset = self.reset_cache and about not in self._fresh
        self._fresh.add(about)
        options = {"batch_size": self.batch_size, "dtype": self.dtype, "folder": self.folder}
        options |= {"use_cache": self.use_cache, "reset_cache": reset, "progress": False}
        with features(extractor, pairs.images, categories=pairs.categories, geometry=geometry, **options) as maps:
            yield maps

    def extractors(self, system: System) -> list[nn.Module]:
        """Build a system's sources; FileNotFoundError names weights that are not present."""
        made: dict[str, nn.Module] = {}
        dtype = "float32" if system.method == "prompts" else self.dtype  # prompts are optimised by small steps
        for part in system.parts:
            about = repr(replace(part, key=""))  # parts that differ in the map alone share an extractor
            if about not in made:
                made[about] = systems.build(part, device=self.device, weights=self.weights, dtype=dtype)
        return [made[repr(replace(part, key=""))] for part in system.parts]

    def score(self, system: System, tests: Mapping[Any, Pairs], **options: Any) -> dict[Any, pd.DataFrame]:
        """Match several sets of pairs by a system, built once, and return their point tables."""
        extractors, keys = self.extractors(system), [part.key for part in system.parts]
        if system.method == "prompts":
            return {name: point_table(p, PromptMatcher(p, extractors[0], **options)) for name, p in tests.items()}
        if system.method == "hyper":
            extractors, keys = [systems.hyperfeatures(extractors[0], self.weights.get("hyperfeatures"))], ["hyper"]
        return {name: self.score_maps(extractors, keys, p, system=system, **options) for name, p in tests.items()}

    def score_maps(
        self,
        extractors: Sequence[nn.Module],
        keys: Sequence[str],
        pairs: Pairs,
        protocol: Protocol | None = None,
        system: System | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Match all pairs by maps of extractors that are there."""
        protocol = protocol or Protocol()
        how = {} if system is None else {"weights": system.weights, "co_pca": system.co_pca}
        with ExitStack() as stack:
            opened = {id(e): stack.enter_context(self.features(e, pairs, protocol.geometry)) for e in set(extractors)}
            parts = [(opened[id(e)], key) for e, key in zip(extractors, keys, strict=True)]
            matcher = FeatureMatcher(pairs, parts, protocol=protocol, device=self.device, **how, **options)
            return point_table(pairs, matcher)

    def score_all(self, extractor: nn.Module, key: str, tests: Mapping[Any, Pairs]) -> dict[Any, pd.DataFrame]:
        """Return the point tables of one map on several sets of pairs."""
        return {name: self.score_maps([extractor], [key], pairs) for name, pairs in tests.items()}

    def sweep(self, extractor: nn.Module, pairs: Pairs, **columns: Any) -> list[dict]:
        """Score every map of an extractor from one pass, as `evaluate.sweep`; columns are added to all rows."""
        with self.features(extractor, pairs) as maps:
            return [row | columns for row in sweep(pairs, maps, device=self.device)]

    def sources(
        self, parts: str | Sequence[Mapping[str, Any]], trained: Mapping[str, Student], *, layer: int
    ) -> tuple[list[nn.Module], list[str]]:
        """Give a teacher's extractors and keys: a named system's, or those of a list of parts.

        A part names a trained `run`, or a timm `model` with its `size` and, unless it is `layer`, its own "layer".
        """
        if isinstance(parts, str):
            system = systems.get(parts)
            return self.extractors(system), [part.key for part in system.parts]
        extractors, keys = [], []
        for part in parts:
            if "run" in part:
                extractors.append(trained[part["run"]])
            else:
                block = part.get("layer", layer)
                made = Part("vit", part["model"], "", part["size"], {"layers": [block]})
                extractors.append(systems.build(made, device=self.device, weights=self.weights))
            keys.append(extractors[-1].keys[-1])
        return extractors, keys

    @staticmethod
    def identity(extractors: Sequence[nn.Module], keys: Sequence[str]) -> str:
        """Say what tells a teacher from others: what its parts are, weights included, and the maps that it takes."""
        return json.dumps([*map(fingerprint, extractors), *keys])

    @contextmanager
    def teacher(self, extractors: Sequence[nn.Module], keys: Sequence[str], pairs: Pairs):
        """Give teacher(place): the combined map of an image, from features that are made once and kept."""
        with ExitStack() as stack:
            opened = [stack.enter_context(self.features(e, pairs)) for e in extractors]
            parts = list(zip(opened, keys, strict=True))
            yield lambda place: combine([maps.map(place, key, self.device) for maps, key in parts])

    def train(
        self,
        recipe: Mapping[str, Any],
        pairs: Pairs,
        *,
        val: Pairs,
        teacher: Callable[[int], Tensor] | None = None,
        teacher_name: str = "",
        folder: Path,
        seed: int = 0,
        progress: bool = True,
    ) -> tuple[Student, list[dict]]:
        """Train a student by its recipe (see RUN) and return it, merged, with the log; a finished or begun run goes on.

        The best epoch by PCK on `val` is kept. `folder` holds the run's checkpoint. Raises ValueError for an unknown
        setting, or for pairs without points where there is no teacher.
        """
        recipe = settings(recipe)
        if (recipe["pairs"] == "points") != (teacher is None):
            raise ValueError(f"run {recipe['name']!r}: pairs {recipe['pairs']!r} need a teacher, and points need none")
        torch.manual_seed(seed)  # an upsampler's and an adapter's first values
        student = tune(self.student(recipe), recipe["tune"], factor=recipe["factor"], **recipe["lora"])
        cached = pixels.cache(pairs.images, student.size, progress=False)
        index = None
        if recipe["pairs"] == "retrieval":
            index = retrieval_pairs(self.embeddings(recipe, cached), len(pairs), seed=seed)
        names = (
            "loss",
            "sampling",
            "positions",
            "temperature",
            "epochs",
            "batch_size",
            "lr",
            "schedule",
            "mixed_precision",
            "max_batches",
        )
        log = train(
            student,
            pairs,
            cached,
            teacher=teacher,
            teacher_name=teacher_name,
            index=index,
            val=(val, None),
            checkpoint=folder / f"{recipe['name']}.checkpoint",
            config={"recipe": recipe | {"epochs": None}},
            seed=seed,
            device=self.device,
            progress=progress,
            **{name: recipe[name] for name in names},
        )
        return merge(student).to(self.device), log

    def student(self, recipe: Mapping[str, Any]) -> Student:
        """Build the model of a recipe: a timm ViT with its mixer, or the first source of a named system."""
        if recipe["model"] in systems.SYSTEMS:
            system = systems.get(recipe["model"])
            extractor = self.extractors(system)[0]
            if system.method == "hyper":
                return Student(systems.hyperfeatures(extractor))
            return Student(extractor, system.parts[0].key)
        options = {"layers": [recipe["layer"]], "mixer": recipe["mixer"], "mixer_options": recipe["mixer_options"]}
        part = Part("vit", recipe["model"], "", recipe["size"], options)
        return Student(systems.build(part, device=self.device, weights=self.weights))

    def embeddings(self, recipe: Mapping[str, Any], cached: Any) -> Tensor:
        """Return a global embedding of each image, the untrained backbone's class token: what retrieval compares."""
        extractor = self.student(recipe | {"mixer": "mha", "mixer_options": {}}).extractor
        if not isinstance(extractor, ViTFeatures):
            raise ValueError("retrieval pairs come from a ViT's class token: name a ViT as the student's model")
        metric = perceptual.Metric(extractor.backbone)
        return perceptual.embed_pixels(metric, cached, batch_size=self.batch_size, device=self.device, progress=False)


def settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in a recipe's defaults; ValueError names the settings near an unknown one."""
    for name in recipe:
        if name not in RUN:
            raise ValueError(f"a run has no setting {name!r}{suggest(name, RUN)}; known: {', '.join(RUN)}")
    if not recipe.get("name"):
        raise ValueError("a run needs a name: its checkpoint and its rows bear it")
    return RUN | dict(recipe)


def save_student(student: Student, folder: Path) -> Path:
    """Write a trained student's weights, so that they load with the recipe that made it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous().cpu() for name, value in student.state_dict().items()}
    return paths.write_whole(folder / "student.safetensors", partial(save_file, state))


def load_student(student: Student, folder: Path) -> Student:
    """Read weights that `save_student` wrote into a student of the same recipe; ValueError where they do not fit."""
    found, own = load_file(folder / "student.safetensors"), student.state_dict()
    if wrong := sorted(found.keys() ^ own.keys()):
        raise ValueError(f"{folder} holds a student of another recipe: {', '.join(wrong[:3])} differ")
    student.load_state_dict(found)
    return student
