"""The layer that the encoders with deformable attention are made of."""

from proscale_hf.encoders.configuration import EncoderConfig
from proscale_hf.layers.deformable_encoder import DeformableEncoderLayer


def encoder_layer(config: EncoderConfig, num_levels: int) -> DeformableEncoderLayer:
    """A layer of a configuration's size, for the tokens of `num_levels` maps."""
    return DeformableEncoderLayer(
        config.feature_size,
        config.num_attention_heads,
        num_levels,
        config.encoder_num_points,
        config.encoder_feedforward_dim,
        config.dropout,
    )
