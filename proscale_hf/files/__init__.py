"""Files and lines of text: written whole or not at all, and kept short."""
