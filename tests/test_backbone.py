"""Backbones: weights from every kind of file, mixers in any block, adapters, and what must be refused."""

import argparse
import json
import os

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from thesis_lib import adaptive_tokens, attention_students, backbone, paths, plots
from thesis_lib.attention import MIXERS
from thesis_lib.attention_transfer import AttentionTransfer
from thesis_lib.datasets.synthetic import write_nights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_demo(monkeypatch, tmp_path):
    """Shrink the demo backbone and give it random weights of a known seed."""
    monkeypatch.setattr(backbone, "DEMO", SMALL)
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path)
    torch.manual_seed(0)
    backbone.save_weights(backbone.create("demo", pretrained=False), tmp_path / backbone.DEMO_FILE)


@pytest.fixture
def plain():
    return backbone.create("demo")


def hide_names(path, state):
    """Write weights as others do, without our recipe in the metadata."""
    save_file(state, path)
    return path


def adapter(folder, model, rank=4, alpha=8, prefix="base_model.model.extractor_list.0.model.", change=None, **config):
    """Write a LoRA adapter in DreamSim's layout and return its folder and matrices."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for i, block in enumerate(model.blocks):
        rows, columns = block.attn.qkv.weight.shape
        name = f"{prefix}blocks.{i}.attn.qkv.lora_"
        tensors[f"{name}A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
        tensors[f"{name}B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    if change:
        change(tensors, prefix)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"r": rank, "lora_alpha": alpha, "target_modules": ["qkv"], "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder, tensors


# --- creation -------------------------------------------------------------------------------------------------------


def test_plain_swap_to_mha_computes_what_timm_computes():
    torch.manual_seed(3)
    ours = backbone.create("test_vit", pretrained=False, img_size=64)
    torch.manual_seed(3)
    timms = timm.create_model("test_vit", num_classes=0).eval()
    timms.set_input_size(img_size=(64, 64))
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), timms(x), atol=1e-5, rtol=1e-5)
    assert ours.recipe["name"] == "test_vit" and ours.recipe["img_size"] == 64 and not ours.training


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_serves_the_backbone_and_describes_itself(mixer):
    model = backbone.create("demo", mixer)
    assert [block.attn.name for block in model.blocks] == [mixer] * 3
    assert model(IMAGES).shape == (2, 48)
    assert json.loads(json.dumps(model.recipe)) == model.recipe
    assert model.recipe["mixer"] == mixer and model.recipe["layers"] is None
    assert model.recipe["mixer_options"] == model.blocks[0].attn.options


def test_layers_count_from_either_end_and_leave_the_others_alone(plain):
    model = backbone.create("demo", "identity", layers=[-1, 0])
    assert [block.attn.name for block in model.blocks] == ["identity", "mha", "identity"]
    assert model.recipe["layers"] == [0, 2]
    before, after = plain.state_dict(), model.state_dict()
    assert all(torch.equal(before[k], v) for k, v in after.items())
    assert not torch.equal(plain(IMAGES), model(IMAGES))


@pytest.mark.parametrize("layers", [[3], [-4], [0, 0], [0, -3], [], [1.0], [True], ["1"], 1])
def test_impossible_layers_are_refused(layers):
    with pytest.raises(ValueError, match="layers=.*-3 to 2"):
        backbone.create("demo", "identity", layers=layers)


def test_integers_of_numpy_are_integers():
    model = backbone.create("demo", "identity", layers=np.arange(2), img_size=np.int64(64))
    assert json.loads(json.dumps(model.recipe)) == model.recipe
    assert model.recipe["layers"] == [0, 1] and model.recipe["img_size"] == 64


def test_a_second_swap_is_refused_and_a_failed_one_changes_nothing(plain):
    before = list(plain.blocks)
    with pytest.raises(ValueError, match="kernel"):
        backbone.swap(plain, "pool", kernel=2)
    assert [block.attn.name for block in plain.blocks] == ["mha"] * 3 and list(plain.blocks) == before
    backbone.swap(plain, "identity", layers=[1])
    with pytest.raises(ValueError, match="Block 1 has 'identity'"):
        backbone.swap(plain, "pool")


def test_names_with_typos_are_answered_with_the_near_ones():
    with pytest.raises(ValueError, match="vit_base_patch16_224.dino"):
        backbone.create("vit_base_patch16_224_dino", pretrained=False)
    with pytest.raises(ValueError, match="demo"):
        backbone.create("dmeo", pretrained=False)
    with pytest.raises(ValueError, match="pretrained must be True, False or a weight file, not None"):
        backbone.create("demo", pretrained=None)
    with pytest.raises(ValueError, match="There is no timm VisionTransformer 'vit_bse_patch16_224'"):
        backbone.create("vit_bse_patch16_224", pretrained=False)
    for name in ("vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224.fb_in1k"):
        with pytest.raises(ValueError, match=f"timm's '{name}' is no plain VisionTransformer; near ones: "):
            backbone.create(name, pretrained=False)
    with pytest.raises(ValueError, match="moh"):
        backbone.create("demo", "mho")
    with pytest.raises(ValueError, match="kernel"):
        backbone.create("demo", "pool", kernle=3)


# --- image size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid"), [(64, (8, 8)), ((24, 64), (3, 8)), (32, (4, 4))])
def test_any_size_the_patch_divides_resamples_the_position_embedding(plain, size, grid):
    model = backbone.create("demo", img_size=size)
    expected = resample_abs_pos_embed(plain.pos_embed, list(grid), [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed, expected, atol=0, rtol=0)
    height, width = (size, size) if isinstance(size, int) else size
    assert model(torch.rand(1, 3, height, width)).shape == (1, 48)
    assert model.blocks[0].attn.grid == grid
    assert model.recipe["img_size"] == (size if isinstance(size, int) else list(size))


@pytest.mark.parametrize("size", ["64", 64.0, (64, None)])
def test_sizes_that_are_no_integers_are_refused(size):
    with pytest.raises(ValueError, match="img_size .* must be an integer, or height and width"):
        backbone.create("demo", img_size=size)


@pytest.mark.parametrize("size", [36, 0, (32, 33)])
def test_sizes_the_patch_does_not_divide_are_refused(size):
    with pytest.raises(ValueError, match="multiple of the patch size"):
        backbone.create("demo", img_size=size)


def test_sra_ratio_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match="does not divide the 3x3 grid"):
        backbone.create("demo", "sra", img_size=24, ratio=2)


# --- weight files ---------------------------------------------------------------------------------------------------


def full_checkpoint(teacher, student):
    """A training checkpoint as DINO's main_dino.py writes it: wrapped networks, heads, and its arguments."""
    head = {"head.mlp.0.weight": torch.zeros(8, 48), "head.last_layer.weight_g": torch.ones(5, 1)}
    return {
        "student": {f"module.{k}": v for k, v in ({f"backbone.{k}": v for k, v in student.items()} | head).items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.items()} | head,
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
    }


