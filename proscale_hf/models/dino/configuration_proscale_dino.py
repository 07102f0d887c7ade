"""Configuration of DINO detection with PRO-SCALE: every hyper-parameter, typed, validated, documented.

Field names are those of transformers' detectors (Deformable DETR, RT-DETR) wherever the meaning is the same.
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from proscale_hf.backbones.presets import backbone_settings
from proscale_hf.encoders.configuration import (
    EncoderConfig,
    check_choice,
    check_minimum,
    check_share,
    check_weight,
)
from proscale_hf.models.configuration import ProScaleConfigMixin
from proscale_hf.processing.categories import check_categories


try:
    from proscale_hf.models.dino.presets import preset_settings
except ImportError:  # the code that leaves with a model needs no other models' configurations
    preset_settings = None

BATCH_PADDINGS = ("per_image", "original")


@strict
class ProScaleDinoConfig(ProScaleConfigMixin, EncoderConfig):
    r"""
    Configuration of [`ProScaleDinoModel`] and [`ProScaleDinoForObjectDetection`]. The defaults are the paper's
    ResNet-50 model with four scales and stages (3, 3, 3, 3). Backbone and encoder have the fields of
    [`EncoderConfig`], with other defaults where DINO has others; here are the others. `feature_size` is the number of
    channels of encoder and decoder. Encoders are `"proscale"`, `"dino"` (all tokens in every layer) and `"lite"`.

    Args:
        num_feature_levels (`int`, defaults to 4):
            Number of maps that the encoder gets, at least as many as the backbone gives. Further ones, each at twice
            the stride of the one before, are made from the coarsest by convolutions.
        freeze_backbone_stem (`bool`, defaults to `True`):
            Keep the stem and the first stage of the backbone out of training if it is a ResNet.
        position_temperature (`float`, defaults to 20.0):
            Ratio of the longest wavelength to the shortest one in the position embedding of the maps.
        batch_padding (`str`, defaults to `"per_image"`):
            What a `pixel_mask` does to a batch of images of several sizes. `"per_image"`: each image passes through
            backbone and encoder at its own size, so its result does not depend on its batch mates. `"original"`: as in
            the original, the padded images pass through, padding is masked in attention, and the positions of queries
            are measured in the padded image; weights trained that way may depend on it.
        num_queries (`int`, defaults to 900):
            Number of objects that the decoder looks for. An image with fewer tokens has as many queries as tokens.
        decoder_layers (`int`, defaults to 6):
            Number of decoder layers. Each refines the boxes.
        decoder_num_points (`int`, defaults to 4):
            Sampling points per head and level of the decoder's deformable attention.
        decoder_feedforward_dim (`int`, defaults to 2048):
            Width of the feed-forward blocks in the decoder.
        num_denoising (`int`, defaults to 100):
            About how many denoising queries of each kind, near objects and farther from them, training adds; as in the
            original, numbers below 50 are numbers of groups, two for each. 0 for none.
        label_noise_ratio (`float`, defaults to 0.5):
            Half of this share of denoising queries gets a random class.
        box_noise_scale (`float`, defaults to 1.0):
            How far the corners of denoising boxes are moved, in halves of the box's size.
        auxiliary_loss (`bool`, defaults to `True`):
            Train the predictions of all decoder layers, not only the last one's.
        output_auxiliary_logits (`bool`, *optional*):
            Return the earlier layers' predictions as `auxiliary_outputs`.
        class_cost (`float`, defaults to 2.0):
            Weight of the class in matching.
        bbox_cost (`float`, defaults to 5.0):
            Weight of the L1 distance of boxes in matching.
        giou_cost (`float`, defaults to 2.0):
            Weight of the generalised intersection over union in matching.
        class_loss_coefficient (`float`, defaults to 1.0):
            Weight of the focal loss.
        bbox_loss_coefficient (`float`, defaults to 5.0):
            Weight of the L1 loss of boxes.
        giou_loss_coefficient (`float`, defaults to 2.0):
            Weight of the generalised intersection over union loss.
        two_stage_loss_coefficient (`float`, defaults to 1.0):
            Factor for the losses of the prediction that chooses the queries.
        focal_alpha (`float`, defaults to 0.25):
            Weight of an object in the focal loss, 0 to 1.
        categories (`list[dict]`, *optional*):
            What the labels are in the data set, in label order, as in COCO's JSON: `"id"` (the data set's own, 0 or
            more), `"name"`, and optionally `"color"` (red, green, blue in 0..255). Read it with `category`, which
            passes over entries that `id2label` no longer names the same.
        weights_license (`str`, *optional*):
            Licence of the weights: an identifier of the Hub's such as `"apache-2.0"`, or words. Stays with weights that
            are trained on from these. Model cards show it.

    Raises:
        ValueError: a field has a value that is not possible; the message names the possible ones.

    Example:

    ```python
    >>> from proscale_hf import ProScaleDinoConfig, ProScaleDinoForObjectDetection

    >>> config = ProScaleDinoConfig(encoder_stage_layers=(1, 1, 1, 3), num_labels=80)
    >>> model = ProScaleDinoForObjectDetection(config)
    ```
    """

    model_type = "proscale_dino"
    preset_settings = preset_settings
    encoders = ("proscale", "dino", "lite")
    auto_classes = {  # noqa: RUF012 - what `auto_map` has beside the configuration, once a model is saved
        "AutoModel": "ProScaleDinoModel",
        "AutoModelForObjectDetection": "ProScaleDinoForObjectDetection",
    }
    attribute_map = {  # noqa: RUF012
        "hidden_size": "feature_size",
        "d_model": "feature_size",
        "num_hidden_layers": "decoder_layers",
    }
    keys_to_ignore_at_inference = [  # noqa: RUF012 - scripts for transformers' detectors count on `loss_dict`
        "auxiliary_outputs",
        "last_hidden_state",
        "intermediate_hidden_states",
        "intermediate_reference_points",
        "enc_topk_logits",
        "enc_topk_bboxes",
        "encoder_last_hidden_state",
        "backbone_feature_maps",
        "decoder_hidden_states",
        "decoder_attentions",
    ]

    feature_strides: list[int] | tuple[int, ...] = (8, 16, 32)
    encoder_stage_layers: list[int] | tuple[int, ...] = (3, 3, 3, 3)
    encoder_feedforward_dim: int = 2048
    num_feature_levels: int = 4
    freeze_backbone_stem: bool = True
    position_temperature: float | int = 20.0
    batch_padding: str = "per_image"
    num_queries: int = 900
    decoder_layers: int = 6
    decoder_num_points: int = 4
    decoder_feedforward_dim: int = 2048
    num_denoising: int = 100
    label_noise_ratio: float | int = 0.5
    box_noise_scale: float | int = 1.0
    auxiliary_loss: bool = True
    output_auxiliary_logits: bool | None = None
    class_cost: float | int = 2.0
    bbox_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    class_loss_coefficient: float | int = 1.0
    bbox_loss_coefficient: float | int = 5.0
    giou_loss_coefficient: float | int = 2.0
    two_stage_loss_coefficient: float | int = 1.0
    focal_alpha: float | int = 0.25
    categories: list[dict[str, Any]] | None = None
    weights_license: str | None = None

    def __post_init__(self, **kwargs: Any):
        if self.backbone_config is None:
            self.backbone_config = backbone_settings("r50", maps=len(self.feature_strides))
        super().__post_init__(**kwargs)

    @property
    def encoder_strides(self) -> tuple[int, ...]:
        """Strides of the maps that the encoder gets, coarse to fine."""
        strides = list(self.feature_strides)
        while len(strides) < self.num_feature_levels:
            strides.append(2 * strides[-1])
        return tuple(reversed(strides))

    def check_values(self) -> None:
        """Refuse what is not possible.

        Raises:
            ValueError: one line that names the field.
        """
        check_choice("batch_padding", self.batch_padding, BATCH_PADDINGS)
        check_minimum("num_feature_levels", self.num_feature_levels, len(self.feature_strides))
        super().check_values()
        for name in ("num_queries", "decoder_layers", "decoder_num_points", "decoder_feedforward_dim"):
            check_minimum(name, getattr(self, name), 1)
        check_minimum("num_denoising", self.num_denoising, 0)
        for name in (
            "box_noise_scale",
            "class_cost",
            "bbox_cost",
            "giou_cost",
            "class_loss_coefficient",
            "bbox_loss_coefficient",
            "giou_loss_coefficient",
            "two_stage_loss_coefficient",
        ):
            check_weight(name, getattr(self, name))
        check_share("label_noise_ratio", self.label_noise_ratio)
        check_share("focal_alpha", self.focal_alpha)
        if not 0 < self.position_temperature < float("inf"):
            raise ValueError(f"`position_temperature` must be a number above 0, got {self.position_temperature}.")
        if self.categories is not None:
            check_categories(self.categories)


__all__ = ["ProScaleDinoConfig"]
