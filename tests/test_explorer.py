import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from thesis_lib import adaptive_tokens, attention, backbone, paths
from thesis_lib.adaptive_tokens import AdaptiveViT, preset
from thesis_lib.adaptive_training import headed
from thesis_lib.datasets import synthetic
from thesis_lib.datasets.synthetic_correspondence import write_spair
from thesis_lib.explorer import Explorer, attention_maps, overlay
from thesis_lib.perceptual import Metric, save

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def write_triplets(root: Path, n: int = 4) -> None:
    """A NIGHTS tree of coloured noise; the left candidate wins in even triplets."""
    rng, records = np.random.default_rng(0), []
    for i in range(n):
        record = {"id": i, "left_vote": (i + 1) % 2, "right_vote": i % 2, "votes": 8}
        names = (f"ref/000/{i:03d}.png", f"distort/000/{i:03d}_0.png", f"distort/000/{i:03d}_1.png")
        for column, name in zip(("ref_path", "left_path", "right_path"), names, strict=True):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            pixels.resize((128, 128), Image.Resampling.BICUBIC).save(root / name)
            record[column] = name
        records.append(record | {"split": "test" if i < n - 1 else "val", "is_imagenet": i == 0})
    pd.DataFrame(records).to_csv(root / "data.csv", index=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder with triplets, key-points, classified images, a saved student and a saved adaptive classifier."""
    folder = tmp_path_factory.mktemp("data")
    write_triplets(folder / "raw" / "synthetic" / "demo" / "nights")
    torch.manual_seed(0)
    models, raw = folder / "results" / "demo" / "models", folder / "raw" / "synthetic" / "demo"
    save(Metric(backbone.create("demo", "pool", pretrained=False)), models / "student")
    adaptive = AdaptiveViT(headed("demo", 18, pretrained=False), preset("paper", target_depth=3.0))
    adaptive_tokens.save(adaptive, models / "adaptive-finetuned.safetensors")
    write_spair(raw / "spair71k", {"test": 3}, workers=1)
    synthetic.write_imagenet100(raw / "imagenet100", {"train": 2, "validation": 2, "test": 3}, workers=1)
    return folder


@pytest.fixture
def explorer(data, monkeypatch) -> Explorer:
    monkeypatch.setattr(paths, "DATA", data)
    monkeypatch.setattr(paths, "RESULTS", data / "results")
    torch.manual_seed(0)
    return Explorer("demo", pretrained=False)


def test_next_and_previous_go_round_and_change_the_verdict(explorer):
    first = explorer.pictures.value, explorer.verdict.value, explorer.maps.value
    explorer.next.click()
    assert explorer.index.value == 2
    for before, part in zip(first, (explorer.pictures, explorer.verdict, explorer.maps), strict=True):
        assert part.value != before
    explorer.previous.click()
    assert (explorer.pictures.value, explorer.verdict.value, explorer.maps.value) == first
    explorer.previous.click()
    assert explorer.index.value == len(explorer.triplets) == 3


def test_verdicts_are_those_of_the_metric(explorer):
    metric = explorer.metric("student")
    with torch.inference_mode():
        ref, left, right = explorer._images(metric).split(1)
        d_left, d_right = metric(ref, left).item(), metric(ref, right).item()
    row = next(part for part in explorer.verdict.value.split("<tr>") if ">student<" in part)
    assert f">{d_left:.4f}<" in row and f">{d_right:.4f}<" in row
    assert ("✓ agrees" in row) == (d_left < d_right)  # the judges chose left in the first triplet
    assert "left: 8 of 8 votes" in explorer.pictures.value


def test_models_are_the_mixers_and_what_was_saved_and_can_be_hidden(explorer):
    names = [toggle.description for toggle in explorer.shown]
    assert set(names) == {mixer.label for mixer in attention.MIXERS.values()} | {"student"} and names[0] == "MHA"
    explorer.shown[0].value = False
    assert ">MHA<" not in explorer.verdict.value and ">student<" in explorer.verdict.value


def test_mixer_options_reach_their_mixer(explorer):
    other = Explorer("demo", pretrained=False, mixers=["pool"], mixer_options={"pool": {"kernel": 5}})
    assert other.metric("Pool").backbone.blocks[0].attn.options["kernel"] == 5
    assert explorer.metric("Pool").backbone.blocks[0].attn.options["kernel"] != 5


def test_every_control_shows_what_is_chosen(explorer):
    assert [control.label for control in (explorer.model, explorer.head, explorer.query)] == [
        "MHA",
        "mean of all",
        "CLS",
    ]
    explorer.model.value = "student"
    assert (explorer.head.index, explorer.query.index) == (0, 0) and len(explorer.query.options) == 65


def test_split_model_layer_head_and_query_redraw(explorer):
    for control, value in (
        (explorer.layer, 1),
        (explorer.head, 1),
        (explorer.query, (2, 3)),
        (explorer.model, "SRA"),
        (explorer.split, "val"),
    ):
        before = explorer.maps.value
        control.value = value
        assert explorer.maps.value != before, control.description
    assert explorer.index.max == 1 and explorer.layer.max == 6 and explorer.layer.value == 1


def test_a_click_on_a_patch_of_the_reference_chooses_the_query(explorer):
    assert len(explorer.mosaic.children) == 64
    tile, before = explorer.mosaic.children[2 * 8 + 3], explorer.maps.value
    tile.click()
    assert explorer.query.value == (2, 3) and explorer.maps.value != before and "00E5FF" in tile.layout.border_top
    explorer.mosaic.children[0].click()
    assert explorer.query.value == (0, 0) and tile.layout.border_top == "none"
    explorer.mosaic.children[0].click()
    assert explorer.query.value == "CLS" and explorer.maps.value == before


def test_the_mosaic_has_the_references_colours(explorer):
    colours = [tile.style.button_color for tile in explorer.mosaic.children]
    corner = np.asarray(explorer.images[0].convert("RGB"))[:16, :16].mean(axis=(0, 1))
    shown = [int(colours[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert np.abs(corner - shown).max() <= 1
    explorer.next.click()
    assert [tile.style.button_color for tile in explorer.mosaic.children] != colours


def test_every_mixer_shows_its_matrix_for_a_patch_and_any_head(explorer):
    explorer.query.value, explorer.head.value = (4, 4), 3
    negative = set()
    for mixer in attention.MIXERS.values():
        explorer.model.value = mixer.label
        assert explorer.maps.value.count("<img") == 3 and "nan %" not in explorer.maps.value
        negative |= {mixer.name} if "below zero" in explorer.maps.value else set()
    # a token less than its neighbours have, and what inverses of landmarks subtract
    assert {"pool"} <= negative <= {"pool", "soft", "nystrom"}


def test_attention_maps_are_what_the_mixer_sees():
    torch.manual_seed(0)
    metric = Metric(backbone.create("demo", pretrained=False)).eval()
    x = torch.rand(2, 3, 64, 64)
    maps = attention_maps(metric, x, 5)
    assert maps.shape == (2, 4, 65, 65)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 65))
    block, tokens = (
        metric.backbone.blocks[5],
        metric.backbone.forward_intermediates(
            (x - metric.mean) / metric.std,
            indices=[4],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )[0],
    )
    before = block.norm1(torch.cat([tokens[1], tokens[0]], dim=1))
    torch.testing.assert_close(maps, block.attn.attention_map(before))
    assert not block.attn._forward_pre_hooks


def test_overlay_is_brightest_where_the_weight_is():
    weights = np.zeros((4, 4))
    weights[1, 2] = 1
    image = np.asarray(overlay(Image.new("RGB", (32, 32), "grey"), weights)).sum(-1)
    row, column = np.unravel_index(image.argmax(), image.shape)
    assert (row // 56, column // 56) == (1, 2)


def test_overlay_is_blue_below_zero():
    weights = np.full((4, 4), 0.1)
    weights[1, 2] = -1
    image = np.asarray(overlay(Image.new("RGB", (32, 32), "black"), weights)).astype(int)
    red, _, blue = image[56 + 28, 2 * 56 + 28]
    assert blue > red + 30
    assert image[200, 20, 0] >= image[200, 20, 2] - 30


def test_without_triplets_it_names_the_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 01_data_preparation with profile 'demo'"):
        Explorer("demo", dataset_root=tmp_path)


DRAWN = """() => {
    const images = [...document.querySelectorAll(".explorer-attention img")];
    return images.length === 3 && images.every(image => image.complete && image.naturalWidth === 224);
}"""


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not start: {log.read_text()}")


@pytest.fixture
def lab(data, tmp_path):
    """The address of a JupyterLab with explore.ipynb as it is committed."""
    (tmp_path / "work").mkdir()
    shutil.copy(paths.NOTEBOOKS / "explore.ipynb", tmp_path / "work")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = {name: str(tmp_path / "home") for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    home |= {"THESIS_DATA": str(data), "PYTHONPATH": str(paths.ROOT), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
    ]
    command += [
        "--IdentityProvider.token=secret",
        f"--ServerApp.root_dir={tmp_path / 'work'}",
        "--LabApp.news_url=None",
    ]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = tmp_path / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=os.environ | home, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token=secret", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?token=secret"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.filterwarnings("ignore")  # of the browser driver
def test_a_person_clicks_through_the_notebook_in_jupyterlab(lab, tmp_path):
    from playwright.sync_api import Error, expect, sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1400, "height": 1500})
        page.goto(lab, timeout=120_000)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
        try:
            expect(page.get_by_text("| Idle")).to_be_visible(timeout=120_000)  # without a kernel, Run asks for one
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            verdict, attended = page.locator(".explorer-verdict"), page.locator(".explorer-attention img")
            expect(attended).to_have_count(3, timeout=180_000)
            before = verdict.inner_text()
            assert "MHA" in before and "student" in before
            page.get_by_role("button", name="Next").click()
            expect(verdict).not_to_have_text(before, use_inner_text=True, timeout=60_000)
            expect(page.locator(".explorer-pictures")).to_contain_text("Triplet 1, 2 of 3")
            page.wait_for_function(DRAWN, timeout=60_000)
            expect(page.locator(".explorer-mosaic button")).to_have_count(64)
            shown = attended.nth(1).get_attribute("src")
            page.get_by_title("row 3, column 6").click()
            expect(attended.nth(1)).not_to_have_attribute("src", shown, timeout=60_000)
            expect(page.get_by_label("Query")).to_have_value("row 3, column 6")
            page.wait_for_function(DRAWN, timeout=60_000)
            found = page.locator(".match-found")
            expect(found.locator("img").first).to_be_visible(timeout=60_000)
            before = found.inner_html()
            page.locator(".match-source img").click(position={"x": 30, "y": 150})
            page.wait_for_function("before => document.querySelector('.match-found').innerHTML !== before", arg=before)
            expect(page.locator(".halting-explorer")).to_contain_text("of the tokens computed", timeout=60_000)
            for _ in range(20):  # the pictures are replaced one by one, so the first found may be gone again
                with contextlib.suppress(Error):
                    attended.nth(1).screenshot(path=tmp_path / "attention.png", timeout=5_000)
                    break
        finally:
            page.screenshot(path=os.environ.get("EXPLORER_SCREENSHOT", tmp_path / "page.png"))
        browser.close()
    picture = np.asarray(Image.open(tmp_path / "attention.png").convert("RGB")).astype(int)
    assert picture.shape[0] >= 200 and picture.std(axis=(0, 1)).max() > 5, "the attention picture is blank"
