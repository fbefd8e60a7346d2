"""Browse triplets in JupyterLab: what the judges chose, what each model says about it, and where the model looks.

from thesis_lib.explorer import Explorer
Explorer("demo")
"""

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import torch
from IPython.display import display
from PIL import Image, ImageDraw
from torch import Tensor

from thesis_lib import attention, backbone, paths
from thesis_lib.datasets.nights import NIGHTS, SPLITS
from thesis_lib.mixing import mixing_matrix
from thesis_lib.perceptual import Metric, load, preprocess, two_afc_scores
from thesis_lib.summary import ordered

CHOSEN, RIGHT, WRONG, MARK = "#0072B2", "#00795A", "#B83A1B", "#00E5FF"
BLUES = mpl.colors.LinearSegmentedColormap.from_list("blues", ["#000004", "#2166AC", "#A6DBFF"])  # 0 as inferno's
SIDE = 224  # pixels a picture takes on the screen
ROLES = ("reference", "left", "right")
ALL_HEADS, CLS = ("mean of all", "all"), ("CLS", "CLS")  # None would be "nothing chosen" to a Dropdown
ORDER = (1, 0, 2)  # on the screen the candidates stand on either side of the reference


def attention_maps(metric: Metric, x: Tensor, layer: int) -> Tensor:
    """Return the effective token-mixing matrix of a block, (B, heads or 1, N, N), for images (B, 3, H, W).

    Of attention these are its maps; see `thesis_lib.mixing.mixing_matrix` for the other mixers.
    """
    seen = []
    mixer = metric.backbone.blocks[layer].attn
    hook = mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with hook, torch.no_grad():
        metric.embed(x)
    return mixing_matrix(mixer, seen[0])


