"""What one image costs a detection model, stage by stage, as fvcore counts the original DINO."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from proscale_hf.layers.deformable_encoder import TokenGrid, maps_to_tokens
from proscale_hf.models.counting import ACTIVATIONS, OPERATION_COSTS, count, remembered, shapes_only
from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig


# The original writes its frozen batch norm out, and fvcore does not count such operations.
COSTS = {name: cost for name, cost in OPERATION_COSTS.items() if "native_batch_norm" not in str(name)}


@dataclass(frozen=True)
class DetectionCost:
    """
    What one image costs a detection model. A GFLOP is 10^9 multiply-adds, as in the papers.

    Attributes:
        total_gflops: all stages.
        backbone_gflops: the backbone.
        projections_gflops: its maps brought to one width, and coarser maps.
        encoder_gflops: the encoder.
        query_selection_gflops: the choice of tokens as the original computes it, with a box for each of them.
        decoder_gflops: the decoder, with classes and boxes of every layer, as in the original.
        forward_gflops: what a forward pass takes here: boxes of the chosen tokens and classes of the last layer alone.
        parameters_millions: parameters, in millions.
        activations_millions: numbers that convolutions and matrix products put out in a forward pass here, in millions,
            as fvcore counts them. Not the memory in use at one time: inference frees most of them at once.
    """

    total_gflops: float
    backbone_gflops: float
    projections_gflops: float
    encoder_gflops: float
    query_selection_gflops: float
    decoder_gflops: float
    forward_gflops: float
    parameters_millions: float
    activations_millions: float

    @property
    def stages(self) -> dict[str, float]:
        """GFLOPs of the stages by their names; they add up to the total."""
        return {
            "backbone": self.backbone_gflops,
            "projections": self.projections_gflops,
            "encoder": self.encoder_gflops,
            "query selection": self.query_selection_gflops,
            "decoder": self.decoder_gflops,
        }


@remembered
def measure_cost(
    detector_class: type[PreTrainedModel], config: ProScaleDinoConfig, height: int, width: int
) -> DetectionCost:
    """
    Count what a detection model takes for one image. It takes about half a second, and is remembered.

    Args:
        detector_class: the model with its heads.
        config: its configuration.
        height: of the image as the model gets it, in pixels.
        width: as `height`.

    Raises:
        ValueError: `height` or `width` is not at least 1.
    """
    detector, sampling = shapes_only(detector_class, config)
    model = detector.model
    pixels = model.pixel_encoder
    pixel_values = torch.empty((1, config.backbone_config.num_channels, height, width), device="meta")

    activations = FlopCounterMode(display=False, custom_mapping=ACTIVATIONS)
    with activations:
        maps, backbone = count(lambda: tuple(pixels.backbone(pixel_values).feature_maps), COSTS)
        levels, projections = count(lambda: pixels.feature_levels(maps), COSTS)
        positions = pixels.feature_levels.position_embeddings(levels)
        enhanced, encoder = count(lambda: pixels.encoder(levels, positions), COSTS)
        encoder += sampling.cost
        tokens, grid = maps_to_tokens(enhanced), TokenGrid.of_maps(enhanced)
        queries, selection = count(lambda: model.query_selection(tokens, grid), COSTS)
        before = sampling.cost
        decoded, decoder = count(
            lambda: model.decoder(queries.content, queries.box_logits.sigmoid(), tokens, grid), COSTS
        )
        decoder += sampling.cost - before
        _, classes_once = count(lambda: detector.class_head(decoded.query_states[-1]), COSTS)
    forward = backbone + projections + encoder + selection + decoder + classes_once

    # The original makes a box of each token, and the classes of the chosen ones twice.
    _, boxes = count(lambda: model.query_selection.box_head(tokens), COSTS)
    _, boxes_here = count(lambda: model.query_selection.box_head(queries.content), COSTS)
    selection += boxes - boxes_here + classes_once
    decoder += config.decoder_layers * classes_once
    return DetectionCost(
        total_gflops=(backbone + projections + encoder + selection + decoder) / 1e9,
        backbone_gflops=backbone / 1e9,
        projections_gflops=projections / 1e9,
        encoder_gflops=encoder / 1e9,
        query_selection_gflops=selection / 1e9,
        decoder_gflops=decoder / 1e9,
        forward_gflops=forward / 1e9,
        parameters_millions=detector.num_parameters() / 1e6,
        activations_millions=activations.get_total_flops() // 2 / 1e6,
    )
