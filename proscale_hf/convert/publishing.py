"""Puts a converted model on the Hub: the converters' options, their checks, and the upload."""

import argparse

from proscale_hf.convert import ConversionError
from proscale_hf.hub.license import check_may_publish
from proscale_hf.hub.push import check_repo_id, push_folder
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig


def add_publishing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a converter's command line."""
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload the folder to this Hub repository")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the files and the model card that would go up, and upload nothing"
    )
    parser.add_argument(
        "--i-have-the-right-to-publish",
        action="store_true",
        help="put weights into a public repository although their licence does not allow it to everyone",
    )


def check_publishing(options: argparse.Namespace, config: ProScaleMask2FormerConfig | None = None) -> None:
    """
    Refuse early what could not be published.

    Args:
        options: The parsed command line.
        config: The converted model's configuration, once it is known.

    Raises:
        ConversionError: the options do not fit together, or the weights' licence forbids it.
    """
    if options.push_to_hub is None:
        for name in ("private", "dry_run", "i_have_the_right_to_publish"):
            if getattr(options, name):
                raise ConversionError(f"--{name.replace('_', '-')} says how to upload; it needs --push-to-hub REPO.")
        return
    try:
        check_repo_id(options.push_to_hub)
        if config is not None:
            check_may_publish(config, options.private, options.i_have_the_right_to_publish)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def publish(options: argparse.Namespace) -> None:
    """Upload the written folder, or show what would go up; print where it is.

    Raises:
        ConversionError: the Hub refused; the folder stays as it is.
    """
    if options.push_to_hub is None:
        return
    try:
        print(
            push_folder(
                options.output,
                options.push_to_hub,
                private=options.private,
                dry_run=options.dry_run,
                i_have_the_right_to_publish=options.i_have_the_right_to_publish,
            )
        )
    except ValueError as error:
        raise ConversionError(f"{error} The model is in {options.output}.") from error
