"""The interchangeable encoders of the pixel decoder, by their name in the configuration.

Each takes and gives a list of (batch, channels, height, width) maps, coarse to fine.
"""

from .encoder_lite import LiteEncoder
from .encoder_mask2former import Mask2FormerEncoder
from .encoder_proscale import ProScaleEncoder
from .encoder_rt import RTEncoder


ENCODER_CLASSES = {
    "proscale": ProScaleEncoder,
    "mask2former": Mask2FormerEncoder,
    "lite": LiteEncoder,
    "rt": RTEncoder,
}
