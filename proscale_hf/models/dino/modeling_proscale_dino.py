"""DINO detection (https://arxiv.org/abs/2203.03605) with PRO-SCALE (https://arxiv.org/abs/2404.14657, table 8).

pixels -> pixel encoder { backbone -> feature levels -> encoder } -> query selection -> box decoder -> class logits and
boxes. What varies, the encoder, stands in files of its own; see `encoders/choice.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from proscale_hf.losses.detection import DenoisingTargets, DetectionLoss, Detections
from proscale_hf.models.base import ProScalePreTrainedModel
from proscale_hf.models.detection_labels import checked_detection_labels
from proscale_hf.models.dino.box_decoder import BoxDecoder
from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig
from proscale_hf.models.dino.denoising import ContrastiveDenoising, DenoisingQueries, attention_between
from proscale_hf.models.dino.heads import ClassHead
from proscale_hf.models.dino.pixel_encoder import EncodedPixels, PixelEncoder
from proscale_hf.models.dino.query_selection import ABSENT, QuerySelection, SelectedQueries
from proscale_hf.models.padding import ImageBatch, mask_of_sizes, prepare_images


try:
    from proscale_hf.models.dino.cost import measure_cost
except ImportError:  # only model cards have costs, and only the installed package writes them
    measure_cost = None


@dataclass
class ProScaleDinoModelOutput(ModelOutput):
    """Output of [`ProScaleDinoModel`]. Boxes are centre and size, as shares of the image without padding.

    Attributes:
        last_hidden_state: (batch, queries, feature_size), the normalised queries after the last layer.
        pred_boxes: (batch, queries, 4) float32, the last layer's boxes.
        intermediate_hidden_states: (batch, layers, queries, feature_size), the normalised queries after each layer.
        intermediate_boxes: (batch, layers, queries, 4) float32, the boxes that each layer predicts.
        intermediate_reference_points: (batch, layers, queries, 4) float32, the boxes that each layer looked around.
        enc_topk_logits: (batch, queries, num_labels), what the tokens that queries come from say about classes.
        enc_topk_bboxes: (batch, queries, 4) float32, their boxes, where queries begin.
        encoder_last_hidden_state: (batch, tokens, feature_size), the enhanced tokens, coarse to fine.
        absent_queries: (batch, queries) bool, True where an image has fewer tokens than there are queries.
        denoising_hidden_states: as `intermediate_hidden_states`, of denoising queries; in training with labels.
        denoising_boxes: as `intermediate_boxes`, of denoising queries; in training with labels.
        denoising_targets: what they should find; in training with labels.
        backbone_feature_maps: (batch, channels, height, width) each, fine to coarse; with `output_hidden_states`.
        decoder_hidden_states: the queries before the first and after each layer, (batch, queries, feature_size) each,
            denoising queries first; with `output_hidden_states`.
        decoder_attentions: self-attention weights per layer, (batch, heads, queries, queries), denoising queries
            first; with `output_attentions`.
        image_sizes: (batch, 2) int64, height and width of each image without padding; None if it was not given.
        padded_sizes: (batch, 2) int64, height and width of the padded batch, once for each image.
    """

    last_hidden_state: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    intermediate_boxes: torch.Tensor | None = None
    intermediate_reference_points: torch.Tensor | None = None
    enc_topk_logits: torch.Tensor | None = None
    enc_topk_bboxes: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    absent_queries: torch.Tensor | None = None
    denoising_hidden_states: torch.Tensor | None = None
    denoising_boxes: torch.Tensor | None = None
    denoising_targets: DenoisingTargets | None = None
    backbone_feature_maps: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    image_sizes: torch.Tensor | None = None
    padded_sizes: torch.Tensor | None = None


@dataclass
class ProScaleDinoForObjectDetectionOutput(ModelOutput):
    """Output of [`ProScaleDinoForObjectDetection`], for the image processor's `post_process_object_detection`.

    Attributes:
        loss: scalar, with labels.
        loss_dict: the loss's unweighted terms; with labels.
        logits: (batch, queries, num_labels), one for each class; there is no "no object".
        pred_boxes: (batch, queries, 4) float32, centre and size, as shares of the image without padding.
        auxiliary_outputs: the earlier layers' predictions, first to last, as dicts with `logits` and `pred_boxes`; with
            `output_auxiliary_logits`.
        last_hidden_state: as in [`ProScaleDinoModelOutput`], and so are the following.
        intermediate_hidden_states: see there.
        intermediate_reference_points: see there.
        enc_topk_logits: see there.
        enc_topk_bboxes: see there.
        encoder_last_hidden_state: see there.
        backbone_feature_maps: see there.
        decoder_hidden_states: see there.
        decoder_attentions: see there.
        image_sizes: see there.
        padded_sizes: see there.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    intermediate_reference_points: torch.Tensor | None = None
    enc_topk_logits: torch.Tensor | None = None
    enc_topk_bboxes: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    backbone_feature_maps: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    image_sizes: torch.Tensor | None = None
    padded_sizes: torch.Tensor | None = None


