"""Mean intersection over union as a metric of `evaluate`."""

import datasets
import evaluate

from proscale_hf.evaluation.mean_iou import MeanIoU
from proscale_hf.evaluation.metrics.stored_maps import decode, labels_as_png


DESCRIPTION = """
Mean intersection over union (mIoU) of semantic segmentation, over all pixels of a data set, and pixel accuracies.
"""

CITATION = """
@article{everingham2010pascal,
  title={The Pascal Visual Object Classes (VOC) Challenge},
  author={Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and Zisserman, Andrew},
  journal={International Journal of Computer Vision},
  year={2010}
}
"""

INPUTS = """
Args:
    predictions: of each image a (height, width) map of labels, as `post_process_semantic_segmentation` gives it.
    references: the same of the truth.
    num_labels: how many labels there are.
    ignore_index: value of void pixels; 255 by default.

Returns:
    {"mIoU", "fwIoU" (weighted by pixels), "mACC" and "pACC" (accuracy of classes and of pixels), "n" (classes that
    occur), "per_class": {label: IoU, or None if the class does not occur}}
"""


class MeanIoUMetric(evaluate.Metric):
    """`MeanIoU` of all images that were added."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("binary"), "references": datasets.Value("binary")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def add_batch(self, *, predictions=None, references=None):
        """Add the images of a batch."""
        super().add_batch(
            predictions=[labels_as_png(p) for p in predictions], references=[labels_as_png(r) for r in references]
        )

    def add(self, *, prediction=None, reference=None):
        """Add one image."""
        super().add(prediction=labels_as_png(prediction), reference=labels_as_png(reference))

    def _compute(self, predictions, references, num_labels, ignore_index=255):
        measure = MeanIoU(num_labels, ignore_index)
        for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            try:
                measure.update(decode(prediction), decode(reference))
            except ValueError as error:
                raise ValueError(f"Image {number}: {error}") from error
        return measure.compute()