def test_every_kind_of_weight_file_gives_the_same_model(plain, tmp_path):
    state = plain.state_dict()
    other = {k: v + 1 for k, v in state.items()}
    head = {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}
    full = full_checkpoint(state, other)
    files = {
        "backbone.pth": state,
        "full.pth": full,
        "student.pth": {"student": full_checkpoint(other, state)["student"]},
        "classifier.pth": {"model": state | head},
        "lightning.pt": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    hide_names(tmp_path / "plain.safetensors", state)
    hide_names(tmp_path / "half.safetensors", {k: v.half() for k, v in state.items()})
    expected = plain(IMAGES)
    for path in [tmp_path / name for name in [*files, "plain.safetensors"]]:
        torch.testing.assert_close(backbone.create("demo", pretrained=path)(IMAGES), expected, atol=0, rtol=0)
    half = backbone.create("demo", pretrained=str(tmp_path / "half.safetensors"))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(half(IMAGES), expected, atol=1e-2, rtol=1e-2)


def test_weights_are_loaded_before_the_mixer_and_the_size_are_changed(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "backbone.pth")
    model = backbone.create("demo", "sra", pretrained=tmp_path / "backbone.pth", img_size=64, layers=[2])
    shipped = backbone.create("demo", "sra", img_size=64, layers=[2])
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(x), shipped(x), atol=0, rtol=0)


def test_our_own_files_come_back_with_their_mixer_and_size(tmp_path):
    model = backbone.create("demo", "moh", layers=[0, 1], img_size=64, active=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    path = backbone.save_weights(model, tmp_path / "own.safetensors")
    again = backbone.create("demo", "moh", layers=[0, 1], pretrained=path, active=2)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(x), again(x)) and again.recipe == model.recipe


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({}, "mixer 'moh' .model: 'mha'"),
        ({"mixer": "sra"}, "mixer 'moh' .model: 'sra'"),
        ({"mixer": "moh", "active": 3}, "mixer_options"),
        ({"mixer": "moh", "active": 2, "layers": [0]}, r"layers None .model: \[0\]"),
        ({"mixer": "moh", "active": 2, "img_size": 64}, "img_size 32 .model: 64"),
    ],
)
def test_a_file_for_another_mixer_or_size_is_refused(tmp_path, request_, named):
    path = backbone.save_weights(backbone.create("demo", "moh", active=2), tmp_path / "moh.safetensors")
    with pytest.raises(ValueError, match=named):
        backbone.create("demo", **request_, pretrained=path)


