"""Average precision of instance masks as a metric of `evaluate`."""

import datasets
import evaluate

from proscale_hf.evaluation.average_precision import MaskAveragePrecision, coco_mask
from proscale_hf.evaluation.metrics.stored_maps import with_text_counts


DESCRIPTION = """
Average precision (AP) and recall (AR) of instance masks, by COCO's rules; the numbers are pycocotools'.
"""

CITATION = """
@inproceedings{lin2014microsoft,
  title={Microsoft COCO: Common Objects in Context},
  author={Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and Ramanan, Deva
    and Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  booktitle={ECCV},
  year={2014}
}
"""

INPUTS = """
Args:
    predictions: of each image a dict as `post_process_instance_segmentation(..., return_coco_annotation=True)` gives
        it: "segmentation", COCO run-length codes, and "segments_info", for each of them a dict with "label_id" and
        "score".
    references: the same of the truth; instead of "score" there may be "iscrowd" and "area" (default: the mask's).

Returns:
    {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", "per_class": {label: AP}};
    -1 where the truth has no object.
"""


class MaskAveragePrecisionMetric(evaluate.Metric):
    """`MaskAveragePrecision` of all images that were added, over the labels that occur."""

    def _info(self) -> evaluate.MetricInfo:
        mask = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}
        instances = {"masks": [mask], "labels": [datasets.Value("int64")]}
        features = {
            "predictions": {**instances, "scores": [datasets.Value("float64")]},
            "references": {
                **instances,
                "iscrowd": [datasets.Value("int8")],
                "area": [datasets.Value("float64")],
            },
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def add_batch(self, *, predictions=None, references=None):
        """Add the images of a batch."""
        super().add_batch(
            predictions=[stored_prediction(p) for p in predictions], references=[stored_truth(r) for r in references]
        )

    def add(self, *, prediction=None, reference=None):
        """Add one image."""
        super().add(prediction=stored_prediction(prediction), reference=stored_truth(reference))

    def _compute(self, predictions, references):
        labels = {label for image in [*predictions, *references] for label in image["labels"]}
        measure = MaskAveragePrecision(labels)
        for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            measure.update(number, prediction, reference)
        return measure.compute()


def stored_prediction(image):
    return {**stored_instances(image), "scores": [segment["score"] for segment in image["segments_info"]]}


def stored_truth(image):
    instances = stored_instances(image)
    segments = image["segments_info"]
    return {
        **instances,
        "iscrowd": [segment.get("iscrowd", 0) for segment in segments],
        "area": [
            float(segment.get("area", coco_mask.area(mask)))
            for segment, mask in zip(segments, instances["masks"], strict=True)
        ],
    }


def stored_instances(image):
    return {
        "masks": [with_text_counts(mask) for mask in image["segmentation"]],
        "labels": [segment["label_id"] for segment in image["segments_info"]],
    }
