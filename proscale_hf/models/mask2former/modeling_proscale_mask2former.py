"""PRO-SCALE on the Mask2Former architecture, as a Transformers model (https://arxiv.org/abs/2404.14657).

pixels -> pixel-level module { backbone -> pixel decoder } -> mask decoder -> class and mask logits. What varies, the
encoder, stands in files of its own; see `encoders/choice.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from proscale_hf.layers.linear import Linear
from proscale_hf.losses.segmentation import UniversalSegmentationLoss
from proscale_hf.models.base import ProScalePreTrainedModel
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.mask_decoder import (
    MaskDecoder,
    predict_masks,
)
from proscale_hf.models.mask2former.pixel_level_module import PixelLevelModule
from proscale_hf.models.mask_labels import packed_labels
from proscale_hf.models.padding import pad_to_stride, prepare_images


try:
    from proscale_hf.models.mask2former.cost import measure_cost
except ImportError:  # only model cards have costs, and only the installed package writes them
    measure_cost = None


@dataclass
class ProScaleMask2FormerModelOutput(ModelOutput):
    """Output of [`ProScaleMask2FormerModel`].

    Attributes:
        transformer_decoder_last_hidden_state: (batch, queries, hidden_dim), the queries after the last layer.
        pixel_decoder_last_hidden_state: (batch, mask_feature_size, height / 4, width / 4), the per-pixel embedding.
        encoder_last_hidden_state: (batch, channels, height / 32, width / 32), the backbone's coarsest map.
        masks_queries_logits: (batch, queries, height / 4, width / 4), masks of the last prediction.
        encoder_hidden_states: the backbone's maps, fine to coarse; with `output_hidden_states`.
        pixel_decoder_hidden_states: the enhanced maps, coarse to fine; with `output_hidden_states`.
        transformer_decoder_hidden_states: the queries before the first and after each layer, (batch, queries,
            hidden_dim) each; with `output_hidden_states`.
        query_states: the normalised queries behind each prediction, first to last; with `output_predictions`.
        mask_embeddings: (predictions, batch, queries, mask_feature_size), whose products with the per-pixel embedding
            are the masks of each prediction, first to last; with `output_predictions`.
        attentions: self-attention weights per layer, (batch, heads, queries, queries); with `output_attentions`.
        cross_attentions: cross-attention weights per layer, (batch, heads, queries, tokens); with `output_attentions`.
        image_sizes: (batch, 2) int64, height and width of each image without padding; None if it was not given.
        padded_sizes: (batch, 2) int64, height and width of the padded batch, once for each image.
    """

    transformer_decoder_last_hidden_state: torch.Tensor | None = None
    pixel_decoder_last_hidden_state: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    query_states: tuple[torch.Tensor, ...] | None = None
    mask_embeddings: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    image_sizes: torch.Tensor | None = None
    padded_sizes: torch.Tensor | None = None


@dataclass
class ProScaleMask2FormerForUniversalSegmentationOutput(ModelOutput):
    """Output of [`ProScaleMask2FormerForUniversalSegmentation`], for the image processor's `post_process_*` methods.

    Attributes:
        loss: scalar, with labels.
        class_queries_logits: (batch, queries, num_labels + 1), the last entry is "no object".
        masks_queries_logits: (batch, queries, height / 4, width / 4).
        image_sizes: (batch, 2) int64, height and width of each image without padding; None if it was not given.
        padded_sizes: (batch, 2) int64, height and width of the padded batch, once for each image.
        loss_dict: the loss's unweighted terms; with labels.
        auxiliary_logits: the earlier predictions, first to last, as dicts with `class_queries_logits` and
            `masks_queries_logits`; with `output_auxiliary_logits`.
        encoder_last_hidden_state: as in [`ProScaleMask2FormerModelOutput`], and so are the following.
        pixel_decoder_last_hidden_state: see there.
        transformer_decoder_last_hidden_state: see there.
        encoder_hidden_states: see there.
        pixel_decoder_hidden_states: see there.
        transformer_decoder_hidden_states: see there.
        attentions: see there.
        cross_attentions: see there.
        stuff_labels: (batch, num_labels) bool, which labels are stuff and no things; None if `categories` of the
            configuration does not say.
    """

    loss: torch.Tensor | None = None
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    padded_sizes: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    auxiliary_logits: list[dict[str, torch.Tensor]] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    pixel_decoder_last_hidden_state: torch.Tensor | None = None
    transformer_decoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    stuff_labels: torch.Tensor | None = None


class ProScaleMask2FormerPreTrainedModel(ProScalePreTrainedModel):
    """What the models here have in common: their configuration, their cost and their initial weights."""

    config_class = ProScaleMask2FormerConfig
    _no_split_modules = [  # noqa: RUF012 - as transformers has it
        "DeformableEncoderLayer",
        "IntraScaleLayer",
        "Fusion",
        "MaskedAttentionLayer",
    ]

    @classmethod
    def measure_cost(cls, config: ProScaleMask2FormerConfig, height: int, width: int) -> Any:
        """What one image of this height and width, in pixels, costs the segmentation model of a configuration."""
        return measure_cost(ProScaleMask2FormerForUniversalSegmentation, config, height, width)

    def init_layer(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Mask2Former's convolutions begin otherwise than its linear layers."""
        if isinstance(layer, nn.Conv2d):
            init.kaiming_uniform_(layer.weight, a=1)
        else:
            init.xavier_uniform_(layer.weight, gain=self.config.init_xavier_std)


