"""Swapped ViTs as they are deployed: in some layers or all, compiled, exported, loaded from a file of another day."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

from thesis_lib import backbone
from thesis_lib.attention import MIXERS, get

QUICK = {"soft": {"iterations": 4}}  # of 20 the compiler sees each; it takes 5 times as long and shows no more

LINEAR = {"weight": (12, 12), "bias": (12,)}
PROJ = {f"proj.{key}": shape for key, shape in LINEAR.items()}
QKV = {"qkv.weight": (36, 12), "qkv.bias": (36,), **PROJ}
Q_KV = {"q.weight": (12, 12), "q.bias": (12,), "kv.weight": (24, 12), "kv.bias": (24,), **PROJ}
Q_V = {f"{name}.{key}": shape for name in "qv" for key, shape in LINEAR.items()} | PROJ
Q_K_V = {f"{name}.{key}": shape for name in "qkv" for key, shape in LINEAR.items()} | PROJ
CONV = {"reduction.weight": (12, 12, 2, 2), "reduction.bias": (12,)}
BIAS = {"block": (3, 4, 7, 7), "row": (3, 4, 4, 1), "column": (3, 4, 1, 4), "prefix": (3, 4, 1)}
SAVED = [  # state dicts of layers of 12 channels and 3 heads on 4x4 patches and a class token
    ("mha", {}, QKV),
    ("mha", {"implementation": "naive"}, QKV),
    (
        "mha",
        {"implementation": "separate"},
        {f"qkv.{i}.{key}": shape for i in range(3) for key, shape in LINEAR.items()} | PROJ,
    ),
    (
        "mha",
        {"implementation": "per-head"},
        {f"qkv.{i}.{key}": shape for i in range(9) for key, shape in (("weight", (4, 12)), ("bias", (4,)))} | PROJ,
    ),
    ("sra", {}, Q_KV),
    ("sra", {"pooling": "conv"}, Q_KV | CONV),
    ("sra", {"pooling": "pvt"}, Q_KV | CONV | {"reduction_norm.weight": (12,), "reduction_norm.bias": (12,)}),
    ("pool", {}, {}),
    ("moh", {}, QKV | {"router.weight": (4, 12)}),
    ("moh", {"shared": 2}, QKV | {"router.weight": (5, 12)}),
    ("moh", {"router": "norm"}, QKV),
    (
        "moh",
        {"shared": 0, "dropped": [1]},
        {
            "qkv.weight": (24, 12),
            "qkv.bias": (24,),
            "proj.weight": (12, 8),
            "proj.bias": (12,),
            "router.weight": (2, 12),
        },
    ),
    ("soft", {}, Q_V),
    ("soft", {"landmarks": "conv"}, Q_V | {"reduction.weight": (4, 4, 2, 2)}),
    ("linformer", {}, Q_K_V | {"compression": (2, 5, 17)}),
    ("linformer", {"sharing": "key-value", "rank": 9}, Q_K_V | {"compression": (1, 9, 17)}),
    ("linformer", {"sharing": "none"}, Q_K_V | {"compression": (2, 3, 5, 17)}),
    ("performer", {"features": 6}, QKV | {"directions": (6, 4)}),
    ("nystrom", {}, QKV),
    ("nystrom", {"conv": 3}, QKV | {"conv.weight": (3, 1, 3, 1)}),
    ("agent", {}, QKV),
    ("agent", {"conv": 3}, QKV | {"conv.weight": (12, 1, 3, 3), "conv.bias": (12,)}),
    (
        "agent",
        {"bias": True},
        QKV | {f"{side}_bias.{key}": shape for side in ("key", "query") for key, shape in BIAS.items()},
    ),
    ("hybrid", {}, QKV | {"gate.weight": (3, 12)}),
    ("hybrid", {"dilations": [1], "linear": False}, QKV),
    ("identity", {}, {}),
]

every_mixer = pytest.mark.parametrize("name", MIXERS)


def vit(prefix: int = 1, size: tuple[int, int] = (32, 32), depth: int = 3) -> VisionTransformer:
    """A ViT with patches of 4 pixels and weights as large as trained ones, so that a mixer matters."""
    model = VisionTransformer(
        img_size=size,
        patch_size=4,
        embed_dim=24,
        depth=depth,
        num_heads=3,
        num_classes=0,
        class_token=prefix > 0,
        reg_tokens=max(prefix - 1, 0),
        global_pool="token" if prefix else "avg",
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model.eval()


def images(batch: int = 2, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@every_mixer
@pytest.mark.parametrize(("prefix", "size"), [(0, (32, 32)), (1, (24, 40)), (5, (32, 48))])
def test_any_layers_prefix_tokens_and_grid(name, prefix, size):
    plain, x = vit(prefix, size), images(size=size)
    assert plain.num_prefix_tokens == prefix
    with torch.no_grad():
        before = plain(x)
        for layers in ([0], [1, -1], [0, 1, 2]):
            model = backbone.swap(copy.deepcopy(plain), name, layers)
            swapped = {layer % 3 for layer in layers}
            assert [block.attn.name == name for block in model.blocks] == [
                name == "mha" or i in swapped for i in range(3)
            ]
            after = model(x)
            assert after.shape == before.shape and after.isfinite().all()
            assert torch.allclose(after, before, atol=1e-5) == (name == "mha"), layers
            replaced = tuple(f"blocks.{i}.attn." for i in swapped)
            state = model.state_dict()
            for key, value in plain.state_dict().items():
                assert key.startswith(replaced) or torch.equal(state[key], value), key


@every_mixer
def test_compiled_it_gives_the_same_output(name):
    model = backbone.swap(vit(depth=1), name, **QUICK.get(name, {}))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


@every_mixer
def test_exported_it_gives_the_same_output_at_any_batch_size(name):
    model = backbone.swap(vit(depth=1), name, **QUICK.get(name, {}))
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        for batch in (1, 2, 5):
            assert_close(program.module()(images(batch)), model(images(batch)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "expected"), SAVED, ids=[f"{case[0]}-{case[1]}" for case in SAVED])
def test_names_and_shapes_that_saved_weights_rely_on(name, options, expected, attention):
    """A failure here means that files written before do not load any more: give them a way to, then change the list."""
    mixer = get(name).from_attention(attention(12, 3), (4, 4), 1, **options)
    assert {key: tuple(value.shape) for key, value in mixer.state_dict().items()} == expected


def test_every_mixer_is_among_the_saved():
    assert {name for name, _, _ in SAVED} == set(MIXERS)
