"""Whether a model, a data set and the tasks that are asked for belong together; found out before anything runs."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from proscale_hf.data.dataset import SegmentationDataset
from proscale_hf.files.text import few


TASKS = ("panoptic", "instance", "semantic")


def check_tasks(tasks: Iterable[str]) -> None:
    """Raises a ValueError when there is none, or one that is not in `TASKS`."""
    if not tasks:
        raise ValueError(f"Give at least one task of {', '.join(TASKS)}.")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"There is no task {', '.join(map(repr, unknown))}; known are {', '.join(TASKS)}.")


def choose_tasks(
    dataset: SegmentationDataset,
    tasks: Collection[str] | None,
    instance_annotations: Any = None,
) -> list[str]:
    """The tasks to evaluate on a data set.

    Args:
        dataset: what is to be evaluated on.
        tasks: what is asked for; None: all that the data set has the truth for.
        instance_annotations: other truth of the instance task, if there is.

    Returns:
        Some of `TASKS`, in their order.

    Raises:
        ValueError: a task is unknown, or the data set does not have the truth for it.
    """
    possible = set(dataset.source.tasks)
    if instance_annotations is not None:
        possible.add("instance")
    elif not any(category["isthing"] for category in dataset.categories):
        possible.discard("instance")
    if tasks is None:
        return [task for task in TASKS if task in possible]
    check_tasks(tasks)
    if impossible := [task for task in tasks if task not in possible]:
        raise ValueError(
            f"This data set cannot measure {', '.join(impossible)}, only "
            f"{', '.join(task for task in TASKS if task in possible)}: that is all its annotations tell."
        )
    return [task for task in TASKS if task in tasks]


def match_labels(
    id2label: Mapping[int, str],
    stuff_labels: Collection[int],
    categories: Sequence[Mapping[str, Any]],
    tasks: Collection[str],
) -> list[int | None]:
    """Find the data set's label for each label of a model, by name.

    For the instance task alone the model may know more than the data set: predictions of its other labels are left out.

    Args:
        id2label: of the model's configuration.
        stuff_labels: the model's labels that are stuff: `label_ids_to_fuse` of its image processor.
        categories: of the data set, in label order.
        tasks: to be evaluated.

    Returns:
        For each label of the model the data set's, or None.

    Raises:
        ValueError: names differ, or what is thing and stuff does; the message says which.
    """
    label_of = {category["name"]: label for label, category in enumerate(categories)}
    names = [id2label[label] for label in range(len(id2label))]
    missing = [name for name in label_of if name not in names]
    extra = [name for name in names if name not in label_of] if set(tasks) != {"instance"} else []
    if missing or extra or len(set(names)) < len(names):
        differences = {"the data set alone": missing, "the model alone": extra}
        detail = "; ".join(f"{len(some)} in {owner}, {few(some)}" for owner, some in differences.items() if some)
        raise ValueError(
            f"The model's {len(names)} labels are not the data set's {len(label_of)} categories "
            f"({detail or 'the model has a name twice'}); evaluate a model that was trained for them."
        )
    label_map = [label_of.get(name) for name in names]
    if set(tasks) & {"panoptic", "instance"}:
        disputed = [
            names[label]
            for label, data_label in enumerate(label_map)
            if data_label is not None and (label in stuff_labels) == bool(categories[data_label]["isthing"])
        ]
        if disputed:
            raise ValueError(
                f"Image processor and data set disagree on what is thing and stuff: {few(disputed)}; set "
                "label_ids_to_fuse in the model's preprocessor_config.json to the labels that are stuff."
            )
    return label_map
