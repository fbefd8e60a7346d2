import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from thesis_lib import backbone
from thesis_lib.attention.linformer import Linformer, cell_of_token
from thesis_lib.attention.mha import MHA
from thesis_lib.attention.sra import SRA

SHARING = ["headwise", "key-value", "none"]


def randomised(mixer: Linformer, seed: int = 3) -> Linformer:
    """E and F far from the start: random signs, rows that do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        noise = torch.randn(mixer.compression.shape, generator=generator)
        mixer.compression.copy_(noise / mixer.compression.shape[-1] ** 0.5)
    return mixer


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(("grid", "prefix"), [((8, 8), 1), ((6, 10), 5), ((5, 7), 0)])
def test_full_rank_is_mha(grid, prefix, sharing, attention, tokens):
    layer, x = attention(qk_norm=True, scale_norm=True), tokens(grid, prefix)
    mixer = Linformer.from_attention(layer, grid, prefix, rank=x.shape[1], sharing=sharing)
    assert torch.equal(mixer.compression, torch.eye(x.shape[1]).expand_as(mixer.compression))
    assert mixer.bias_channels == 0
    with torch.no_grad():
        assert_close(mixer(x), MHA.from_attention(layer, grid, prefix)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("grid", "ratio", "prefix"), [((8, 8), 4, 1), ((14, 14), 2, 1), ((6, 10), 2, 5)])
def test_block_means_are_spatial_reduction(grid, ratio, prefix, proportional, sharing, attention, tokens):
    layer, x = attention(qk_norm=True), tokens(grid, prefix)
    rank = prefix + grid[0] * grid[1] // ratio**2
    options = {"rank": rank, "sharing": sharing, "proportional": proportional}
    with torch.no_grad():
        expected = SRA.from_attention(layer, grid, prefix, ratio=ratio, proportional=proportional)(x)
        assert_close(Linformer.from_attention(layer, grid, prefix, **options)(x), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("grid", "prefix", "rank"), [((8, 8), 1, 17), ((14, 14), 1, 50), ((7, 7), 2, 15)])
def test_default_rank_is_a_quarter_of_the_patches(grid, prefix, rank, attention):
    assert Linformer.from_attention(attention(), grid, prefix).options["rank"] == rank


@pytest.mark.parametrize("grid", [(6, 10), (5, 13), (1, 9)])
def test_every_rank_partitions_the_grid_into_even_rectangles(grid):
    for cells in range(1, grid[0] * grid[1] + 1):
        label = cell_of_token(grid, 2, 2 + cells)
        assert label[:2].tolist() == [0, 1]
        patches = label[2:].reshape(grid) - 2
        sizes = patches.flatten().bincount(minlength=cells)
        assert len(sizes) == cells and sizes.min() > 0
        assert sizes.max() <= 4 * sizes.min()
        for cell in range(cells):
            rows, columns = (patches == cell).nonzero(as_tuple=True)
            assert len(rows.unique()) * len(columns.unique()) == sizes[cell]


@pytest.mark.parametrize("rank", [7, 12, 23])
def test_exact_on_cell_constant_tokens_with_the_bias_only(rank, attention, tokens):
    x, label = tokens((6, 10)), cell_of_token((6, 10), 1, rank)
    x = x[:, torch.tensor([label.tolist().index(cell) for cell in label])]  # the first token of a cell all over it
    with torch.no_grad():
        expected = MHA.from_attention(attention(), (6, 10), 1)(x)
        exact = Linformer.from_attention(attention(), (6, 10), 1, rank=rank)(x)
        biased = Linformer.from_attention(attention(), (6, 10), 1, rank=rank, proportional=False)(x)
    assert_close(exact, expected, rtol=1e-5, atol=2e-6)
    assert (biased - expected).abs().max() > 1e-3


@pytest.mark.parametrize("sharing", SHARING)
def test_compressing_first_is_compressing_last(sharing, attention, tokens):
    layer, x = attention(), tokens((6, 10))
    mixer = randomised(Linformer.from_attention(layer, (6, 10), 1, sharing=sharing, proportional=False))
    with torch.no_grad():
        q, k, v = MHA.from_attention(layer, (6, 10), 1).query_key_value(x)
        weights = torch.softmax(q @ (mixer.compression[0] @ layer.k_norm(k)).mT / math.sqrt(8), dim=-1)
        assert_close(mixer(x), mixer.project_heads(weights @ (mixer.compression[-1] @ v)), rtol=1e-4, atol=1e-5)
        assert_close(mixer.project_heads(mixer.attention_map(x) @ v), mixer(x), rtol=1e-4, atol=1e-5)


def test_query_key_norm_acts_on_compressed_keys(attention, tokens):
    layer, x = attention(qk_norm=True), tokens()
    mixer = randomised(Linformer.from_attention(layer, (8, 8), 1, proportional=False))
    with torch.no_grad():
        keys = layer.k_norm(mixer.compression[0] @ MHA.from_attention(attention(), (8, 8), 1).query_key_value(x)[1])
        assert_close(mixer.query_key_value(x)[1], keys, rtol=1e-4, atol=1e-5)


def test_orthogonal_matrices_of_full_rank_are_not_mha(attention, tokens):
    mixer, x = Linformer.from_attention(attention(), (8, 8), 1, rank=65), tokens()
    with torch.no_grad():
        expected = mixer(x)
        mixer.compression.copy_(torch.linalg.qr(torch.randn(65, 65, generator=torch.Generator().manual_seed(0)))[0])
        assert (mixer(x) - expected).norm() > 0.5 * expected.norm()  # a softmax is not invariant to rotations


def test_nearer_to_mha_than_uniform_attention_unless_random(attention, tokens):
    layer, label = attention(), cell_of_token((8, 8), 1, 17)
    x = tokens()[:, torch.tensor([label.tolist().index(cell) for cell in label])] + 0.3 * tokens(seed=7)
    with torch.no_grad():
        mha = MHA.from_attention(layer, (8, 8), 1)
        weights, values = mha.attention_map(x), mha.query_key_value(x)[2]
        entropy = -(weights * weights.log()).sum(-1).mean() / math.log(65)
        uniform = mha.project_heads(values.mean(2, keepdim=True).expand_as(values))
        baseline = (uniform - mha(x)).norm()
        assert 0.5 < entropy < 0.9
        for sharing in SHARING:
            mixer = Linformer.from_attention(layer, (8, 8), 1, sharing=sharing)
            assert (mixer(x) - mha(x)).norm() < 0.5 * baseline
            assert (randomised(mixer)(x) - mha(x)).norm() > baseline


@pytest.mark.parametrize("head_dim", [8, 20])
def test_the_channels_equal_an_additive_mask_and_keep_the_flash_kernel(head_dim, attention, tokens):
    mixer, x = Linformer.from_attention(attention(3 * head_dim), (6, 10), 1, rank=12), tokens((6, 10), dim=3 * head_dim)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = mixer(x)
    with torch.no_grad():
        q, k, v = mixer.query_key_value(x)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        q, k, v = (part[..., :head_dim] for part in (q, k, v))
        sizes = cell_of_token((6, 10), 1, 12).bincount()
        assert len(sizes.unique()) > 1
        weights = torch.softmax(q @ k.mT / math.sqrt(head_dim) + sizes.log(), dim=-1)
        assert_close(y, mixer.project_heads(weights @ v), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("rank", "grid", "prefix", "possible"),
    [(66, (8, 8), 1, "2 to 65"), (5, (6, 10), 5, "6 to 65"), (0, (8, 8), 0, "1 to 64"), (9.0, (8, 8), 1, "2 to 65")],
)
def test_a_rank_that_cannot_work_names_those_that_do(rank, grid, prefix, possible, attention):
    tokens = prefix + grid[0] * grid[1]
    for attempt in (
        lambda: Linformer.from_attention(attention(), grid, prefix, rank=rank),
        lambda: Linformer.cost(tokens, 24, 3, grid=grid, prefix_tokens=prefix, rank=rank),
    ):
        with pytest.raises(ValueError, match=rf"rank={rank} must be an integer from {possible}"):
            attempt()


def test_cost_of_the_published_size():
    mha, published = MHA.cost(197, 768, 12), {"rank": 64, "proportional": False}
    projected_first = Linformer.cost(197, 768, 12, sharing="none", **published)
    assert projected_first.macs == 4 * 197 * 768**2 + 4 * 197 * 64 * 768
    headwise = Linformer.cost(197, 768, 12, **published)
    assert projected_first.macs - headwise.macs == 2 * (197 - 64) * 768**2  # what compressing first saves
    assert headwise.params - mha.params == 25_216
    assert Linformer.cost(197, 768, 12, sharing="key-value", **published).params - mha.params == 25_216 // 2
    assert projected_first.params - mha.params == 12 * 25_216


def test_another_image_size_is_built_anew(tmp_path):
    model = backbone.create("demo", "linformer", layers=[0], pretrained=False, rank=20)
    path = backbone.save_weights(model, tmp_path / "linformer.safetensors")
    again = backbone.create("demo", "linformer", layers=[0], pretrained=path, rank=20)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    other = backbone.create("demo", "linformer", pretrained=False, img_size=(40, 72))
    assert other.blocks[0].attn.compression.shape == (2, 13, 46)
    assert other(torch.randn(1, 3, 40, 72)).isfinite().all()
    with pytest.raises(ValueError, match="img_size 64"):  # E and F belong to 8 x 8 patches
        backbone.create("demo", "linformer", layers=[0], pretrained=path, rank=20, img_size=128)


def test_the_bias_is_compressed_under_an_adapter_too():
    model, x = backbone.create("demo", "linformer", pretrained=False), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.k.bias.normal_()
            randomised(block.attn)
        expected = model(x)
        assert_close(backbone.add_lora(model, rank=2).eval()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_linformer_package(shared, attention, tokens):
    peer = pytest.importorskip("linformer").LinformerSelfAttention(24, 61, k=20, heads=3, share_kv=shared).eval()
    layer, x = attention(qkv_bias=False), tokens((6, 10))
    if shared:  # there the keys are the values; here W_k and W_v stay apart
        with torch.no_grad():
            layer.qkv.weight[48:] = layer.qkv.weight[24:48]
    options = {"rank": 20, "sharing": "key-value" if shared else "headwise"}
    mixer = randomised(Linformer.from_attention(layer, (6, 10), 1, proportional=False, **options))
    weighted = randomised(Linformer.from_attention(layer, (6, 10), 1, **options))
    with torch.no_grad():
        peer.to_q.weight.copy_(mixer.q.weight)
        peer.to_k.weight.copy_(mixer.k.weight)
        peer.proj_k.copy_(mixer.compression[0].T)
        if not shared:
            peer.to_v.weight.copy_(mixer.v.weight)
            peer.proj_v.copy_(mixer.compression[1].T)
        peer.to_out.load_state_dict(mixer.proj.state_dict())
        assert_close(mixer(x), peer(x), rtol=1e-5, atol=1e-5)
        assert (weighted(x) - peer(x)).abs().max() > 1e-3  # cells that weigh what they hold
        assert peer(x[:, :40]).shape == (2, 40, 24)  # a slice of E and F
        with pytest.raises(ValueError, match="built for 1 \\+ 6x10 = 61 tokens, got 40"):
            mixer(x[:, :40])
