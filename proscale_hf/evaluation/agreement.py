"""Checks, before anything runs, that a model, a data set and the tasks of an evaluation fit together."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from proscale_hf.files.text import few


if TYPE_CHECKING:  # command lines, which read `TASKS`, do without the libraries that data sets need
    from proscale_hf.data.dataset import SegmentationDataset


TASKS = ("panoptic", "instance", "semantic")


def check_tasks(tasks: Collection[str]) -> None:
    """Raises a ValueError if `tasks` is empty, or has one that is not in `TASKS`."""
    if not tasks:
        raise ValueError(f"Give at least one task of {', '.join(TASKS)}.")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"There is no task {', '.join(map(repr, unknown))}; known are {', '.join(TASKS)}.")


def choose_tasks(
    dataset: "SegmentationDataset",
    tasks: Collection[str] | None,
    instance_annotations: Any = None,
) -> list[str]:
    """The tasks to evaluate on a data set.

    Args:
        dataset: has the truth.
        tasks: the user's choice; None: all tasks that the data set has the truth for.
        instance_annotations: another truth of the instance task, or None.

    Returns:
        Some of `TASKS`, in that order.

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

    If instances alone are evaluated, the model may have more labels than the data set: their predictions are left out.

    Args:
        id2label: the model's, from its configuration.
        stuff_labels: the model's labels that are stuff.
        categories: the data set's, in label order.
        tasks: some of `TASKS`.

    Returns:
        For each label of the model the label of the data set, or None.

    Raises:
        ValueError: the names differ, or a label is a thing in one and stuff in the other; the message says which.
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
                f"Model and data set disagree on what is thing and stuff: {few(disputed)}; correct `isthing` in "
                "`categories` of the model's config.json, or, if it has none, label_ids_to_fuse in its "
                "preprocessor_config.json."
            )
    return label_map
