"""What a benchmark compares, and what it gives to each model. Nothing here imports torch."""

from dataclasses import dataclass


MODELS = {
    "proscale": "this package, PRO-SCALE's encoder",
    "proscale-mask2former": "this package, Mask2Former's encoder",
    "mask2former": "transformers' Mask2Former",
    "maskformer": "transformers' MaskFormer",
    "eomt": "transformers' EoMT, on a square of as many pixels",
}
DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("pytorch", "kernel", "compile", "kernel+compile")
MODES = {
    "forward": "pixels to logits",
    "inference": "photo to panoptic map",
    "training": "forward, loss and backward",
}
BACKBONES = ("swin-t", "resnet-50")


@dataclass(frozen=True)
class Candidate:
    """One model in the comparison.

    Args:
        model: one of `MODELS`.
        dtype: one of `DTYPES`, the type of weights and pixels; in training that of autocast, with weights in float32.
        backend: one of `BACKENDS`.
    """

    model: str
    dtype: str = "float32"
    backend: str = "pytorch"

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """Read a text such as `"proscale:bfloat16:kernel"`; the type and the backend may be left out.

        Raises:
            ValueError: a part is not known; the message names the known ones.
        """
        parts = text.split(":")
        if len(parts) > 3:
            raise ValueError(f"{text!r} is no model; write NAME[:TYPE[:BACKEND]], such as proscale:bfloat16:kernel")
        candidate = cls(*parts)
        for name, known in (("model", MODELS), ("dtype", DTYPES), ("backend", BACKENDS)):
            value = getattr(candidate, name)
            if value not in known:
                where = "" if value == text else f"{text!r}: "
                raise ValueError(f"{where}{value!r} is no {name}; known: {', '.join(known)}")
        if "kernel" in candidate.backend and not candidate.is_ours:
            raise ValueError(f"{text!r}: kernels are for this package's models only")
        return candidate

    @property
    def is_ours(self) -> bool:
        """Whether this package has the model."""
        return self.model.startswith("proscale")

    def __str__(self) -> str:
        return ":".join((self.model, self.dtype, self.backend))


@dataclass(frozen=True)
class Workload:
    """What every model is given.

    Args:
        mode: one of `MODES`.
        height: of the image in pixels.
        width: of the image in pixels.
        batch: images in a step.
        device: "cpu", "cuda", ...
        backbone: one of `BACKBONES`; EoMT has its own.
        labels: classes.
        queries: object queries.
        kept: queries whose score post-processing keeps, the same for all models.
        objects: in each image, in training.
        stages: layers in each stage of the PRO-SCALE encoder.
        threads: of the CPU; 0 is PyTorch's choice.
        mixed: every second image stands upright, height and width exchanged, and the batch is padded.
    """

    mode: str = "inference"
    height: int = 800
    width: int = 1344
    batch: int = 1
    device: str = "cpu"
    backbone: str = "swin-t"
    labels: int = 133
    queries: int = 100
    kept: int = 20
    objects: int = 10
    stages: tuple[int, ...] = (3, 3, 3)
    threads: int = 0
    mixed: bool = False

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image of the batch."""
        size = (self.height, self.width)
        return [size[::-1] if self.mixed and index % 2 else size for index in range(self.batch)]

    @property
    def stuff_label_ids(self) -> set[int]:
        """Classes without instances: two fifths of them, as in COCO."""
        return set(range(self.labels * 3 // 5, self.labels))
