"""What the models of all families share: loading, saving, uploading, and compiled kernels."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import CONFIG_NAME

from proscale_hf.hub.card_mark import CARD_NAME
from proscale_hf.hub.code import flat_name, nearest_of_ours, write_code
from proscale_hf.hub.upload import HubRepository, split_hub_arguments
from proscale_hf.layers.kernels import PYTORCH, use_kernel
from proscale_hf.models.installed import resolved, write_card


MOST_PARAMETERS = 10**10  # the largest models of this kind have 2 * 10**8


def check_parameters(model: nn.Module) -> None:
    """Refuse a model that is far too large, as a file may ask for, before anything is allocated.

    Args:
        model: on the meta device, as in `from_pretrained`. On another device, it is there already.

    Raises:
        ValueError: the model has too many parameters.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.is_meta)
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f"The configuration asks for {parameters:,} parameters; at most {MOST_PARAMETERS:,} are possible."
        )


class IsRemoteCode:
    """`is_remote_code()`, which transformers asks of the class when it loads, and of the model when it saves.

    The class is custom code: for missing safetensors, no service on the Hub is asked to convert other weights. A saved
    model is not: transformers would copy the one file that defines it, and [`write_code`] writes all that it needs.
    """

    def __get__(self, model: PreTrainedModel | None, model_class: type[PreTrainedModel]) -> Callable[[], bool]:
        return lambda: model is None


class ProScalePreTrainedModel(PreTrainedModel):
    """The common part of the models. A family adds its configuration, the initial weights, and how its cost is counted.

    Its module has the classes that `auto_classes` of the configuration names. The configuration says in
    `feature_strides` to which multiple images are padded: the last of them.
    """

    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    is_remote_code = IsRemoteCode()
    deformable_attention_backend = PYTORCH  # or the kernel's repository or folder

    @classmethod
    def measure_cost(cls, config: PreTrainedConfig, height: int, width: int) -> Any:
        """What one image of this height and width, in pixels, costs a model of this configuration."""
        raise NotImplementedError

    def post_init(self) -> None:
        """As in transformers. `_no_split_modules` keeps the layers that this model has, since FSDP wants all."""
        super().post_init()
        check_parameters(self)
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Own modules say how they begin. Where they leave it to PyTorch, `init_layer` says it for the family."""
        begin = getattr(module, "reset_parameters", None)
        if begin is not None and not begin.__module__.startswith("torch."):
            begin()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            self.init_layer(module)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        else:
            super()._init_weights(module)

    def init_layer(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Give the weights of a layer the values that layers of its kind have at first; biases are 0."""
        init.xavier_uniform_(layer.weight)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> "ProScalePreTrainedModel":
        """As in transformers, and also by the short name of a published model, see `names.py`."""
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
        hub_arguments = split_hub_arguments(kwargs, save_directory)
        is_saving = self.should_save_on_this_rank(is_main_process)
        repository = HubRepository(config=self.config, **hub_arguments) if push_to_hub and is_saving else None
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_saving:
            model_class = nearest_of_ours(type(self))
            write_code(save_directory, model_class)
            module = flat_name(model_class.__module__)
            self.config.auto_map |= {auto: f"{module}.{name}" for auto, name in self.config.auto_classes.items()}
            self.config.to_json_file(Path(save_directory) / CONFIG_NAME)
            self._write_card(save_directory)
        if push_to_hub:
            with tempfile.TemporaryDirectory() as folder:  # every process saves, as each may hold a part of the weights
                self.save_pretrained(folder, is_main_process, state_dict, **kwargs)
                if repository is not None:
                    repository.upload(folder, card=Path(save_directory, CARD_NAME))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "50GB",
        tags: list[str] | str | None = None,
        **hub_arguments: Any,
    ) -> CommitInfo:
        """As in transformers; the commit also has the code, and a model card if the repository has none of its own."""
        repository = HubRepository(repo_id, self.config, **hub_arguments)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            self._write_card(folder, [tags] if isinstance(tags, str) else tags or [], repository.id)
            return repository.upload(folder)

    def _write_card(self, folder: str | os.PathLike, tags: list[str] | tuple = (), repo_id: str | None = None) -> None:
        def measure_cost(height: int, width: int) -> Any:
            return self.measure_cost(self.config, height, width)

        tags = [*(self.model_tags or ()), *tags]
        write_card(folder, self.config, measure_cost=measure_cost, tags=tags, repo_id=repo_id)

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
        Run deformable attention in a compiled kernel, see `layers/kernels.py`; `from_pretrained(...,
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
