import pytest
import torch
from timm.layers import Attention
from torch import nn
from torch.testing import assert_close

from thesis_lib.attention import MIXERS, Mixer, get
from thesis_lib.mixing import AT_ONCE, mixing_matrix, value_projections

GRID, TOKENS, DIM, HEADS = (6, 10), 61, 72, 3
CASES = [(name, {}) for name in MIXERS] + [
    ("mha", {"implementation": "separate"}),
    ("mha", {"implementation": "per-head"}),
    ("sra", {"ratio": 1}),
    ("pool", {"cls": "none"}),
    ("moh", {"dropped": [2]}),
    ("soft", {"landmarks": "conv"}),
    ("linformer", {"sharing": "none"}),
    ("nystrom", {"conv": 3}),
    ("agent", {"conv": 3}),
    ("hybrid", {"combine": "split"}),
]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)


def trained(name: str, options: dict) -> tuple[Mixer, torch.Tensor]:
    """A mixer whose parameters have all left their start, and tokens (2, N, D); the heads are its output."""
    torch.manual_seed(0)
    layer = Attention(DIM, HEADS, qkv_bias=True).double().eval()
    mixer = get(name).from_attention(layer, GRID, 1, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mixer.proj = nn.Identity()
    return mixer, torch.randn(2, TOKENS, DIM, dtype=torch.float64)


@every_case
def test_a_changed_value_changes_the_output_by_its_column(name, options):
    mixer, x = trained(name, options)
    matrix = mixing_matrix(mixer, x)
    heads = matrix.shape[1]
    assert matrix.shape == (2, heads, TOKENS, TOKENS) and heads in (1, HEADS - 1, HEADS)
    for token in (0, 1, 33, 60):
        change = torch.randn(heads, (DIM // HEADS) if heads > 1 else DIM, dtype=torch.float64)
        if name == "agent":  # a kernel for each channel: the matrix is their mean
            change[:] = change[:, :1]
        with torch.no_grad():
            before = mixer(x[:1])
            if projections := value_projections(mixer):
                # tokens are fewer than channels, so weights exist that change the value of this one alone
                direction = torch.linalg.pinv(x[0])[:, token]
                for (layer, first), part in zip(projections, change.flatten().chunk(len(projections)), strict=True):
                    layer.weight[first:] += part[:, None] * direction
                after = mixer(x[:1])
            else:
                moved = x[:1].clone()
                moved[0, token] += change[0]
                after = mixer(moved)
        difference = (after - before)[0].unflatten(-1, (heads, -1)).transpose(0, 1)  # (h, N, d_h)
        expected = matrix[0, :, :, token, None] * change[:, None]
        if name == "agent":
            difference, expected = difference.mean(-1), expected.mean(-1)
        assert_close(difference, expected, rtol=1e-6, atol=1e-7)
    assert_close(mixing_matrix(mixer, x[1:]), matrix[1:])


@pytest.mark.parametrize(
    "name", ["mha", "sra", "moh", "linformer", "performer", "nystrom", "agent", "hybrid", "identity"]
)
def test_it_is_the_attention_map_of_layers_that_have_one(name):
    mixer, x = trained(name, {})
    assert_close(mixing_matrix(mixer, x), mixer.attention_map(x), check_stride=False)


def test_what_maps_for_display_leave_out():
    eye = torch.eye(TOKENS, dtype=torch.float64)
    pool, x = trained("pool", {})
    assert_close(mixing_matrix(pool, x), pool.attention_map(x) - eye)  # the block adds the token back
    hybrid, x = trained("hybrid", {"combine": "split"})
    matrix = mixing_matrix(hybrid, x)
    assert (matrix.sum(-1) - 1).abs().max() > 0.01  # gates
    assert_close(matrix / matrix.sum(-1, keepdim=True), hybrid.attention_map(x))
    soft, x = trained("soft", {})
    matrix = mixing_matrix(soft, x)
    assert (matrix < -1e-6).any()
    positive = matrix.clamp(min=0)
    assert_close(positive / positive.sum(-1, keepdim=True), soft.attention_map(x))


def test_a_bias_of_the_convolution_moves_no_token():
    mixer, x = trained("agent", {"conv": 3})
    matrix = mixing_matrix(mixer, x)
    with torch.no_grad():
        mixer.conv.bias += 1
    assert_close(mixing_matrix(mixer, x), matrix)


def test_more_probes_than_fit_one_pass():
    torch.manual_seed(0)
    mixer = get("nystrom").from_attention(Attention(8, 2).eval(), (9, 9), 1, conv=3)
    assert AT_ONCE < 82
    x = torch.randn(1, 82, 8)
    assert_close(mixing_matrix(mixer, x), mixer.attention_map(x), rtol=1e-4, atol=1e-6)  # a convolution of zeros


def test_nothing_is_left_behind():
    mixer, x = trained("soft", {})
    with torch.no_grad():
        before = mixer(x)
        mixing_matrix(mixer, x)
        assert torch.equal(mixer(x), before)
    for module in mixer.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(ValueError, match="6x10 = 61 tokens, got 60"):
        mixing_matrix(mixer, x[:, 1:])
