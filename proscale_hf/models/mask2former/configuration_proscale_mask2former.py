"""Configuration of PRO-SCALE on the Mask2Former architecture: every hyper-parameter, typed, validated, documented.

Field names are those of transformers' `Mask2FormerConfig` wherever the meaning is the same.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN

from proscale_hf.backbones.presets import backbone_settings
from proscale_hf.encoders.configuration import (
    EncoderConfig,
    check_choice,
    check_minimum,
    check_multiple,
    check_share,
    check_weight,
)
from proscale_hf.models.configuration import ProScaleConfigMixin
from proscale_hf.processing.categories import check_categories


try:
    from proscale_hf.models.mask2former.presets import preset_settings
except ImportError:  # the code that leaves with a model needs no other models' configurations
    preset_settings = None

PIXEL_EMBEDDINGS = ("maxpool", "avgpool", "conv", "none")


@strict
class ProScaleMask2FormerConfig(ProScaleConfigMixin, EncoderConfig):
    r"""
    Configuration of [`ProScaleMask2FormerModel`] and [`ProScaleMask2FormerForUniversalSegmentation`]. The defaults are
    the paper's Swin-T model with stages (3, 3, 3). Backbone and encoder have the fields of [`EncoderConfig`]; here are
    the others.

    Args:
        pixel_embedding (`str`, defaults to `"maxpool"`):
            What makes the per-pixel embedding at stride 4 (paper, section 3.1.1): `"maxpool"` or `"avgpool"` is the
            light pixel embedding, without weights; `"conv"` is Mask2Former's 3x3 convolution. With `"none"` there is
            no map that is the per-pixel embedding's alone: it is a projection of the encoder's finest map, and
            `feature_strides` and the backbone leave out the largest map, as in the paper's RT-M2F.
        mask_padding (`bool`, defaults to `True`):
            With a `pixel_mask`, treat each image of a batch as it would be treated alone: padded to a multiple of
            the largest feature stride, and no further. Its result then does not depend on its batch mates, and the
            loss looks at real pixels only. `False` is the original's behaviour: padding counts as image.
        mask_feature_size (`int`, defaults to 256):
            Channels of the per-pixel embedding.
        hidden_dim (`int`, defaults to 256):
            Channels of the mask decoder, a multiple of 4.
        dim_feedforward (`int`, defaults to 2048):
            Width of the feed-forward blocks in the mask decoder.
        decoder_layers (`int`, defaults to 10):
            Number of predictions of the mask decoder, at least 2: one from the initial queries, then one after each
            of the `decoder_layers - 1` layers.
        pre_norm (`bool`, defaults to `False`):
            Layer norms in front of the mask decoder's blocks instead of behind.
        enforce_input_projection (`bool`, defaults to `False`):
            A 1x1 convolution into the mask decoder even if `feature_size` equals `hidden_dim`.
        num_queries (`int`, defaults to 100):
            Number of object queries.
        activation_function (`str`, defaults to `"relu"`):
            Activation in the mask decoder's feed-forward blocks.
        common_stride (`int`, defaults to 4):
            Stride of the per-pixel embedding and of the masks; the maps of larger strides are the encoder's.
            With `pixel_embedding="none"` the map of this stride is the encoder's too, and the usual value is 8.
        ignore_value (`int`, defaults to 255):
            Value of void pixels in `mask_labels`, 2 to 255; they count in neither matching nor loss.
        no_object_weight (`float`, defaults to 0.1):
            Weight of the "no object" class in the classification loss.
        class_weight (`float`, defaults to 2.0):
            Weight of the classification loss.
        mask_weight (`float`, defaults to 5.0):
            Weight of the mask's binary cross-entropy.
        dice_weight (`float`, defaults to 5.0):
            Weight of the mask's dice loss.
        train_num_points (`int`, defaults to 12544):
            Points per mask at which matching and mask losses are computed.
        oversample_ratio (`float`, defaults to 3.0):
            Candidate points per point in the search for uncertain ones, at least 1.
        importance_sample_ratio (`float`, defaults to 0.75):
            Share of the loss' points taken where the prediction is most uncertain, 0 to 1.
        use_auxiliary_loss (`bool`, defaults to `True`):
            Train every prediction of the mask decoder, not only the last.
        output_auxiliary_logits (`bool`, *optional*):
            Return the earlier predictions as `auxiliary_logits`.
        init_std (`float`, defaults to 0.02):
            Standard deviation for the classification head's initial weights.
        init_xavier_std (`float`, defaults to 1.0):
            Gain of the Xavier initialisation.
        categories (`list[dict]`, *optional*):
            What the labels are in the data set, in label order, as in COCO's panoptic JSON: `"id"` (the data set's
            own, 0 or more), `"name"`, and optionally `"isthing"` (0 or 1) and `"color"` (red, green, blue in 0..255).
            Read it with `category`, which passes over entries that `id2label` no longer names the same.
        weights_license (`str`, *optional*):
            Licence of the weights: an identifier of the Hub's such as `"apache-2.0"`, or words. Stays with weights that
            are trained on from these. Model cards show it.

    Raises:
        ValueError: a field has a value that is not possible; the message names the possible ones.

    Example:

    ```python
    >>> from proscale_hf import ProScaleMask2FormerConfig, ProScaleMask2FormerForUniversalSegmentation

    >>> config = ProScaleMask2FormerConfig(encoder_stage_layers=(1, 1, 3), num_labels=133)
    >>> model = ProScaleMask2FormerForUniversalSegmentation(config)
    ```
    """

    model_type = "proscale_mask2former"
    preset_settings = preset_settings
    auto_classes = {  # noqa: RUF012 - what `auto_map` has beside the configuration, once a model is saved
        "AutoModel": "ProScaleMask2FormerModel",
        "AutoModelForUniversalSegmentation": "ProScaleMask2FormerForUniversalSegmentation",
        "AutoModelForInstanceSegmentation": "ProScaleMask2FormerForUniversalSegmentation",
        # what `pipeline("image-segmentation")` loads with
        "AutoModelForImageSegmentation": "ProScaleMask2FormerForUniversalSegmentation",
    }
    attribute_map = {"hidden_size": "hidden_dim", "num_hidden_layers": "decoder_layers"}  # noqa: RUF012
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "loss_dict",
        "auxiliary_logits",
        "encoder_last_hidden_state",
        "pixel_decoder_last_hidden_state",
        "transformer_decoder_last_hidden_state",
        "encoder_hidden_states",
        "pixel_decoder_hidden_states",
        "transformer_decoder_hidden_states",
        "attentions",
        "cross_attentions",
        "stuff_labels",
    ]

    pixel_embedding: str = "maxpool"
    mask_padding: bool = True
    mask_feature_size: int = 256
    hidden_dim: int = 256
    dim_feedforward: int = 2048
    decoder_layers: int = 10
    pre_norm: bool = False
    enforce_input_projection: bool = False
    num_queries: int = 100
    activation_function: str = "relu"
    common_stride: int = 4
    ignore_value: int = 255
    no_object_weight: float | int = 0.1
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    use_auxiliary_loss: bool = True
    output_auxiliary_logits: bool | None = None
    init_std: float | int = 0.02
    init_xavier_std: float | int = 1.0
    categories: list[dict[str, Any]] | None = None
    weights_license: str | None = None

    def __post_init__(self, **kwargs: Any):
        if self.backbone_config is None:
            self.backbone_config = backbone_settings("swin-t")
        super().__post_init__(**kwargs)

    @property
    def encoder_strides(self) -> tuple[int, ...]:
        """Strides of the maps that the encoder gets, coarse to fine."""
        finest = 0 if self.pixel_embedding == "none" else 1
        return tuple(reversed(self.feature_strides[finest:]))

    def check_values(self) -> None:
        """Refuse what is not possible.

        Raises:
            ValueError: one line that names the field.
        """
        check_choice("pixel_embedding", self.pixel_embedding, PIXEL_EMBEDDINGS)
        strides = list(self.feature_strides)
        if len(strides) < 2 or strides[0] != self.common_stride:
            raise ValueError(
                f"`feature_strides` must grow and begin with `common_stride` ({self.common_stride}), got {strides}."
            )
        super().check_values()
        for name, minimum in (
            ("decoder_layers", 2),
            ("dim_feedforward", 1),
            ("mask_feature_size", 1),
            ("num_queries", 1),
            ("train_num_points", 1),
            ("oversample_ratio", 1),
        ):
            check_minimum(name, getattr(self, name), minimum)
        check_choice("activation_function", self.activation_function, tuple(ACT2FN))
        for name in (
            "class_weight",
            "mask_weight",
            "dice_weight",
            "no_object_weight",
            "init_std",
            "init_xavier_std",
        ):
            check_weight(name, getattr(self, name))
        if not 2 <= self.ignore_value <= 255:
            raise ValueError(
                f"`ignore_value` must lie between 2 and 255 (0 and 1 mean something), got {self.ignore_value}."
            )
        check_share("importance_sample_ratio", self.importance_sample_ratio)
        check_multiple("hidden_dim", self.hidden_dim, 4, "the position embedding: sine and cosine, two axes")
        check_multiple("hidden_dim", self.hidden_dim, self.num_attention_heads, "`num_attention_heads`")
        if self.categories is not None:
            check_categories(self.categories)


__all__ = ["ProScaleMask2FormerConfig"]
