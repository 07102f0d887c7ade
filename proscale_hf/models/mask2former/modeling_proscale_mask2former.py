"""PRO-SCALE on the Mask2Former architecture, as a Transformers model (https://arxiv.org/abs/2404.14657).

pixels -> pixel-level module { backbone -> pixel decoder } -> mask decoder -> class and mask logits. What varies, the
encoder, stands in files of its own; see `encoders.py`.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import CONFIG_NAME, ModelOutput

from proscale_hf.hub.code import reference, write_code
from proscale_hf.hub.names import resolved
from proscale_hf.hub.repository import Upload, split_hub_arguments, write_card
from proscale_hf.layers.kernels import PYTORCH, use_kernel
from proscale_hf.layers.linear import Linear
from proscale_hf.losses.segmentation import UniversalSegmentationLoss
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.mask_decoder import (
    MaskDecoder,
    predict_masks,
)
from proscale_hf.models.mask2former.pixel_level_module import PixelLevelModule
from proscale_hf.models.mask_labels import packed_labels
from proscale_hf.models.padding import pad_to_stride, prepare_images


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
        image_sizes: (batch, 2) int64, height and width of each image without padding; with `pixel_mask`.
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
        image_sizes: (batch, 2) int64, height and width of each image without padding; with `pixel_mask`.
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


class ProScaleMask2FormerPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving, common to the models here."""

    config_class = ProScaleMask2FormerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [  # noqa: RUF012 - as transformers has it
        "DeformableEncoderLayer",
        "IntraScaleLayer",
        "Fusion",
        "MaskedAttentionLayer",
    ]
    deformable_attention_backend = PYTORCH  # or the kernel's repository or folder

    def post_init(self) -> None:
        """As in transformers. Of the layers that are not to be split those that the model has, since FSDP wants all."""
        super().post_init()
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> "ProScaleMask2FormerPreTrainedModel":
        """As in transformers, and also by the short name of a published model, see `model_names.py`."""
        with resolved(pretrained_model_name_or_path) as source:
            return super().from_pretrained(source, *model_args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the folder also gets the code and a model card, as a Hub repository needs them."""
        hub_arguments = split_hub_arguments(kwargs)
        is_saving = self.should_save_on_this_rank(is_main_process)
        upload = Upload(save_directory, self.config, **hub_arguments) if push_to_hub and is_saving else None
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_saving:
            write_code(save_directory, ProScaleMask2FormerPreTrainedModel)
            self.config.auto_map |= auto_map_of_models(self.config)
            self.config.to_json_file(Path(save_directory) / CONFIG_NAME)
            write_card(save_directory, self.model_tags or ())
        if upload is not None:
            upload.send()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "50GB",
        tags: list[str] | str | None = None,
        **hub_arguments: Any,
    ) -> CommitInfo:
        """As in transformers; the commit also has the code, and a model card if the repository has none of its own."""
        with tempfile.TemporaryDirectory() as folder:
            upload = Upload(folder, self.config, repo_id, **hub_arguments)
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            tags = [tags] if isinstance(tags, str) else tags or []
            write_card(folder, [*(self.model_tags or ()), *tags], upload.repo_id)
            return upload.send()

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> NamedTuple:
        """As `nn.Module.load_state_dict`, and also for names as `save_pretrained` writes them.

        transformers saves some backbones, Swin among them, under older names. `from_pretrained` translates them, but
        `Trainer` resumes with this method, and would go on with the weights it has instead.
        """
        own = self.state_dict().keys()
        renamings = [t for t in get_model_conversion_mapping(self) if isinstance(t, WeightRenaming)]
        renamed = {
            name if name in own else rename_source_key(name, renamings, [])[0]: tensor
            for name, tensor in state_dict.items()
        }
        return super().load_state_dict(renamed, strict, assign)

    def set_use_kernels(self, use_kernels: bool, kernel_config: Any = None, mode: Any = None) -> None:
        """
        Run deformable attention in a compiled kernel, see `deformable_attention_kernel.py`; `from_pretrained(...,
        use_kernels=True)` ends here.

        Args:
            use_kernels: load a kernel, unless one is in use on this device. What was loaded before stays in any case.
            kernel_config: transformers' `KernelConfig`, to name a kernel.
            mode: accepted as transformers gives it; the same kernel serves training and inference.
        """
        is_in_place = self.use_kernels and self._kernel_device == self.device
        if use_kernels and (kernel_config is not None or not is_in_place):
            self.deformable_attention_backend = use_kernel(self, self.device, kernel_config)
            self._kernel_device = self.device
        # transformers asks again whenever training begins or ends; for nothing, if nothing could be loaded
        self._use_kernels = use_kernels and self.deformable_attention_backend != PYTORCH

    def get_input_embeddings(self) -> None:
        """Pixels have no table of embeddings. accelerate asks for it before it shards a model (FSDP2)."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Own modules say how they begin. Where they leave it to PyTorch, this is how layers of a kind begin here."""
        begin = getattr(module, "reset_parameters", None)
        if begin is not None and not begin.__module__.startswith("torch."):
            begin()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight, gain=self.config.init_xavier_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        else:
            super()._init_weights(module)


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

        Returns:
            [`ProScaleMask2FormerModelOutput`], or its fields that are not None as a tuple.

        Raises:
            ValueError: empty batch or sizes that do not agree.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        return_dict = config.return_dict if return_dict is None else return_dict
        batch = prepare_images(pixel_values, pixel_mask, config.feature_strides[-1], config.mask_padding)
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
        )
        return output if return_dict else output.to_tuple()

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


def auto_map_of_models(config: ProScaleMask2FormerConfig) -> dict[str, str]:
    """What `auto_map` says about this file's classes."""
    names = config.auto_classes
    return {auto_class: reference(globals()[name]) for auto_class, name in names.items()}


__all__ = [
    "ProScaleMask2FormerForUniversalSegmentation",
    "ProScaleMask2FormerModel",
    "ProScaleMask2FormerPreTrainedModel",
]
