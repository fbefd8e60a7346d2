"""The small untrained teacher and the images that the tests of the proposed model share."""

import torch

from thesis_lib import backbone
from thesis_lib.perceptual import Metric


def images(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def untrained_teacher() -> Metric:
    torch.manual_seed(0)
    return Metric(backbone.create("demo", "mha", pretrained=False)).requires_grad_(False)