def overlay(picture: Image.Image, weights: np.ndarray, *, query: tuple[int, int] | None = None) -> Image.Image:
    """Lay weights (rows, columns) over a picture, bright where large, blue below zero, and frame the query's patch."""
    rows, columns = weights.shape
    heat = Image.fromarray((weights / max(np.abs(weights).max(), 1e-12)).astype(np.float32)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    heat = np.asarray(heat).clip(-1, 1)
    light = np.where(heat[..., None] < 0, BLUES(-heat)[..., :3], mpl.colormaps["inferno"](heat)[..., :3])
    grey = np.asarray(picture.convert("L").convert("RGB").resize((SIDE, SIDE))) / 255
    image = Image.fromarray((255 * (0.45 * grey + 0.55 * light)).astype(np.uint8))
    if query is not None:
        top, left = query[0] * SIDE / rows, query[1] * SIDE / columns
        ImageDraw.Draw(image).rectangle((left, top, left + SIDE / columns, top + SIDE / rows), outline=MARK, width=2)
    return image


def picture_tag(image: Image.Image, alt: str, *, frame: str = "transparent", caption: str = "") -> str:
    """Return the HTML of one picture with its frame and caption, the pixels inside."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    tint = "inherit" if frame == "transparent" else frame
    return (
        f"<figure style='margin: 0 8px 8px 0; width: {SIDE + 10}px; display: inline-block; text-align: center'>"
        f"<img alt='{alt}' width={SIDE} height={SIDE} style='border: 5px solid {frame}' src='{source}'>"
        f"<figcaption style='color: {tint}; line-height: 1.3'>{caption or alt}</figcaption></figure>"
    )


class Explorer:
    """The application; shown when it is a cell's last line.

    Models are the named mixers swapped into `backbone` (all of the registry by default) and whatever notebooks saved in
    data/results/<profile>/models. `pretrained` and `img_size` as in `thesis_lib.backbone.create`,
    `mixer_options` by mixer. `dataset_root` is a NIGHTS tree, by default the synthetic one of the profile; relative
    paths start at the data folder.
    Raises FileNotFoundError if it is not there.
    """

    def __init__(
        self,
        profile: str = "demo",
        *,
        dataset_root: str | Path | None = None,
        split: str = "test",
        mixers: list[str] | None = None,
        backbone: str = "demo",
        pretrained: bool | str | Path = True,
        img_size: int | None = None,
        mixer_options: Mapping[str, Mapping] | None = None,
    ):
        self.root = paths.DATA / (dataset_root or f"raw/synthetic/{profile}/nights")
        if not (self.root / "data.csv").is_file():
            raise FileNotFoundError(
                f"no triplets in {self.root}: run notebook 01_data_preparation with profile {profile!r} first, "
                "or point dataset_root to a copy of NIGHTS"
            )
        self.recipe = {"name": backbone, "pretrained": pretrained, "img_size": img_size}
        self.mixer_options = mixer_options or {}
        names = ordered(attention.MIXERS if mixers is None else mixers)
        self.sources: dict[str, str | Path] = {attention.get(name).label: name for name in names}
        saved = sorted((paths.RESULTS / profile / "models").glob("*/metric.json"))
        self.sources |= {path.parent.name: path.parent for path in saved}
        self.models: dict[str, Metric] = {}
        self.quiet = True
        self._build(split)
        self._choose_model()
        self.quiet = False
        self._open(split)

    def _build(self, split: str) -> None:
        """Make the controls and wire them."""
        names = list(self.sources)
        self.split = widgets.Dropdown(options=SPLITS, value=split, description="Split")
        self.previous = widgets.Button(description="Previous", icon="arrow-left", tooltip="previous triplet")
        self.next = widgets.Button(description="Next", icon="arrow-right", tooltip="next triplet")
        self.index = widgets.IntSlider(description="Triplet", min=1, max=1, value=1, continuous_update=False)
        fit = widgets.Layout(width="auto")
        self.shown = [widgets.ToggleButton(value=True, description=name, layout=fit) for name in names]
        self.model = widgets.Dropdown(options=names, description="Model")
        self.layer = widgets.IntSlider(description="Layer", min=1, max=1, value=1, continuous_update=False)
        self.head = widgets.Dropdown(options=[ALL_HEADS], description="Head")
        self.query = widgets.Dropdown(options=[CLS], description="Query")
        still = {"grid_gap": "0", "flex": "none", "align_self": "flex-start", "margin": "5px 12px 0 0"}
        self.mosaic = widgets.GridBox(layout=widgets.Layout(**still))
        self.mosaic.add_class("explorer-mosaic")
        self.pictures, self.verdict, self.maps = (widgets.HTML() for _ in range(3))
        for part, name in ((self.pictures, "pictures"), (self.verdict, "verdict"), (self.maps, "attention")):
            part.add_class(f"explorer-{name}")
        self.split.observe(lambda change: self._open(change.new), "value")
        self.previous.on_click(lambda _: self._step(-1))
        self.next.on_click(lambda _: self._step(1))
        self.index.observe(lambda _: self._show(), "value")
        for toggle in self.shown:
            toggle.observe(lambda _: self._show_verdict(), "value")
        self.model.observe(lambda _: self._choose_model(), "value")
        for control in (self.layer, self.head, self.query):
            control.observe(lambda _: self._show_maps(), "value")
        wrap = widgets.Layout(flex_flow="row wrap")
        self.widget = widgets.VBox(
            [
                widgets.HBox([self.split, self.previous, self.next, self.index], layout=wrap),
                self.pictures,
                widgets.HTML("<b>Which candidate is nearer to the reference?</b>"),
                widgets.HBox(self.shown, layout=wrap),
                self.verdict,
                widgets.HTML("<b>Where does a model look?</b> Click a patch to make it the query, again for CLS."),
                widgets.HBox([self.model, self.layer, self.head, self.query], layout=wrap),
                widgets.HBox([self.mosaic, self.maps]),
            ]
        )

    def _ipython_display_(self) -> None:
        display(self.widget)

    def metric(self, name: str) -> Metric:
        """Return a model by the name its button bears, loaded once."""
        if name not in self.models:
            source = self.sources[name]
            if isinstance(source, Path):
                self.models[name], _ = load(source)
            else:
                vit = backbone.create(mixer=source, **self.recipe, **self.mixer_options.get(source, {}))
                self.models[name] = Metric(vit).eval().requires_grad_(False)
        return self.models[name]

    def _images(self, metric: Metric) -> Tensor:
        convert = preprocess(tuple(metric.backbone.patch_embed.img_size))
        return torch.cat([convert(image) for image in self.images])  # (3, 3, H, W): reference, left, right

    def _open(self, split: str) -> None:
        self.triplets = NIGHTS(self.root, split)
        with self._quietly():
            self.index.value, self.index.max = 1, len(self.triplets)
        self._show()

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Change controls without a redraw for each."""
        before, self.quiet = self.quiet, True
        yield
        self.quiet = before

    def _step(self, by: int) -> None:
        self.index.value = (self.index.value - 1 + by) % len(self.triplets) + 1

    def _show(self) -> None:
        if self.quiet:
            return
        place = self.index.value - 1
        *self.images, self.vote, identity = self.triplets[place]
        votes = int(self.triplets.table["votes"].iloc[place])
        tags = []
        for role in ORDER:
            share = {0: None, 1: 1 - self.vote, 2: self.vote}[role]
            chosen = share is not None and share > 0.5
            text = ROLES[role] if share is None else f"{ROLES[role]}: {round(share * votes)} of {votes} votes"
            tags.append(
                picture_tag(self.images[role], ROLES[role], frame=CHOSEN if chosen else "transparent", caption=text)
            )
        self.pictures.value = f"{''.join(tags)}<div>Triplet {identity}, {place + 1} of {len(self.triplets)}</div>"
        self._show_verdict()
        self._show_maps()

    def _show_verdict(self) -> None:
        rows = []
        for toggle in self.shown:
            if not toggle.value:
                continue
            metric = self.metric(toggle.description)
            with torch.inference_mode():
                ref, left, right = metric.embed(self._images(metric)).split(1)
            d_left, d_right = (1 - torch.cosine_similarity(ref, other) for other in (left, right))
            score = two_afc_scores(d_left, d_right, torch.tensor([self.vote])).item()
            choice = "neither" if d_left == d_right else "left" if d_left < d_right else "right"
            mark, tint = ("✓ agrees", RIGHT) if score > 0.5 else ("✗ disagrees", WRONG)
            mark, tint = ("undecided", "inherit") if score == 0.5 else (mark, tint)
            cells = (toggle.description, f"{max(d_left.item(), 0):.4f}", f"{max(d_right.item(), 0):.4f}", choice)
            row = "".join(f"<td style='padding: 2px 14px 2px 0'>{cell}</td>" for cell in cells)
            rows.append(f"<tr>{row}<td style='color: {tint}; font-weight: bold'>{mark}</td></tr>")
        heads = ("Model", "distance to left", "distance to right", "nearer", "with the judges")
        head = "".join(f"<th style='text-align: left; padding-right: 14px'>{name}</th>" for name in heads)
        self.verdict.value = f"<table><tr>{head}</tr>{''.join(rows)}</table>"

    def _choose_model(self) -> None:
        """Fit the attention controls to the chosen model's depth, heads and grid, starting at the last layer."""
        blocks = self.metric(self.model.value).backbone.blocks
        rows, columns = blocks[0].attn.grid
        places = [(f"row {r + 1}, column {c + 1}", (r, c)) for r, c in product(range(rows), range(columns))]
        heads = [(str(h + 1), h) for h in range(blocks[0].attn.num_heads)]
        new_grid = tuple(self.query.options) != (CLS, *places)
        with self._quietly():
            if self.layer.max != len(blocks):
                self.layer.max = len(blocks)
                self.layer.value = len(blocks)
            for control, options in ((self.head, [ALL_HEADS, *heads]), (self.query, [CLS, *places])):
                if tuple(control.options) != tuple(options):
                    control.options = options
        if new_grid:
            self._tile(rows, columns)
        self._show_maps()

    def _tile(self, rows: int, columns: int) -> None:
        """Make the reference's patches as buttons that choose the query."""
        size = f"{SIDE // max(rows, columns)}px"
        self.mosaic.layout.grid_template_columns = f"repeat({columns}, {size})"
        self.mosaic.layout.grid_auto_rows = size
        tiles = []
        for place in product(range(rows), range(columns)):
            layout = widgets.Layout(width=size, height=size, margin="0", padding="0")
            tile = widgets.Button(layout=layout, tooltip=f"row {place[0] + 1}, column {place[1] + 1}")
            tile.on_click(lambda _, place=place: self._click(place))
            tiles.append(tile)
        self.mosaic.children = tiles

    def _click(self, place: tuple[int, int]) -> None:
        self.query.value = CLS[1] if self.query.value == place else place

    def _show_maps(self) -> None:
        if self.quiet:
            return
        metric = self.metric(self.model.value)
        mixer = metric.backbone.blocks[self.layer.value - 1].attn
        maps = attention_maps(metric, self._images(metric), self.layer.value - 1)
        rows, columns = mixer.grid
        query = None if self.query.value == "CLS" else self.query.value
        self._paint(rows, columns, query)
        token = 0 if query is None else mixer.prefix_tokens + query[0] * columns + query[1]
        head = self.head.value
        # (3, N, N); a layer without heads has one matrix for all
        weights = maps.mean(1) if head == "all" else maps[:, min(head, maps.shape[1] - 1)]
        tags = []
        for role in ORDER:
            row = weights[role, token].float().numpy()  # (N,)
            row = 100 * row / max(np.abs(row).sum(), 1e-12)
            cls, patches = np.split(row, [mixer.prefix_tokens])
            caption = (
                f"{ROLES[role]}<br>{np.abs(cls).sum():.1f} % on CLS, at most {np.abs(patches).max():.1f} % on a patch"
            )
            caption += f"<br>{-row[row < 0].sum():.1f} % below zero (blue)" if (row < 0).any() else ""
            picture = overlay(self.images[role], patches.reshape(rows, columns), query=query)
            tags.append(picture_tag(picture, f"attention in {ROLES[role]}", caption=caption))
        self.maps.value = "".join(tags)

    def _paint(self, rows: int, columns: int, query: tuple[int, int] | None) -> None:
        """Give the mosaic the reference's colours and mark the query."""
        colours = np.asarray(self.images[0].convert("RGB").resize((columns, rows), Image.Resampling.BOX))
        for tile, place in zip(self.mosaic.children, product(range(rows), range(columns)), strict=True):
            tile.style.button_color = mpl.colors.to_hex(colours[place] / 255)
            tile.layout.border = f"2px solid {MARK}" if place == query else "none"
