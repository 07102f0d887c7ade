"""Contrastive denoising (DINO, https://arxiv.org/abs/2203.03605, section 3.2): queries that begin near objects.

Each object has a pair of queries in each group: a positive one, whose box is moved a little and which should find the
object, and a negative one, whose box is moved further and which should find nothing. Training alone has them.

As in the original, an image with fewer objects than another has queries left over in every group. They begin as nothing
in the middle of the image, are seen by the others of their group, and should find nothing.
"""

from typing import NamedTuple

import torch
from torch import nn

from proscale_hf.layers.boxes import box_logits, to_centre_and_size, to_corners
from proscale_hf.losses.detection import DenoisingTargets
from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig


MANY = 100  # denoising queries from which on their number is divided by the objects'


class DenoisingQueries(NamedTuple):
    """
    Attributes:
        content: (batch, queries, channels), what they hold at first.
        box_logits: (batch, queries, 4) float32.
        group: (queries,) int64, the group of each; queries of one group see each other.
        targets: what they should find.
    """

    content: torch.Tensor
    box_logits: torch.Tensor
    group: torch.Tensor
    targets: DenoisingTargets


class Noise(NamedTuple):
    """Random numbers for the queries of all objects: all positive ones of a group, its negative ones, the next group.

    Attributes:
        label_chance: (queries,) in [0, 1); where it is small, the class changes.
        new_labels: (queries,) int64, to which one.
        sign: (queries, 4), -1 or 1, the direction in which each number of the corners moves.
        distance: (queries, 4) in [0, 1), how far.
    """

    label_chance: torch.Tensor
    new_labels: torch.Tensor
    sign: torch.Tensor
    distance: torch.Tensor


class ContrastiveDenoising(nn.Module):
    """Makes denoising queries of labels.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleDinoConfig):
        super().__init__()
        self.num_denoising = config.num_denoising
        self.label_noise_ratio = config.label_noise_ratio
        self.box_noise_scale = config.box_noise_scale
        self.num_labels = config.num_labels
        self.label_embedding = nn.Embedding(config.num_labels, config.feature_size)

    def forward(self, class_labels: list[torch.Tensor], boxes: list[torch.Tensor]) -> DenoisingQueries:
        """
        Args:
            class_labels: per image (objects,) int64.
            boxes: per image (objects, 4) float32, centre and size as shares of the image.

        Returns:
            The queries; none if no image has an object.
        """
        device = boxes[0].device
        counts = [len(classes) for classes in class_labels]
        most = max(counts)
        groups = self.num_groups(most)
        repeats = 2 * groups
        noise = self.draw(repeats * sum(counts), device)
        labels = self.noised_labels(torch.cat(class_labels).repeat(repeats), noise)
        noised = self.noised_boxes(torch.cat(boxes).repeat(repeats, 1), noise, groups)

        # the place of each object in its image; its queries are so far into each half of each group
        images = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)]).to(device)
        places = torch.cat([torch.arange(count) for count in counts]).to(device)
        halves = torch.arange(repeats, device=device).repeat_interleave(len(places)) * most
        position = images.repeat(repeats), halves + places.repeat(repeats)
        content = self.label_embedding(labels)
        size = (len(counts), repeats * most)
        return DenoisingQueries(
            content=content.new_zeros((*size, content.shape[-1])).index_put(position, content),
            box_logits=noised.new_zeros((*size, 4)).index_put(position, box_logits(noised)),
            group=torch.arange(groups, device=device).repeat_interleave(2 * most),
            targets=DenoisingTargets([positives(count, most, groups).to(device) for count in counts], groups),
        )

    def num_groups(self, most: int) -> int:
        """
        Args:
            most: objects of the image that has most.

        Returns:
            How many groups of denoising queries there are.
        """
        queries = 2 * self.num_denoising
        if most == 0:
            return 1
        return max(1, queries // (2 * most)) if queries >= MANY else queries

    def draw(self, queries: int, device: torch.device) -> Noise:
        """Random numbers for so many queries."""
        return Noise(
            torch.rand(queries, device=device),
            torch.randint(0, self.num_labels, (queries,), device=device),
            torch.randint(0, 2, (queries, 4), device=device) * 2 - 1,
            torch.rand((queries, 4), device=device),
        )

    def noised_labels(self, labels: torch.Tensor, noise: Noise) -> torch.Tensor:
        """(queries,) int64: some of the labels are any others."""
        return torch.where(noise.label_chance < self.label_noise_ratio / 2, noise.new_labels, labels)

    def noised_boxes(self, boxes: torch.Tensor, noise: Noise, groups: int) -> torch.Tensor:
        """(queries, 4): boxes with their corners moved, up to half their size, and twice as far if they are negative.

        A negative box may be turned inside out; its size is below 0 then, which counts as 0.
        """
        is_negative = torch.arange(2, device=boxes.device).repeat(groups)  # for each half of each group
        is_negative = is_negative.repeat_interleave(len(boxes) // (2 * groups))[:, None]
        moves = (noise.distance + is_negative) * noise.sign * self.box_noise_scale
        corners = to_corners(boxes) + moves * boxes[:, 2:].repeat(1, 2) / 2
        return to_centre_and_size(corners.clamp(0, 1))


def positives(objects: int, most: int, groups: int) -> torch.Tensor:
    """(2, groups * objects) int64: the positive query of each object in each group, and the object."""
    group = torch.arange(groups).repeat_interleave(objects) * (2 * most)
    place = torch.arange(objects).repeat(groups)
    return torch.stack((group + place, place))


def attention_between(group: torch.Tensor, queries: int) -> torch.Tensor:
    """
    Who sees whom: everybody sees the queries that look for objects, and those of one group see each other.

    Args:
        group: (denoising queries,) int64, the group of each.
        queries: how many look for objects.

    Returns:
        (all queries, all queries) bool, denoising queries first, True where the first may see the second.
    """
    group = torch.cat((group, group.new_full((queries,), -1)))
    return (group[:, None] == group) | (group == -1)
