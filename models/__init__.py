"""Provides LambdaNetworks in plain torch: the layer and the family of networks. A copy of the folder works anywhere."""

from models.architecture import Architecture as Architecture
from models.family import create_model as create_model
from models.family import list_models as list_models
from models.fold import fold_batch_norms as fold_batch_norms
from models.lambda_layer import LambdaLayer as LambdaLayer
from models.lambda_resnet import FeaturePyramid as FeaturePyramid
from models.lambda_resnet import LambdaResNet as LambdaResNet
from models.load import load_weights as load_weights
