"""From features to scored key-points: match the pairs of a data set by one map, or by several combined."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from thesis_lib.correspondence import features as feature_maps
from thesis_lib.correspondence import pck
from thesis_lib.correspondence.cache import Features
from thesis_lib.correspondence.matching import match
from thesis_lib.datasets.pairs import Pair, Pairs

RECENT = 64  # combined maps kept: neighbouring pairs share images


class FeatureMatcher:
    """Matches pairs by cached features: called with a pair, it returns predictions (P, 2) in the target's pixels.

    parts: (features, key) of one or several sources, which are normalised and put side by side; weights scale them.
    co_pca: for each source, onto how many components of both images of a pair it is projected first; None: not.
    protocol: read-out and geometry; the features must have been taken with that geometry. options: of `matching.match`.
    """

    def __init__(
        self,
        pairs: Pairs,
        parts: Sequence[tuple[Features, str]],
        *,
        protocol: pck.Protocol | None = None,
        weights: Sequence[float] | None = None,
        co_pca: Sequence[int | None] | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        if wrong := [len(maps) for maps, _ in parts if len(maps) != len(pairs.images)]:
            raise ValueError(f"there are features of {wrong[0]} images, but {len(pairs.images)} images in the pairs")
        self.pairs, self.parts, self.weights, self.co_pca, self.device = pairs, list(parts), weights, co_pca, device
        self.protocol = protocol or pck.Protocol()
        self.options = {"readout": self.protocol.readout} | options
        self._recent: OrderedDict[int, Tensor] = OrderedDict()

    def __call__(self, pair: Pair) -> np.ndarray:
        source, target = self.maps(pair)
        points = torch.from_numpy(pair.source_points).to(self.device)
        sizes = [tuple(map(int, self.pairs.sizes[place])) for place in (pair.source, pair.target)]
        if self.protocol.geometry == "squash":
            return match(source, target, points, *sizes, **self.options).cpu().numpy()
        frame = self.parts[0][0].size
        points = feature_maps.to_frame(points, sizes[0], frame)
        found = match(source, target, points, (frame, frame), (frame, frame), **self.options)
        return feature_maps.from_frame(found, sizes[1], frame).cpu().numpy()

    def maps(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return the maps (C, h, w) that a pair is matched by."""
        if self.co_pca is None:
            return self._combined(pair.source), self._combined(pair.target)
        columns = []
        for (maps, key), dims in zip(self.parts, self.co_pca, strict=True):
            couple = [maps.map(place, key, self.device) for place in (pair.source, pair.target)]
            columns.append(couple if dims is None else feature_maps.co_pca(*couple, dims))
        source, target = (feature_maps.combine(column, self.weights) for column in zip(*columns, strict=True))
        return source, target

    def _combined(self, place: int) -> Tensor:
        if place not in self._recent:
            maps = [maps.map(place, key, self.device) for maps, key in self.parts]
            self._recent[place] = feature_maps.combine(maps, self.weights)
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(place)
        return self._recent[place]


def evaluate(matcher: FeatureMatcher, *, chosen: Iterable[int] | None = None) -> pd.DataFrame:
    """Match the pairs and return `pck.point_table`; chosen: positions of some of them."""
    return pck.point_table(matcher.pairs, matcher, chosen=chosen)


def sweep(
    pairs: Pairs,
    features: Features,
    *,
    alpha: float = 0.1,
    protocol: pck.Protocol | None = None,
    device: str = "cpu",
) -> list[dict]:
    """Score every map of one extractor's pass: rows with key, layer and column (facet or time step), value, ends, n."""
    rows = []
    for key in features.keys:
        table = evaluate(FeatureMatcher(pairs, [(features, key)], protocol=protocol, device=device))
        layer, _, column = key.replace("@", ".").partition(".")
        score = vars(pck.pck(table, alpha, protocol or pck.Protocol()))
        rows.append({"key": key, "layer": int(layer), "column": column or "token"} | score)
    return rows
