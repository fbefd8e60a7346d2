"""Click a point of one picture and see, for each model, where it finds it in another.

from thesis_lib.correspondence.explorer import MatchExplorer
MatchExplorer("demo")
"""

from collections.abc import Mapping
from pathlib import Path

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import torch
from IPython.display import display
from PIL import Image, ImageDraw

from thesis_lib import attention, paths
from thesis_lib.correspondence.features import ViTFeatures, read_image
from thesis_lib.correspondence.matching import match, similarity_map
from thesis_lib.correspondence.systems import Part, build
from thesis_lib.datasets import correspondence
from thesis_lib.explorer import picture_tag
from thesis_lib.summary import ordered

SIDE = 224  # pixels a picture's longer side takes on the screen
POINT, TRUTH = "#00E5FF", "#FFD54A"
# The picture hands the place of a click, in shares of its longer side, to the text field above it.
CLICK = (
    "const field = this.closest('.match-explorer').querySelector('.match-point input');"
    "field.value = (event.offsetX / this.clientWidth).toFixed(4) + ', ' "
    "+ (event.offsetY / this.clientHeight).toFixed(4);"
    "for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {bubbles: true}));"
)


class MatchExplorer:
    """The application; shown when it is a cell's last line.

    Models are the named mixers in the backbone (all of the registry by default) and whatever notebooks saved in
    data/results/<profile>/models. `root` is a tree of SPair-71k, by default the synthetic one of the profile; relative
    paths start at the data folder.
    Raises FileNotFoundError if it is not there.
    """

    def __init__(
        self,
        profile: str = "demo",
        *,
        root: str | Path | None = None,
        split: str = "test",
        mixers: list[str] | None = None,
        backbone: str = "demo",
        img_size: int = 64,
        layer: int = -1,
        pretrained: bool | str | Path = True,
        mixer_options: Mapping[str, Mapping] | None = None,
    ) -> None:
        self.pairs = correspondence.spair71k(paths.DATA / (root or f"raw/synthetic/{profile}/spair71k"), split)
        self.layer, self.models = layer, {}
        names = ordered(attention.MIXERS if mixers is None else mixers)
        self.parts: dict[str, Part] = {}
        for name in names:
            options = {
                "mixer": name,
                "pretrained": pretrained,
                "mixer_options": dict((mixer_options or {}).get(name, {})),
            }
            self.parts[attention.get(name).label] = Part("vit", backbone, "", img_size, {"layers": [layer]} | options)
        for path in sorted((paths.RESULTS / profile / "models").glob("*/metric.json")):
            self.parts[path.parent.name] = Part("metric", str(path.parent), "", img_size, {"layers": [layer]})
        self._build()
        self._show()

    def _build(self) -> None:
        self.index = widgets.IntSlider(description="Pair", min=1, max=len(self.pairs), value=1, continuous_update=False)
        self.point = widgets.Text(value="0.5, 0.5", description="Point", continuous_update=False)
        self.point.add_class("match-point")
        self.shown = widgets.SelectMultiple(options=list(self.parts), value=list(self.parts)[:3], description="Models")
        self.heat = widgets.Checkbox(value=False, description="similarity")
        self.source, self.found = widgets.HTML(), widgets.HTML()
        self.source.add_class("match-source")
        self.found.add_class("match-found")
        for control in (self.index, self.point, self.shown, self.heat):
            control.observe(lambda _: self._show(), "value")
        wrap = widgets.Layout(flex_flow="row wrap")
        controls = widgets.HBox([self.index, self.point, self.heat, self.shown], layout=wrap)
        hint = widgets.HTML("<b>Click a point of the picture.</b> Its match in the other picture is the cross; the "
                            "ring is the truth where the point is a key-point.")  # fmt: skip
        self.widget = widgets.VBox([controls, hint, self.source, self.found])
        self.widget.add_class("match-explorer")

    def _ipython_display_(self) -> None:
        display(self.widget)

    def extractor(self, name: str) -> ViTFeatures:
        """Return a model by its name, loaded once."""
        if name not in self.models:
            self.models[name] = build(self.parts[name])
        return self.models[name]

    def place(self) -> tuple[float, float] | None:
        """Return the point in the source picture's pixels; None if the field holds no two shares."""
        try:
            x, y = (float(part) for part in self.point.value.split(","))
        except ValueError:
            return None
        pair = self.pairs.pairs[self.index.value - 1]
        width, height = (int(v) for v in self.pairs.sizes[pair.source])
        column, row = (share * max(width, height) - 0.5 for share in (x, y))
        return (column, row) if -0.5 <= column <= width - 0.5 and -0.5 <= row <= height - 0.5 else None

    def find(self, name: str, point: tuple[float, float]) -> tuple[tuple[float, float], np.ndarray]:
        """Return a model's match in the target picture, in pixels, and the similarities (H, W) it was chosen by."""
        pair = self.pairs.pairs[self.index.value - 1]
        extractor, maps = self.extractor(name), []
        for place in (pair.source, pair.target):
            image = read_image(self.pairs.images[place], extractor.size)[None].float() / 255
            with torch.inference_mode():
                maps.append(next(iter(extractor(image).values()))[0])
        sizes = [tuple(map(int, self.pairs.sizes[place])) for place in (pair.source, pair.target)]
        at = torch.tensor([point], dtype=torch.float32)
        found = match(*maps, at, *sizes)[0].tolist()
        return tuple(found), similarity_map(*maps, at[0], *sizes).numpy()

    def _show(self) -> None:
        pair, point = self.pairs.pairs[self.index.value - 1], self.place()
        source, target = (Image.open(self.pairs.images[i]).convert("RGB") for i in (pair.source, pair.target))
        if point is None:
            self.found.value = "Give a point of the picture, as two shares of its longer side, such as 0.5, 0.25."
            return
        tag = picture_tag(_mark(source, point), "source", caption=f"{pair.category}, pair {self.index.value}")
        tag = tag.replace("style='border", "style='cursor: crosshair; border", 1)
        self.source.value = tag.replace("<img ", f'<img onclick="{CLICK}" ', 1)
        near = np.hypot(*(pair.source_points - point).T)
        truth = pair.target_points[near.argmin()] if near.min() < 0.05 * max(source.size) else None
        tags = []
        for name in self.shown.value:
            found, heat = self.find(name, point)
            picture = _overlay(target, heat) if self.heat.value else target
            apart = "" if truth is None else f"<br>{np.hypot(*(truth - found)):.0f} pixels from the truth"
            tags.append(picture_tag(_mark(picture, found, truth), f"match of {name}", caption=name + apart))
        self.found.value = "".join(tags)


def _mark(picture: Image.Image, point: tuple[float, float], truth: np.ndarray | None = None) -> Image.Image:
    scale = SIDE / max(picture.size)
    image = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    x, y = ((value + 0.5) * scale for value in point)
    for a, b in (((x - 7, y), (x + 7, y)), ((x, y - 7), (x, y + 7))):
        pen.line((a, b), fill="black", width=4)
        pen.line((a, b), fill=POINT, width=2)
    if truth is not None:
        x, y = ((value + 0.5) * scale for value in truth)
        pen.ellipse((x - 8, y - 8, x + 8, y + 8), outline=TRUTH, width=2)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image)
    return square


def _overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    low, high = heat.min(), heat.max()
    tint = mpl.colormaps["inferno"]((heat - low) / max(high - low, 1e-9))[..., :3]
    grey = np.asarray(picture.convert("L").convert("RGB")) / 255
    return Image.fromarray((255 * (0.45 * grey + 0.55 * tint)).astype(np.uint8))
