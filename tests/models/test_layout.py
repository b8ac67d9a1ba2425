import torch
from torch import nn

from models import create_model
from models.memory_format import channels_last


def test_convolutions_of_two_dimensions_are_laid_out_and_all_else_stays():
    with torch.device("meta"):
        model = nn.Sequential(create_model("lambda_resnet_tiny", num_classes=3), nn.Conv3d(4, 4, (3, 3, 1)))
    before = {name: p.stride() for name, p in model.named_parameters()}
    channels_last(model)
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert convolutions
    for name, p in model.named_parameters():
        if id(p) in convolutions:
            assert p.is_contiguous(memory_format=torch.channels_last), name
        else:
            assert p.stride() == before[name], name