def test_a_plain_file_of_another_model_is_refused_whole_and_says_what_differs(plain, tmp_path, monkeypatch):
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    sources = {
        "size": ({"img_size": 64}, r"1 of another shape \(pos_embed \(1, 65, 48\) \(model: \(1, 17, 48\)\)\)"),
        "mixer": ({"mixer": "pool"}, r"12 missing \(blocks.0.attn.qkv.weight, .*, \.\.\.\)"),
    }
    for name, (arguments, message) in sources.items():
        path = hide_names(tmp_path / f"{name}.safetensors", backbone.create("demo", **arguments).state_dict())
        with pytest.raises(ValueError, match=message):
            backbone.load_weights(plain, path)
    monkeypatch.setattr(backbone, "DEMO", SMALL | {"depth": 4})
    path = hide_names(tmp_path / "depth.safetensors", backbone.create("demo", pretrained=False).state_dict())
    with pytest.raises(ValueError, match="12 unexpected"):
        backbone.load_weights(plain, path)
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())


class Unsafe:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_files_that_are_no_weights_are_refused(tmp_path, capsys):
    torch.save({"model": Unsafe()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").touch()
    whole = (tmp_path / backbone.DEMO_FILE).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(backbone.create("demo"), tmp_path / "model.pth")
    torch.save(backbone.create("demo").state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    (tmp_path / "byte.pth").write_bytes(b"x")
    for name in ("code", "list", "text", "empty", "cut", "model", "byte"):
        with pytest.raises(ValueError, match=f"{name}.pth") as caught:
            backbone.create("demo", pretrained=tmp_path / f"{name}.pth")
        assert not any(part in str(caught.value) for part in ("weights_only", "\n", "\x1b"))
        assert name != "model" or "save model.state_dict()" in str(caught.value)
        assert name != "empty" or "is empty" in str(caught.value)
    with pytest.raises(ValueError, match="cut.safetensors"):
        backbone.create("demo", pretrained=tmp_path / "cut.safetensors")
    assert "must not run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        backbone.create("demo", pretrained=tmp_path / "nowhere.pth")


def spoil(state, key, change):
    return state | {key: change(state[key])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: (100 * v).to(torch.int8) for k, v in s.items()}, "42 not of finite floats"),
        (lambda s: spoil(s, "cls_token", lambda v: v > 0), r"1 not of finite floats \(cls_token\)"),
        (lambda s: spoil(s, "cls_token", lambda v: v * 1j), r"1 not of finite floats \(cls_token\)"),
        (lambda s: spoil(s, "norm.bias", lambda v: v * torch.nan), r"1 not of finite floats \(norm.bias\)"),
        (lambda s: spoil(s, "norm.bias", lambda v: v.to_sparse()), "tensors"),
        (lambda s: spoil(s, "norm.bias", lambda v: v.to("meta")), "dense tensors"),
        (lambda s: s | {1: s["norm.bias"]}, "dense tensors"),
        (lambda s: s | {f"module.backbone.{k}": torch.zeros_like(v) for k, v in s.items()}, "several models"),
    ],
)
def test_weights_that_are_unfit_are_refused(plain, tmp_path, change, message):
    torch.save(change(plain.state_dict()), tmp_path / "unfit.pth")
    with pytest.raises(ValueError, match=f"unfit.pth .*{message}"):
        backbone.load_weights(plain, tmp_path / "unfit.pth")


@pytest.mark.parametrize("recipe", ["5", "[1]", '"x"', "{", "{}"])
def test_a_recipe_that_is_none_is_refused(plain, tmp_path, recipe):
    save_file(plain.state_dict(), tmp_path / "odd.safetensors", metadata={"recipe": recipe})
    with pytest.raises(ValueError, match="odd.safetensors is corrupt"):
        backbone.load_weights(plain, tmp_path / "odd.safetensors")


@pytest.mark.parametrize("name", ["weights.bin", "weights.SAFETENSORS"])
def test_safetensors_may_have_any_name(plain, tmp_path, name):
    backbone.load_weights(backbone.create("demo", pretrained=False), hide_names(tmp_path / name, plain.state_dict()))


def test_missing_demo_weights_name_the_command_that_makes_them(tmp_path):
    (tmp_path / backbone.DEMO_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="python -m thesis_lib.demo_backbone"):
        backbone.create("demo")