class ProScaleDinoPreTrainedModel(ProScalePreTrainedModel):
    """What the models here have in common: their configuration and their cost."""

    config_class = ProScaleDinoConfig
    _no_split_modules = ["DeformableEncoderLayer", "BoxDecoderLayer"]  # noqa: RUF012 - as transformers has it

    @classmethod
    def measure_cost(cls, config: ProScaleDinoConfig, height: int, width: int) -> Any:
        """What one image of this height and width, in pixels, costs the detection model of a configuration."""
        return measure_cost(ProScaleDinoForObjectDetection, config, height, width)


class ProScaleDinoModel(ProScaleDinoPreTrainedModel):
    """Everything but the decoder's class logits, and the loss.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleDinoConfig):
        super().__init__(config)
        self.pixel_encoder = PixelEncoder(config)
        self.query_selection = QuerySelection(config)
        self.denoising = ContrastiveDenoising(config) if config.num_denoising else None
        self.decoder = BoxDecoder(config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        image_sizes: torch.Tensor | None = None,
    ) -> ProScaleDinoModelOutput | tuple:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised.
            pixel_mask: (batch, height, width), 1 = image, 0 = padding at the bottom and right.
            labels: as in [`ProScaleDinoForObjectDetection.forward`]; in training, they make denoising queries.
            output_hidden_states: return all hidden states; default from the configuration.
            output_attentions: return the decoder's attention weights; default from the configuration.
            return_dict: a [`ProScaleDinoModelOutput`] rather than a tuple; default from the configuration.
            image_sizes: instead of `pixel_mask`: (batch, 2), height and width of each image without padding.

        Returns:
            [`ProScaleDinoModelOutput`], or its fields that are not None as a tuple.

        Raises:
            ValueError: empty batch, sizes that do not agree, labels that cannot be right.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        return_dict = config.return_dict if return_dict is None else return_dict
        batch = prepare_images(pixel_values, pixel_mask, image_sizes, 1, config.batch_padding == "per_image")
        encoded = self.encode(batch, pixel_mask)
        selected = self.query_selection(encoded.tokens, encoded.grid)
        denoising = self.denoising_queries(labels, pixel_values)
        number = 0 if denoising is None else denoising.content.shape[1]
        content, box_logits, attend = all_queries(selected, denoising)
        decoded = self.decoder(content, box_logits.sigmoid(), encoded.tokens, encoded.grid, attend, output_attentions)
        query_states, boxes, reference_boxes = (
            values.transpose(0, 1) for values in (decoded.query_states, decoded.boxes, decoded.reference_boxes)
        )  # (batch, layers, queries, ...)
        output = ProScaleDinoModelOutput(
            last_hidden_state=query_states[:, -1, number:],
            pred_boxes=boxes[:, -1, number:],
            intermediate_hidden_states=query_states[:, :, number:],
            intermediate_boxes=boxes[:, :, number:],
            intermediate_reference_points=reference_boxes[:, :, number:],
            enc_topk_logits=selected.logits,
            enc_topk_bboxes=selected.box_logits.sigmoid(),
            encoder_last_hidden_state=encoded.tokens,
            absent_queries=selected.absent,
            denoising_hidden_states=None if denoising is None else query_states[:, :, :number],
            denoising_boxes=None if denoising is None else boxes[:, :, :number],
            denoising_targets=None if denoising is None else denoising.targets,
            backbone_feature_maps=encoded.backbone_maps if output_hidden_states else None,
            decoder_hidden_states=decoded.hidden_states if output_hidden_states else None,
            decoder_attentions=decoded.attentions,
            image_sizes=batch.image_sizes,
            padded_sizes=batch.padded_sizes,
        )
        return output if return_dict else output.to_tuple()

    def encode(self, batch: ImageBatch, pixel_mask: torch.Tensor | None) -> EncodedPixels:
        """Pixels -> enhanced tokens, with padding kept out as the configuration says."""
        pixel_values = batch.pixel_values.to(self.dtype)
        if pixel_mask is None and batch.image_sizes is not None:
            pixel_mask = mask_of_sizes(batch.image_sizes, *pixel_values.shape[-2:])
        # A compiled graph cannot depend on the sizes' values: there padding is masked.
        if batch.sizes_alone is None or torch.compiler.is_compiling():
            return self.pixel_encoder(pixel_values, pixel_mask)
        return self.pixel_encoder(pixel_values, sizes_alone=[tuple(size) for size in batch.sizes_alone.tolist()])

    def denoising_queries(
        self, labels: list[dict[str, torch.Tensor]] | None, pixel_values: torch.Tensor
    ) -> DenoisingQueries | None:
        """Those that the labels make in training."""
        if labels is None or self.denoising is None or not self.training:
            return None
        return self.denoising(
            *checked_detection_labels(labels, len(pixel_values), self.config.num_labels, pixel_values.device)
        )


def all_queries(
    selected: SelectedQueries, denoising: DenoisingQueries | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Returns:
        (batch, queries, channels) what all queries hold at first; (batch, queries, 4) the logits of their boxes; and
        (1 or batch, 1, 1 or queries, queries) bool, who sees whom, None for everybody. Denoising queries are first.
    """
    content, box_logits = selected.content, selected.box_logits.detach()
    attend = None
    if denoising is not None:
        content = torch.cat((denoising.content, content), dim=1)
        attend = attention_between(denoising.group, box_logits.shape[1])[None, None]
        box_logits = torch.cat((denoising.box_logits, box_logits), dim=1)
    if selected.absent is not None:
        present = nn.functional.pad(~selected.absent, (content.shape[1] - selected.absent.shape[1], 0), value=True)
        present = present[:, None, None]  # (batch, 1, 1, queries)
        attend = present if attend is None else attend & present
    return content, box_logits, attend


