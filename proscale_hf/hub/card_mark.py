"""The mark on a model card: who finds it there knows that nobody wrote or edited the card."""

import hashlib


CARD_NAME = "README.md"
CARD_SIGNATURE = "\n<!-- Made from the files beside it ({}). An edited card is kept. -->\n"


def sign(text: str) -> str:
    """A card, and a last line by which [`is_own_card`] knows it."""
    return text + CARD_SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def is_own_card(text: str) -> bool:
    """Whether the package wrote a card, and nobody has changed it."""
    return text == sign(text[: -len(sign(""))])
