"""Data sets: their categories, their images with segments, and what training makes of them.

- `opening.py` opens a data set by name; `sources/` has a file for each kind of data set.
- `dataset.py` says what a data set is, and reads its images for PyTorch; `reading.py` has what most kinds share.
- `sample.py` is one image with its segments; `augmentation.py` changes samples, and `collate.py` makes batches of them.
- `objects.py` refuses to train on data without any object.
- `categories.py` and `categories/` have the classes of known data sets.
- `first_look.py` counts what a data set holds.
"""
