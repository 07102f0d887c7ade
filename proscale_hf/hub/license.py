"""What the licence of a model's weights says about publishing them.

The original PRO-SCALE weights are for non-commercial evaluation, without redistribution. `config.weights_license` keeps
that with a converted model. What is made public on the Hub is checked against it.
"""

import re
from typing import Any


NO_REDISTRIBUTION = re.compile(r"\b(no|without)[\s-]+redistribution\b", re.IGNORECASE)


def check_may_publish(config: Any, private: bool, right: bool = False) -> None:
    """
    Refuse to make weights public if their licence forbids to pass them on.

    Args:
        config: The model's configuration. Without a `weights_license` everything may go anywhere.
        private: Whether only the owner will see the weights.
        right: The user says to have the right to publish them.

    Raises:
        ValueError: the weights must not be published.
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