class ProScaleDinoForObjectDetection(ProScaleDinoPreTrainedModel):
    """The model with the decoder's class logits, and the loss.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleDinoConfig):
        super().__init__(config)
        self.model = ProScaleDinoModel(config)
        self.class_head = ClassHead(config.feature_size, config.num_labels)
        self.criterion = DetectionLoss(
            num_labels=config.num_labels,
            class_cost=config.class_cost,
            bbox_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            class_weight=config.class_loss_coefficient,
            bbox_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            two_stage_weight=config.two_stage_loss_coefficient,
            focal_alpha=config.focal_alpha,
        )
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        image_sizes: torch.Tensor | None = None,
    ) -> ProScaleDinoForObjectDetectionOutput | tuple:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised.
            pixel_mask: (batch, height, width), 1 = image, 0 = padding at the bottom and right.
            labels: per image a mapping with `class_labels`, (objects,) integers, and `boxes`, (objects, 4), x and y of
                the centre, width and height, as shares of the image without padding. An image may have none.
            output_hidden_states: return all hidden states; default from the configuration.
            output_auxiliary_logits: return the earlier layers' predictions; default from the configuration.
            output_attentions: return the decoder's attention weights; default from the configuration.
            return_dict: a dataclass rather than a tuple; default from the configuration.
            image_sizes: instead of `pixel_mask`: (batch, 2), height and width of each image without padding.

        Returns:
            [`ProScaleDinoForObjectDetectionOutput`], or its fields that are not None as a tuple.

        Raises:
            ValueError: empty batch, sizes that do not agree, labels that cannot be right.
        """
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_auxiliary_logits is None:
            output_auxiliary_logits = config.output_auxiliary_logits
        outputs = self.model(
            pixel_values,
            pixel_mask,
            labels,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            image_sizes=image_sizes,
        )
        needs_all = labels is not None or output_auxiliary_logits
        detections = self.detections(outputs, 0 if needs_all else -1)
        loss_dict = None if labels is None else self.losses(detections, outputs, labels)
        output = ProScaleDinoForObjectDetectionOutput(
            loss=None if loss_dict is None else self.criterion.weighted_sum(loss_dict),
            loss_dict=loss_dict,
            logits=detections.logits[-1],
            pred_boxes=outputs.pred_boxes,
            auxiliary_outputs=[
                {"logits": logits, "pred_boxes": boxes}
                for logits, boxes in zip(detections.logits[:-1], detections.boxes[:-1], strict=True)
            ]
            if output_auxiliary_logits
            else None,
            last_hidden_state=outputs.last_hidden_state,
            intermediate_hidden_states=outputs.intermediate_hidden_states,
            intermediate_reference_points=outputs.intermediate_reference_points,
            enc_topk_logits=outputs.enc_topk_logits,
            enc_topk_bboxes=outputs.enc_topk_bboxes,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            backbone_feature_maps=outputs.backbone_feature_maps,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            image_sizes=outputs.image_sizes,
            padded_sizes=outputs.padded_sizes,
        )
        return output if return_dict else output.to_tuple()

    def detections(self, outputs: ProScaleDinoModelOutput, first: int) -> Detections:
        """The predictions of the layers from this one on."""
        logits = self.class_head(outputs.intermediate_hidden_states[:, first:].transpose(0, 1))
        if outputs.absent_queries is not None:
            logits = logits.masked_fill(outputs.absent_queries[..., None], ABSENT)
        return Detections(logits, outputs.intermediate_boxes[:, first:].transpose(0, 1))

    def losses(
        self, detections: Detections, outputs: ProScaleDinoModelOutput, labels: list[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The loss's unweighted terms, for labels as [`forward`] takes them."""
        first = 0 if self.config.auxiliary_loss else -1
        logits = detections.logits
        objects = checked_detection_labels(labels, logits.shape[1], self.config.num_labels, logits.device)
        denoising = None
        if outputs.denoising_targets is not None:
            denoising = Detections(
                self.class_head(outputs.denoising_hidden_states[:, first:].transpose(0, 1)),
                outputs.denoising_boxes[:, first:].transpose(0, 1),
            )
        return self.criterion(
            Detections(logits[first:], detections.boxes[first:]),
            Detections(outputs.enc_topk_logits[None], outputs.enc_topk_bboxes[None]),
            *objects,
            denoising,
            outputs.denoising_targets,
        )


__all__ = ["ProScaleDinoForObjectDetection", "ProScaleDinoModel", "ProScaleDinoPreTrainedModel"]