def test_unreachable_hub_says_what_is_missing_and_where_it_is(monkeypatch):
    original = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise OSError("Name or service not known")
        return original(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError) as caught:
        backbone.create("vit_base_patch16_224.dino")
    for part in ("343 MB", "timm/vit_base_patch16_224.dino", "dino_vitbase16_pretrain.pth", "pretrained=<path"):
        assert part in str(caught.value)


# --- DreamSim's adapter ---------------------------------------------------------------------------------------------


def test_merged_adapter_equals_the_adapter_computed_beside_the_weights(plain, tmp_path):
    folder, tensors = adapter(tmp_path / "lora", plain, rank=4, alpha=8)
    merged = backbone.create("demo", adapter=folder)
    tokens = torch.randn(5, 48)
    for i in range(3):
        a, b = (tensors[f"base_model.model.extractor_list.0.model.blocks.{i}.attn.qkv.lora_{m}.weight"] for m in "AB")
        expected = plain.blocks[i].attn.qkv(tokens) + 8 / 4 * (tokens @ a.T) @ b.T
        torch.testing.assert_close(merged.blocks[i].attn.qkv(tokens), expected, atol=1e-5, rtol=1e-5)


def test_teachers_adapter_is_merged_before_the_mixer_is_swapped_in(plain, tmp_path):
    folder, _ = adapter(tmp_path / "lora", plain)
    at_once = backbone.create("demo", "sra", adapter=folder)
    in_steps = backbone.swap(backbone.merge_dreamsim_adapter(plain, folder), "sra")
    assert torch.equal(at_once(IMAGES), in_steps(IMAGES))
    assert not torch.allclose(at_once(IMAGES), backbone.create("demo", "sra")(IMAGES), atol=1e-4)
    with pytest.raises(ValueError, match=r"Blocks \[0, 1, 2\] are already swapped.*adapter=folder"):
        backbone.merge_dreamsim_adapter(at_once, folder)


def drop(tensors, prefix):
    del tensors[f"{prefix}blocks.1.attn.qkv.lora_B.weight"]


def add_branch(tensors, prefix):
    tensors["base_model.model.extractor_list.1.model.blocks.0.attn.qkv.lora_A.weight"] = torch.ones(4, 48)


def add_layer(tensors, prefix):
    tensors[f"{prefix}blocks.3.attn.qkv.lora_A.weight"] = torch.ones(4, 48)


def without_number(tensors, prefix):
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def zero(tensors, prefix):
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = torch.zeros_like(tensors[key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"change": drop}, r"1 missing \(blocks.1.attn.qkv.lora_B\)"),
        ({"change": add_branch}, "1 unexpected"),
        ({"change": add_layer}, "1 unexpected .*blocks.3"),
        ({"change": zero}, "all zero"),
        ({"change": without_number}, "not finite"),
        ({"r": "abc"}, "not a readable LoRA adapter"),
        ({"r": 16}, r"shapes \(\(4, 48\), \(144, 4\)\), expected \(\(16, 48\), \(144, 16\)\)"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"r": None}, "not a readable LoRA adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_whole(plain, tmp_path, arguments, message):
    folder, _ = adapter(tmp_path / "lora", plain, **arguments)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        backbone.merge_dreamsim_adapter(plain, folder)
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())


