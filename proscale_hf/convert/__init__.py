"""Converters: checkpoints of other code bases, rewritten as folders for `from_pretrained`."""


class ConversionError(ValueError):
    """The user's files or options cannot be converted; the message says why, and what is possible."""
