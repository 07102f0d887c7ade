"""Converters: checkpoints of other code bases, rewritten as folders for `from_pretrained`."""


class ConversionError(ValueError):
    """What the user gave cannot be converted; the message says why and what would be possible."""
