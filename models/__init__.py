"""LambdaNetworks in plain torch: the layer and the family. Copy the folder elsewhere and it works."""

from models.family import create_model as create_model
from models.family import list_models as list_models
from models.lambda_layer import LambdaLayer as LambdaLayer
from models.lambda_resnet import Architecture as Architecture
from models.lambda_resnet import LambdaResNet as LambdaResNet
from models.load import load_weights as load_weights