def test_a_missing_adapter_says_what_the_folder_must_hold(plain, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json.*dino_vitb16_single_lora"):
        backbone.merge_dreamsim_adapter(plain, tmp_path)


# --- LoRA -----------------------------------------------------------------------------------------------------------


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_of_a_vit_base_trains_as_many_parameters_as_dreamsims():
    with torch.device("meta"):
        model = backbone.create("vit_base_patch16_224.dino", pretrained=False)
        tuned = backbone.add_lora(model)
    assert trainable(tuned) == 589_824


@pytest.mark.parametrize("mixer", MIXERS)
def test_lora_adapts_each_mixer_and_merges_into_a_plain_vit(mixer, tmp_path):
    model = backbone.create("demo", mixer, layers=[0, 2])
    recipe, keys, before = dict(model.recipe), list(model.state_dict()), model(IMAGES)
    tuned = backbone.add_lora(model, rank=2, alpha=4, dropout=0.0)
    torch.testing.assert_close(tuned(IMAGES), before)  # lora_B starts at zero
    adapted = {name.split(".lora_")[0] for name, p in tuned.named_parameters() if p.requires_grad}
    blocks = {name.split("blocks.")[1].split(".")[0] for name in adapted}
    assert blocks == {"0", "1", "2"}
    uses_mlp = {name.split("blocks.")[1][0] for name in adapted if ".mlp.fc1" in name}
    assert uses_mlp == (set() if MIXERS[mixer].lora_targets else {"0", "2"})

    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(IMAGES).square().mean().backward()
        optimizer.step()
    moved = tuned(IMAGES).detach()
    assert not torch.allclose(moved, before, atol=1e-4)
    with pytest.raises(ValueError, match="merge_lora"):
        backbone.save_weights(tuned, tmp_path / "tuned.safetensors")
    merged = backbone.merge_lora(tuned)
    torch.testing.assert_close(merged(IMAGES), moved, atol=1e-4, rtol=1e-3)
    assert (
        list(merged.state_dict()) == keys
        and merged.recipe == recipe
        and trainable(merged) == sum(p.numel() for p in merged.parameters())
    )
    path = backbone.save_weights(merged, tmp_path / "merged.safetensors")
    again = backbone.create("demo", mixer, layers=[0, 2], pretrained=path)
    assert torch.equal(again(IMAGES), merged(IMAGES))


def test_merging_without_an_adapter_is_refused(plain):
    with pytest.raises(ValueError, match="carries no LoRA adapter"):
        backbone.merge_lora(plain)


def test_saved_weights_shrink_to_half_precision_and_leave_no_part_file(plain, tmp_path):
    path = backbone.save_weights(plain, tmp_path / "half.safetensors", torch.float16)
    assert {v.dtype for v in load_file(path).values()} == {torch.float16}
    assert not list(tmp_path.glob("*.part"))


def exported(path):
    return attention_students.export(AttentionTransfer(attention_students.create_student("demo", 2), mode="none"), path)


@pytest.mark.parametrize(
    ("module", "save"),
    [
        (backbone, lambda path: backbone.save_weights(backbone.create("demo"), path)),
        (
            adaptive_tokens,
            lambda path: adaptive_tokens.save(adaptive_tokens.AdaptiveViT(backbone.create("demo")), path),
        ),
        (attention_students, exported),
    ],
)
def test_a_rank_that_saves_while_another_does_disturbs_it_not(module, save, tmp_path, monkeypatch):
    parts, write = [], module.save_file

    def between(state, part, **options):
        write(state, part, **options)
        parts.append(part)
        if len(parts) == 1:  # before this rank has put its file in place
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                save(tmp_path / "model.safetensors")

    monkeypatch.setattr(module, "save_file", between)
    assert save(tmp_path / "model.safetensors").is_file() and len(set(parts)) == 2
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))


def test_a_file_that_cannot_be_written_leaves_the_one_that_is_there(tmp_path):
    def half(part):
        part.write_text("ne")
        raise OSError("disk full")

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        paths.write_whole(tmp_path / "file", half)
    assert [(path.name, path.read_text()) for path in tmp_path.glob("*file*")] == [("file", "old")]


def test_notebook_02_looks_for_the_adapter_below_the_data_folder_before_it_trains(tmp_path, monkeypatch):
    write_nights(tmp_path / "nights", {"train": 2, "val": 2, "test": 2}, seed=0, size=32, workers=1)
    for name, value in (("DATA", tmp_path), ("CACHE", tmp_path / "cache")):
        monkeypatch.setattr(paths, name, value)
    monkeypatch.setattr(plots, "set_theme", lambda: None)
    cells = json.loads((paths.NOTEBOOKS / "02_attention_evaluation.ipynb").read_text(encoding="utf-8"))["cells"]
    parameters, *others = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    setup = others[: next(i for i, cell in enumerate(others) if "lora_tune(" in cell and "import" not in cell)]
    names = {}
    exec(parameters, names)
    names |= {"dataset_root": "nights", "img_size": 32, "teacher_adapter": "adapter", "num_workers": 1}
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'adapter'} has no adapter_config.json"):
        for cell in setup:
            exec(cell, names)


def test_normalization_is_the_weights_own():
    with torch.device("meta"):
        dino = backbone.create("vit_base_patch16_224.dino", pretrained=False)
        augreg = backbone.create("vit_base_patch16_224.augreg_in21k", pretrained=False)
    assert backbone.normalization(dino) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert backbone.normalization(augreg) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert backbone.normalization(backbone.create("demo")) == backbone.normalization(dino)


def test_deit_is_a_timm_vit_too_but_not_with_a_distillation_token():
    assert backbone.create("deit_tiny_patch16_224.fb_in1k", "pool", pretrained=False).num_prefix_tokens == 1
    with pytest.raises(ValueError, match="near ones: deit_tiny_patch16_224"):
        backbone.create("deit_tiny_distilled_patch16_224", pretrained=False)
