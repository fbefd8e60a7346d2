import torch

from thesis_lib.attention import Cost
from thesis_lib.attention.identity import Identity


def test_returns_its_input_for_nothing(attention, tokens):
    mixer = Identity.from_attention(attention(), (8, 8), 1)
    assert torch.equal(mixer(tokens()), tokens())
    assert Identity.cost(65, 24, 3) == Cost(0, 0, 0)
    assert torch.equal(mixer.attention_map(tokens())[0, 0], torch.eye(65))
