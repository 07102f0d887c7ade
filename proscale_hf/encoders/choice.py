"""The interchangeable encoders of the pixel decoder, by their name in the configuration.

Each takes and gives a list of (batch, channels, height, width) maps, coarse to fine.
"""

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
