"""Runs in a process of its own for each model: builds the model, and runs a step whenever it is told to."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from proscale_hf.benchmarking.workload import Candidate, Workload
from proscale_hf.files.text import one_line


SAMPLING_INTERVAL = 0.002  # seconds between two looks at the process's memory


@dataclass
class Step:
    """Time and memory of one step.

    Attributes:
        seconds: of the whole step.
        stages: seconds of its parts, by name; the name of a part of a part has a slash.
        peak_memory: bytes beyond those in use before; 0 where memory was not measured.
    """

    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0


def work(candidate: Candidate, workload: Workload, connection: Connection) -> None:
    """
    Run steps for a benchmark until it ends.

    Args:
        candidate: the model.
        workload: what it is given.
        connection: gets an empty `Step` when the model is ready, then a `Step` for each bool that it sends (whether to
            measure memory). If something is impossible, it gets a string that says why, and nothing more.
    """
    try:
        run_step = prepare(candidate, workload)
        connection.send(Step())
        while True:
            connection.send(run_step(connection.recv()))
    except EOFError:  # the benchmark is over
        return
    except Exception as error:  # anything may be missing on this machine; the parent names it
        connection.send(one_line(error))


def prepare(candidate: Candidate, workload: Workload) -> Callable[[bool], Step]:
    """
    Build the model and its input.

    Args:
        candidate: the model.
        workload: what it is given.

    Returns:
        A function that runs one step, with or without measuring memory.
    """
    import torch
    from transformers.utils import logging

    from proscale_hf.benchmarking.models import build

    logging.set_verbosity_error()
    if workload.threads:
        torch.set_num_threads(workload.threads)
    model, processor = build(candidate, workload)
    clock = Clock(workload.device)
    if "compile" not in candidate.backend:
        for name, module in parts_of(model):
            clock.watch(name, module)
    generator = torch.Generator().manual_seed(0)
    run = {"forward": forward_step, "inference": inference_step, "training": training_step}[workload.mode]
    step_function = run(model, processor, candidate, workload, clock, generator)

    def run_step(with_memory: bool) -> Step:
        clock.stages.clear()
        with peak_memory(workload.device, with_memory) as peak:
            clock.synchronize()
            start = time.perf_counter()
            step_function()
            clock.synchronize()
            seconds = time.perf_counter() - start
        return Step(seconds, dict(clock.stages), peak.value)

    return run_step


class Clock:
    """Times the parts of a step.

    Args:
        device: where the model is. On an accelerator the clock waits, at both ends of a part, until all work is done.
    """

    def __init__(self, device: str):
        import torch

        self.stages: dict[str, float] = {}
        on_cpu = torch.device(device).type == "cpu"
        self.synchronize = (lambda: None) if on_cpu else torch.accelerator.synchronize

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        self.synchronize()
        start = time.perf_counter()
        yield
        self.synchronize()
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start

    def watch(self, name: str, module: Any) -> None:
        """Time every forward of a module."""
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return inner(*args, **kwargs)

        module.forward = forward


def parts_of(model: Any) -> list[tuple[str, Any]]:
    """The parts that models of Mask2Former's kind have; none for other models, which are timed as a whole."""
    module = getattr(getattr(model, "model", None), "pixel_level_module", None)
    if module is None:
        return []
    return [
        ("forward/backbone", module.encoder),
        ("forward/pixel decoder", module.decoder),
        ("forward/mask decoder", model.model.transformer_module),
    ]


def forward_step(model, processor, candidate, workload, clock, generator) -> Callable[[], None]:
    """Pixels to logits."""
    import torch

    pixels = random_pixels(model, workload, generator)
    masks = {"pixel_mask": pixel_mask(workload).to(model.device)} if workload.mixed else {}

    def step() -> None:
        with torch.inference_mode(), clock.stage("forward"):
            model(pixels, **masks)

    return step


