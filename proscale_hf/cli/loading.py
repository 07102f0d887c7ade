"""Loading a model for a subcommand, or its configuration alone: from a folder, the Hub or the package itself.

What fails is said in one clear line.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proscale_hf.cli.console import CommandError, quiet_libraries, user_errors


DEMO_MODEL = Path(__file__).parent.parent / "demo_model"


def load_model(name: str | None, model_type: str = "proscale_mask2former") -> tuple[Any, Any]:
    """A model of one family with its heads, in evaluation mode, and its image processor.

    Only safetensors are read and no code that comes with a model is run.

    Args:
        name: a folder, a Hub id or the short name of a published model; the demo model that ships with the package if
            None.
        model_type: of the family, by default that of segmentation.

    Returns:
        The model and the processor: the torchvision backend where torchvision is installed, else Pillow's.

    Raises:
        CommandError: it cannot be loaded, or its weights are incomplete or not numbers.
    """
    import torch

    from proscale_hf.files.memory import is_out_of_memory
    from proscale_hf.hub.auto_classes import image_processor_class
    from proscale_hf.hub.families import FAMILIES
    from proscale_hf.hub.names import resolve, resolved

    quiet_libraries()
    source = str(DEMO_MODEL) if name is None else name
    is_folder = name is None or _is_folder(source)
    if is_folder:
        _check_folder(Path(source))
    with user_errors(exit_code=2):
        resolve(source)  # says so if this is no short name, but looks like one
    model_class = FAMILIES[model_type].task_class
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with resolved(source) as place:
                found = model_class.config_class.get_config_dict(place)[0].get("model_type", model_type)
            if found != model_type:
                what = "is not a PRO-SCALE model" if found not in FAMILIES else "is a model for another command"
                raise CommandError(f"{source} {what}: its model_type is {found}")
            config = model_class.config_class.from_pretrained(source)
            model, report = model_class.from_pretrained(
                source, config=config, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
            )
            processor = image_processor_class(model_type).from_pretrained(source)
    except CommandError:
        raise
    except Exception as error:  # damaged files, no network, no such repository: each library has its own types
        if is_out_of_memory(error):
            raise
        raise CommandError(_explain(source, is_folder, error)) from error

    # What did not fit was initialised at random: such a model would run, and give nonsense.
    unusable = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if unusable:
        raise CommandError(
            f"the weights in {source} do not belong to its config.json: {len(unusable)} tensors are missing or of "
            f"another size, such as {unusable[0]}; save or convert the model again"
        )
    for name_of_tensor, tensor in model.state_dict().items():  # statistics of batch norms too
        if not torch.isfinite(tensor).all():
            raise CommandError(f"the weights in {source} are broken: {name_of_tensor} holds NaN or infinity")
    return model.eval(), processor


def _is_folder(source: str) -> bool:
    """Whether a name means a place on this disk rather than a model on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(source).exists():
        return True
    try:
        validate_repo_id(source)
    except HFValidationError:
        return True
    return False


def _check_folder(folder: Path) -> None:
    from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    if folder == DEMO_MODEL and not folder.is_dir():
        raise CommandError("this installation has no demo model; give one with --model", exit_code=2)
    if not folder.exists():
        raise CommandError(f"there is no folder {folder}; --model takes a model's folder or its Hub id")
    if not folder.is_dir():
        raise CommandError(f"{folder} is a file; give the folder that holds the model")
    for choices in ((CONFIG_NAME,), (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (IMAGE_PROCESSOR_NAME,)):
        if not any((folder / file_name).is_file() for file_name in choices):
            raise CommandError(
                f"the model folder {folder} has no {choices[0]}; save model and image processor there "
                "with save_pretrained"
            )


def _explain(source: str, is_folder: bool, error: Exception) -> str:
    from safetensors import SafetensorError

    from proscale_hf.hub.errors import explain
    from proscale_hf.hub.names import NotOnTheHubError

    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    if isinstance(error, SafetensorError):
        return f"the weights file in {source} is damaged or incomplete ({reason}); copy or download it again"
    if isinstance(error, NotOnTheHubError):
        return str(error)
    if not is_folder and isinstance(error, OSError):
        return f"there is no folder {source} here, and the Hub did not give a model of that name: {explain(error)}"
    return f"cannot load the model {source}: {reason}"


def load_config(name: str, model_types: Sequence[str] = ("proscale_mask2former",)) -> Any:
    """The configuration of a preset, a folder, a JSON file, a model on the Hub, or "demo".

    Args:
        name: of it.
        model_types: those that the command can do something with, the usual one first.

    Raises:
        CommandError: there is none of that name.
    """
    from proscale_hf.files.reading import open_file
    from proscale_hf.files.text import one_line
    from proscale_hf.hub.families import FAMILIES
    from proscale_hf.hub.names import resolved

    quiet_libraries()  # about each attempt to reach the Hub, and the wrong type of a model, which is said below
    if not Path(name).exists():
        for model_type in model_types:
            if FAMILIES[model_type].is_preset(name):
                return FAMILIES[model_type].config_class.from_preset(name)
        if name == "demo":
            name = str(DEMO_MODEL)
    if Path(name).exists() and not Path(name).is_dir():
        with user_errors(), open_file(name, "configuration"):
            pass  # it is no pipe, which transformers would wait for
    usual = FAMILIES[model_types[0]].config_class
    try:
        with resolved(name) as source:
            model_type = usual.get_config_dict(source)[0].get("model_type")
        config_class = FAMILIES[model_type].config_class if model_type in model_types else usual
        config = config_class.from_pretrained(name)
    except Exception as error:  # damaged files, no network, no such repository: each library has its own types
        what = f"{name} has" if Path(name).exists() else f"there is no preset {name}, and"
        raise CommandError(f"{what} no configuration that can be loaded: {one_line(error)}") from error
    if config.model_type not in model_types:
        raise CommandError(f"{name} is not a PRO-SCALE model: its model_type is {config.model_type}")
    return config
