"""The paper's figures, for any model and any images: one figure per file.

In each file one function measures and another one draws. A drawing is a Pillow image and depends only on its data.
"""
