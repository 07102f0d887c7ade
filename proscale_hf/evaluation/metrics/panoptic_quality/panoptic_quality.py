"""Panoptic quality as a metric of `evaluate`."""

import datasets
import evaluate

from proscale_hf.evaluation.metrics.stored_maps import decode, ids_as_png
from proscale_hf.evaluation.panoptic_quality import PanopticQuality


DESCRIPTION = """
Panoptic quality (PQ) with its factors segmentation quality (SQ) and recognition quality (RQ), by the rules of
COCO-panoptic for crowds and void; the numbers are panopticapi's.
"""

CITATION = """
@inproceedings{kirillov2019panoptic,
  title={Panoptic Segmentation},
  author={Kirillov, Alexander and He, Kaiming and Girshick, Ross and Rother, Carsten and Doll{\\'a}r, Piotr},
  booktitle={CVPR},
  year={2019}
}
"""

INPUTS = """
Args:
    predictions: of each image a dict as `post_process_panoptic_segmentation` gives it: "segmentation", a (height,
        width) map of segment ids, 0 for none, and "segments_info", dicts with "id" and "label_id".
    references: the same of the truth; "iscrowd" of a segment may be given. 0 in the map is void.
    thing_label_ids: labels of things.
    stuff_label_ids: labels of stuff.

Returns:
    {"All": {"pq", "sq", "rq", "n"}, "Things": ..., "Stuff": ..., "per_class": {label: {"pq", "sq", "rq"}}}
"""


class PanopticQualityMetric(evaluate.Metric):
    """`PanopticQuality` of all images that were added."""

    def _info(self) -> evaluate.MetricInfo:
        segment = {"id": datasets.Value("int64"), "label_id": datasets.Value("int64")}
        features = {
            "predictions": {"segmentation": datasets.Value("binary"), "segments_info": [segment]},
            "references": {
                "segmentation": datasets.Value("binary"),
                "segments_info": [{**segment, "iscrowd": datasets.Value("int8")}],
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

    def _compute(self, predictions, references, thing_label_ids, stuff_label_ids):
        measure = PanopticQuality(thing_label_ids, stuff_label_ids)
        for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            try:
                measure.update(
                    decode(prediction["segmentation"]),
                    with_category_ids(prediction["segments_info"]),
                    decode(reference["segmentation"]),
                    with_category_ids(reference["segments_info"]),
                )
            except ValueError as error:
                raise ValueError(f"Image {number}: {error}") from error
        return measure.compute()


def stored_prediction(image):
    segments = [{"id": segment["id"], "label_id": segment["label_id"]} for segment in image["segments_info"]]
    return {"segmentation": ids_as_png(image["segmentation"]), "segments_info": segments}


def stored_truth(image):
    stored = stored_prediction(image)
    for kept, segment in zip(stored["segments_info"], image["segments_info"], strict=True):
        kept["iscrowd"] = segment.get("iscrowd", 0)
    return stored


def with_category_ids(segments):
    return [{**segment, "category_id": segment["label_id"]} for segment in segments]
