"""The analyses of the paper as pictures, of any model and any images: one figure per file.

Each file measures in one function and draws in another; a drawing is a Pillow image, and depends on its data alone.
"""