def inference_step(model, processor, candidate, workload, clock, generator) -> Callable[[], None]:
    """Photos to panoptic maps."""
    import numpy as np
    import torch
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (workload.height // 16, workload.width // 16, 3), dtype=np.uint8)
    photos = [Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC) for size in workload.image_sizes]
    class_logits = confident_class_logits(workload).to(model.device)
    options = {} if candidate.is_ours or candidate.model == "eomt" else {"label_ids_to_fuse": workload.stuff_label_ids}
    options["target_sizes"] = workload.image_sizes

    def step() -> None:
        with torch.inference_mode():
            with clock.stage("preprocess"):
                inputs = processor(images=photos, return_tensors="pt").to(model.device)
                pixels = inputs["pixel_values"].to(model.dtype)
                masks = {} if "pixel_mask" not in inputs else {"pixel_mask": inputs["pixel_mask"]}
            with clock.stage("forward"):
                outputs = model(pixels, **masks)
            outputs.class_queries_logits = class_logits
            outputs.masks_queries_logits = outputs.masks_queries_logits.float()
            with clock.stage("postprocess"):
                processor.post_process_panoptic_segmentation(outputs, **options)

    return step


def training_step(model, processor, candidate, workload, clock, generator) -> Callable[[], None]:
    """Forward, loss and backward."""
    import torch

    pixels = random_pixels(model, workload, generator)
    masks, classes = random_objects(workload, generator)
    masks = [mask.to(model.device, torch.uint8 if candidate.is_ours else torch.float32) for mask in masks]
    classes = [labels.to(model.device) for labels in classes]
    dtype = getattr(torch, candidate.dtype)
    autocast = torch.autocast(torch.device(workload.device).type, dtype=dtype, enabled=dtype != torch.float32)

    def step() -> None:
        with clock.stage("forward"), autocast:
            loss = model(pixels, mask_labels=masks, class_labels=classes).loss
        with clock.stage("backward"):
            loss.backward()
        model.zero_grad()

    return step


def random_pixels(model: Any, workload: Workload, generator: Any) -> Any:
    """(batch, 3, height, width) noise in the model's type and of the padded size; of EoMT's square size for EoMT."""
    import torch

    square = getattr(model.config, "image_size", None)
    size = (square, square) if isinstance(square, int) else padded_size(workload)
    return torch.randn((workload.batch, 3, *size), generator=generator).to(model.device, model.dtype)


def padded_size(workload: Workload) -> tuple[int, int]:
    """The least height and width that hold every image of the batch."""
    return tuple(map(max, zip(*workload.image_sizes, strict=True)))


def pixel_mask(workload: Workload) -> Any:
    """(batch, height, width) int64, 1 where the images of the batch are."""
    import torch

    mask = torch.zeros((workload.batch, *padded_size(workload)), dtype=torch.int64)
    for image, (height, width) in zip(mask, workload.image_sizes, strict=True):
        image[:height, :width] = 1
    return mask


def confident_class_logits(workload: Workload) -> Any:
    """(batch, queries, labels + 1) logits: the first `kept` queries are sure of a class, the others of "no object"."""
    import torch

    best = torch.full((workload.queries,), workload.labels)
    best[: workload.kept] = torch.arange(workload.kept) % workload.labels
    logits = torch.nn.functional.one_hot(best, workload.labels + 1) * 20.0
    return logits.expand(workload.batch, -1, -1).contiguous()


def random_objects(workload: Workload, generator: Any) -> tuple[list[Any], list[Any]]:
    """Rectangles as labels: for each image masks (objects, height, width) and classes (objects,)."""
    import torch

    def spans(length: int) -> Any:
        ends = torch.randint(0, length, (workload.batch, workload.objects, 2), generator=generator).sort(-1).values
        positions = torch.arange(length)
        return (positions >= ends[..., :1]) & (positions <= ends[..., 1:])

    masks = spans(workload.height)[..., :, None] & spans(workload.width)[..., None, :]
    classes = torch.randint(0, workload.labels, (workload.batch, workload.objects), generator=generator)
    return list(masks), list(classes)


@dataclass
class Peak:
    """The largest number of bytes in use beyond the start."""

    value: int = 0


@contextmanager
def peak_memory(device: str, wanted: bool) -> Iterator[Peak]:
    """
    Measure the most memory in use inside a `with` block, by the accelerator's own count or by samples of the process.

    Args:
        device: where the model is.
        wanted: whether to measure at all.
    """
    import torch

    peak = Peak()
    if not wanted:
        yield peak
    elif torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.value = torch.cuda.max_memory_allocated() - before
    else:
        before, done = resident_memory(), threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLING_INTERVAL):
                peak.value = max(peak.value, resident_memory() - before)

        sampler = threading.Thread(target=sample)
        sampler.start()
        yield peak
        done.set()
        sampler.join()
        peak.value = max(peak.value, resident_memory() - before)


def resident_memory() -> int:
    """Bytes of this process in physical memory; 0 where the system does not tell."""
    import resource

    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else 0
