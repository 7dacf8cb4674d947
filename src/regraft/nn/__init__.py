"""The groundwork of deep networks: a leaf package that knows only torch.

initializers   how weights begin
activations    activations by name, and which to choose
standardise    mean and deviation of the training data as the first layer
mlp            stacks of dense layers that train; the conditions of self-normalisation
folding        batch norm into its neighbours, after training
clipping       gradients that stay bounded
summary        what a network is made of
health         what ails a network while it trains
"""

from regraft.nn.activations import Advice, Swish, activation, advise_activation
from regraft.nn.clipping import Clipping, clip_gradients
from regraft.nn.folding import fold_batchnorm, unfolded
from regraft.nn.health import Health, Illness, LayerHealth, Watch, watch
from regraft.nn.initializers import (
    glorot_normal_,
    glorot_uniform_,
    he_normal_,
    he_uniform_,
    initialize_,
    lecun_normal_,
    lecun_uniform_,
    variance_scaling_,
)
from regraft.nn.mlp import check_selu, mlp
from regraft.nn.standardise import Standardise
from regraft.nn.summary import LayerFacts, Summary, summary

__all__ = [
    "Advice",
    "Clipping",
    "Health",
    "Illness",
    "LayerFacts",
    "LayerHealth",
    "Standardise",
    "Summary",
    "Swish",
    "Watch",
    "activation",
    "advise_activation",
    "check_selu",
    "clip_gradients",
    "fold_batchnorm",
    "glorot_normal_",
    "glorot_uniform_",
    "he_normal_",
    "he_uniform_",
    "initialize_",
    "lecun_normal_",
    "lecun_uniform_",
    "mlp",
    "summary",
    "unfolded",
    "variance_scaling_",
    "watch",
]
