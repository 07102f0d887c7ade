"""The interchangeable encoders, by their name in the configuration.

Each takes and gives a list of (batch, channels, height, width) maps, coarse to fine.
"""

from torch import nn

from proscale_hf.encoders.configuration import EncoderConfig
from proscale_hf.encoders.lite import LiteEncoder
from proscale_hf.encoders.mask2former import Mask2FormerEncoder
from proscale_hf.encoders.proscale import ProScaleEncoder
from proscale_hf.encoders.rt import RTEncoder


ENCODER_CLASSES = {
    "proscale": ProScaleEncoder,
    "mask2former": Mask2FormerEncoder,
    "lite": LiteEncoder,
    "rt": RTEncoder,
}
SAME_LAYERS = {"dino": "mask2former"}  # under the name of each paper


def build_encoder(config: EncoderConfig) -> nn.Module:
    """The encoder that a configuration names."""
    return ENCODER_CLASSES[SAME_LAYERS.get(config.encoder, config.encoder)](config)