class ClassPredictor(Linear):
    """Class logits of a query, the last one "no object".

    Args:
        channels: of the queries.
        num_classes: with "no object".
        std: standard deviation of the weights at the beginning.
    """

    def __init__(self, channels: int, num_classes: int, std: float):
        self.std = std
        super().__init__(channels, num_classes)

    def reset_parameters(self) -> None:
        """Normal weights, no bias."""
        init.normal_(self.weight, std=self.std)
        init.zeros_(self.bias)


class ProScaleMask2FormerModel(ProScaleMask2FormerPreTrainedModel):
    """Backbone, pixel decoder and mask decoder, without the classification head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__(config)
        self.pixel_level_module = PixelLevelModule(config)
        self.transformer_module = MaskDecoder(config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_predictions: bool = False,
        return_dict: bool | None = None,
        image_sizes: torch.Tensor | None = None,
    ) -> ProScaleMask2FormerModelOutput | tuple:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised.
            pixel_mask: (batch, height, width), 1 = image, 0 = padding at the bottom and right; read if
                `config.mask_padding`, and the batch is padded on to multiples of the largest stride then.
            output_hidden_states: return all hidden states; default from the configuration.
            output_attentions: return the mask decoder's attention weights; default from the configuration.
            output_predictions: return what the heads need for the earlier predictions too.
            return_dict: a [`ProScaleMask2FormerModelOutput`] rather than a tuple; default from the configuration.
            image_sizes: instead of `pixel_mask`: (batch, 2), height and width of each image without padding.

        Returns:
            [`ProScaleMask2FormerModelOutput`], or its fields that are not None as a tuple.

        Raises:
            ValueError: empty batch or sizes that do not agree.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        return_dict = config.return_dict if return_dict is None else return_dict
        batch = prepare_images(pixel_values, pixel_mask, image_sizes, config.feature_strides[-1], config.mask_padding)
        sizes_alone, valid_sizes = None, None
        if batch.sizes_alone is not None:
            valid_sizes = [-(-batch.sizes_alone // stride) for stride in config.encoder_strides]
            # A compiled graph cannot depend on the sizes' values: there the pixel level sees the padding as image.
            if not torch.compiler.is_compiling():
                sizes_alone = [tuple(size) for size in batch.sizes_alone.tolist()]
        pixels = self.pixel_level_module(batch.pixel_values.to(self.dtype), sizes_alone)
        decoded = self.transformer_module(
            pixels.multi_scale_features, pixels.mask_features, valid_sizes, output_attentions
        )
        output = ProScaleMask2FormerModelOutput(
            transformer_decoder_last_hidden_state=decoded.query_states[-1],
            pixel_decoder_last_hidden_state=pixels.mask_features,
            encoder_last_hidden_state=pixels.backbone_maps[-1],
            masks_queries_logits=predict_masks(decoded.mask_embeddings[-1], pixels.mask_features),
            encoder_hidden_states=pixels.backbone_maps if output_hidden_states else None,
            pixel_decoder_hidden_states=pixels.multi_scale_features if output_hidden_states else None,
            transformer_decoder_hidden_states=decoded.hidden_states if output_hidden_states else None,
            query_states=decoded.query_states if output_predictions else None,
            mask_embeddings=torch.stack(decoded.mask_embeddings) if output_predictions else None,
            attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            image_sizes=batch.image_sizes,
            padded_sizes=batch.padded_sizes,
        )
        return output if return_dict else output.to_tuple()


class ProScaleMask2FormerForUniversalSegmentation(ProScaleMask2FormerPreTrainedModel):
    """The model with heads for panoptic, instance and semantic segmentation.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__(config)
        self.model = ProScaleMask2FormerModel(config)
        self.class_predictor = ClassPredictor(config.hidden_dim, config.num_labels + 1, config.init_std)
        self.criterion = UniversalSegmentationLoss(
            num_labels=config.num_labels,
            no_object_weight=config.no_object_weight,
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            num_points=config.train_num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_sample_ratio,
        )
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        mask_labels: list[torch.Tensor] | None = None,
        class_labels: list[torch.Tensor] | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        packed_masks: list[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | None = None,
    ) -> ProScaleMask2FormerForUniversalSegmentationOutput | tuple:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised.
            mask_labels: per image (objects, height, width) at the size of the padded batch; 1 = object, 0 = not,
                `config.ignore_value` = void; what one of an image's masks calls void is void for all of them.
            class_labels: per image (objects,) integers.
            pixel_mask: (batch, height, width), 1 = image, 0 = padding at the bottom and right.
            output_hidden_states: return all hidden states; default from the configuration.
            output_auxiliary_logits: return the earlier predictions; default from the configuration.
            output_attentions: return the mask decoder's attention weights; default from the configuration.
            return_dict: a dataclass rather than a tuple; default from the configuration.
            packed_masks: instead of `mask_labels`, and with the same loss: per image (planes, height, width) uint8,
                one bit per object and pixel, see `packed_masks.py`.
            image_sizes: instead of `pixel_mask`: (batch, 2), height and width of each image without padding.

        Returns:
            [`ProScaleMask2FormerForUniversalSegmentationOutput`], or its fields that are not None as a tuple.

        Raises:
            ValueError: empty batch, sizes that do not agree, labels that cannot be right.
        """
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_auxiliary_logits is None:
            output_auxiliary_logits = config.output_auxiliary_logits
        packed_masks = packed_labels(mask_labels, packed_masks, class_labels, pixel_values, config.ignore_value)

        outputs = self.model(
            pixel_values,
            pixel_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_predictions=packed_masks is not None or output_auxiliary_logits,
            return_dict=True,
            image_sizes=image_sizes,
        )
        query_states = outputs.query_states or [outputs.transformer_decoder_last_hidden_state]
        class_logits = self.class_predictor(torch.stack(tuple(query_states)))  # (predictions, batch, queries, labels)
        loss_dict = None
        if packed_masks is not None:
            loss_dict = self.losses(class_logits, outputs, packed_masks, class_labels)

        output = ProScaleMask2FormerForUniversalSegmentationOutput(
            loss=None if loss_dict is None else self.criterion.weighted_sum(loss_dict),
            class_queries_logits=class_logits[-1],
            masks_queries_logits=outputs.masks_queries_logits,
            image_sizes=outputs.image_sizes,
            padded_sizes=outputs.padded_sizes,
            loss_dict=loss_dict,
            auxiliary_logits=earlier_predictions(class_logits, outputs) if output_auxiliary_logits else None,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=outputs.pixel_decoder_last_hidden_state,
            transformer_decoder_last_hidden_state=outputs.transformer_decoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            pixel_decoder_hidden_states=outputs.pixel_decoder_hidden_states,
            transformer_decoder_hidden_states=outputs.transformer_decoder_hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            stuff_labels=self.stuff_labels(len(pixel_values)),
        )
        return output if return_dict else output.to_tuple()

    def stuff_labels(self, batch: int) -> torch.Tensor | None:
        """(batch, num_labels) bool, which labels are stuff; None if the configuration does not say."""
        stuff = self.config.stuff_label_ids()
        if stuff is None:
            return None
        flags = [label in stuff for label in range(self.config.num_labels)]
        return torch.tensor(flags, device=self.device).expand(batch, -1)

    def losses(
        self,
        class_logits: torch.Tensor,
        outputs: ProScaleMask2FormerModelOutput,
        packed_masks: list[torch.Tensor],
        class_labels: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The loss's unweighted terms, for labels as [`forward`] takes them, packed."""
        config = self.config
        first = 0 if config.use_auxiliary_loss else -1
        extents = None
        if config.mask_padding and outputs.image_sizes is not None:
            packed_masks = [pad_to_stride(planes, config.feature_strides[-1]) for planes in packed_masks]
            extents = outputs.image_sizes / outputs.padded_sizes
        masks = outputs.mask_embeddings[first:], outputs.pixel_decoder_last_hidden_state
        return self.criterion(class_logits[first:], *masks, packed_masks, class_labels, extents)


def earlier_predictions(
    class_logits: torch.Tensor, outputs: ProScaleMask2FormerModelOutput
) -> list[dict[str, torch.Tensor]]:
    """All predictions but the last, as `auxiliary_logits` has them."""
    return [
        {
            "class_queries_logits": classes,
            "masks_queries_logits": predict_masks(embeddings, outputs.pixel_decoder_last_hidden_state),
        }
        for classes, embeddings in zip(class_logits[:-1], outputs.mask_embeddings[:-1], strict=True)
    ]


__all__ = [
    "ProScaleMask2FormerForUniversalSegmentation",
    "ProScaleMask2FormerModel",
    "ProScaleMask2FormerPreTrainedModel",
]
