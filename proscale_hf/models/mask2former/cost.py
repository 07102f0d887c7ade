"""What one image costs a segmentation model, stage by stage, as the papers' tables have it."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from proscale_hf.models.counting import ACTIVATIONS, BILINEAR, Cost, count, remembered, shapes_only
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.mask_decoder import predict_masks


@remembered
def measure_cost(
    segmenter_class: type[PreTrainedModel], config: ProScaleMask2FormerConfig, height: int, width: int
) -> Cost:
    """
    Count what a segmentation model takes for one image. It takes about half a second, and is remembered.

    Args:
        segmenter_class: the model with its heads.
        config: its configuration.
        height: of the image as the model gets it, in pixels; padding to a multiple of the largest stride is added.
        width: as `height`.

    Raises:
        ValueError: `height` or `width` is not at least 1.
    """
    segmenter, sampling = shapes_only(segmenter_class, config)
    model = segmenter.model
    stride = config.feature_strides[-1]
    padded_height, padded_width = -(-height // stride) * stride, -(-width // stride) * stride
    pixel_values = torch.empty((1, config.backbone_config.num_channels, padded_height, padded_width), device="meta")

    activations = FlopCounterMode(display=False, custom_mapping=ACTIVATIONS)
    with activations:
        maps, backbone = count(lambda: tuple(model.pixel_level_module.encoder(pixel_values).feature_maps))
        pixels, pixel_decoder = count(lambda: model.pixel_level_module.decoder(maps))
        features, mask_features = pixels.multi_scale_features, pixels.mask_features
        decoded, layers = count(lambda: model.transformer_module(features, mask_features))
        _, classes_once = count(lambda: segmenter.class_predictor(decoded.query_states[-1]))
        _, masks_once = count(lambda: predict_masks(decoded.mask_embeddings[-1], mask_features))
    pixel_decoder += sampling.cost

    tokens = [feature_map.shape[-2:].numel() for feature_map in features]
    mask_decoder = _as_in_the_original(config, tokens, layers) + config.decoder_layers * (classes_once + masks_once)
    resizing = BILINEAR * config.num_queries * (padded_height * padded_width + height * width)
    post_processing = resizing + config.num_queries * config.num_labels * height * width
    return Cost(
        total_gflops=(backbone + pixel_decoder + mask_decoder + post_processing) / 1e9,
        backbone_gflops=backbone / 1e9,
        encoder_gflops=pixel_decoder / 1e9,
        mask_decoder_gflops=mask_decoder / 1e9,
        post_processing_gflops=post_processing / 1e9,
        forward_gflops=(backbone + pixel_decoder + layers + classes_once + masks_once) / 1e9,
        parameters_millions=segmenter.num_parameters() / 1e6,
        activations_millions=activations.get_total_flops() // 2 / 1e6,
    )


def _as_in_the_original(config: ProScaleMask2FormerConfig, tokens: list[int], layers: int) -> int:
    """
    Args:
        config: the model's configuration.
        tokens: positions of each map, coarse to fine; the layers read them in turns.
        layers: what the mask decoder takes here, without its predictions.

    Returns:
        What fvcore sees of it in the original. There, masks that steer attention are made from predictions at full
        resolution, the last one included, and resized.
    """
    tokens_read = [tokens[layer % len(tokens)] for layer in range(config.decoder_layers - 1)]
    next_tokens = tokens[(config.decoder_layers - 1) % len(tokens)]
    steering_here = config.mask_feature_size * (config.num_queries * sum(tokens_read) + BILINEAR * sum(tokens))
    steering_there = BILINEAR * config.num_queries * (sum(tokens_read) + next_tokens)
    unseen_products = config.num_queries * config.hidden_dim * sum(tokens_read)
    return layers - steering_here + steering_there - unseen_products
