"""What the licence of a model's weights says about publishing them.

The original PRO-SCALE weights are for non-commercial evaluation, without redistribution. `config.weights_license` keeps
that with a converted model, and what is made public on the Hub is checked against it.
"""

import re
from typing import Any

from huggingface_hub import HfApi, ModelInfo


NO_REDISTRIBUTION = re.compile(r"\b(no|without)[\s-]+redistribution\b", re.IGNORECASE)


def check_may_publish(config: Any, private: bool, right: bool = False) -> None:
    """
    Refuse to make weights public whose licence forbids to pass them on.

    Args:
        config: The model's configuration; what has no `weights_license` may go anywhere.
        private: Whether they go where only their owner sees them.
        right: The user says to have the right to publish them.

    Raises:
        ValueError: they must not be published.
    """
    weights_license = getattr(config, "weights_license", None)
    if weights_license is None or private or right:
        return
    if NO_REDISTRIBUTION.search(weights_license):
        raise ValueError(
            f"The licence of these weights ({weights_license}) forbids to publish them: make the repository "
            "private, or say that you have the right (--i-have-the-right-to-publish, in Python "
            "i_have_the_right_to_publish=True)."
        )


def open_repository(
    config: Any, repo_id: str, private: bool | None, token: str | bool | None = None, right: bool = False
) -> ModelInfo:
    """
    Create the Hub repository that a model goes to, unless it exists, and make sure that it is for the right eyes.

    Args:
        config: As for [`check_may_publish`].
        repo_id: The repository; without a namespace it is the user's own.
        private: Whether only its owner may see it.
        token: For the Hub; by default the one that is logged in.
        right: The user says to have the right to publish the weights.

    Returns:
        What the Hub knows about the repository.

    Raises:
        ValueError: the weights must not be published, or the repository exists and is public though it should be
            private.
    """
    check_may_publish(config, bool(private), right)
    api = HfApi(token=token)
    info = api.model_info(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    if private and not info.private:
        raise ValueError(
            f"{info.id} exists already and is public, but this model should go to a private repository: make it "
            "private in its settings on the Hub, or choose another name."
        )
    return info
