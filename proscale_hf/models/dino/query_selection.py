"""Mixed query selection of DINO (https://arxiv.org/abs/2203.03605, section 3.3): where queries begin.

Each token proposes a box around itself. The tokens with the highest scores give the queries their boxes; what the
queries hold at first is learned, and the same for all images.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from proscale_hf.layers.deformable_encoder import TokenGrid
from proscale_hf.layers.linear import Linear
from proscale_hf.layers.table import Table
from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig
from proscale_hf.models.dino.heads import BoxHead, ClassHead


FINEST_SIZE = 0.05  # of the boxes that tokens of the finest level propose, doubled from level to level
SMALLEST, LARGEST = 0.01, 0.99  # of the four numbers of a proposal that counts
ABSENT = -100.0  # the logit of every class for a query that an image does not have


class SelectedQueries(NamedTuple):
    """
    Attributes:
        tokens: (batch, queries) int64, the token of each query.
        logits: (batch, queries, classes), what the tokens say about classes.
        box_logits: (batch, queries, 4) float32, the logits of their boxes.
        content: (batch, queries, channels), what queries hold at first.
        absent: (batch, queries) bool, True for queries that an image with fewer tokens does not have; None if every
            image has all of them.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    box_logits: torch.Tensor
    content: torch.Tensor
    absent: torch.Tensor | None


class QuerySelection(nn.Module):
    """Chooses tokens, and makes queries of them.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleDinoConfig):
        super().__init__()
        channels = config.feature_size
        self.num_queries = config.num_queries
        self.padding_is_absent = config.batch_padding == "per_image"
        self.token_projection = Linear(channels, channels)
        self.token_norm = nn.LayerNorm(channels)
        self.class_head = ClassHead(channels, config.num_labels)
        self.box_head = BoxHead(channels)
        self.content = ContentEmbedding(config.num_queries, channels)

    def forward(self, tokens: torch.Tensor, grid: TokenGrid) -> SelectedQueries:
        """
        Args:
            tokens: (batch, tokens, channels), enhanced.
            grid: where they lie.

        Returns:
            As many queries as there should be, but no more than there are tokens, in the order of their scores.
        """
        proposals = token_boxes(grid)
        counts = ((proposals > SMALLEST) & (proposals < LARGEST)).all(-1, keepdim=True)
        if grid.padding is not None:
            counts = counts & ~grid.padding[..., None]
        tokens = self.token_norm(self.token_projection(tokens.masked_fill(~counts, 0)))
        logits = self.class_head(tokens)
        scores = logits.detach().amax(-1)
        absent = None
        if self.padding_is_absent and grid.padding is not None:
            scores = scores.masked_fill(grid.padding, -torch.inf)
        chosen = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices
        logits = logits.gather(1, chosen[..., None].expand(-1, -1, logits.shape[-1]))
        if self.padding_is_absent and grid.padding is not None:
            absent = grid.padding.gather(1, chosen)
            logits = logits.masked_fill(absent[..., None], ABSENT)
        proposal_logits = proposals.logit().masked_fill(~counts, torch.inf).expand(len(tokens), -1, -1)
        per_number = chosen[..., None].expand(-1, -1, 4)
        changes = self.box_head(tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1])))
        return SelectedQueries(
            tokens=chosen,
            logits=logits,
            box_logits=changes.to(proposals.dtype) + proposal_logits.gather(1, per_number),
            content=self.content()[: chosen.shape[1]].expand(len(tokens), -1, -1),
            absent=absent,
        )


class ContentEmbedding(Table):
    """What queries hold at first, (queries, channels)."""

    def reset_parameters(self) -> None:
        """As linear layers begin."""
        init.xavier_uniform_(self.weight)


def token_boxes(grid: TokenGrid) -> torch.Tensor:
    """(1 or batch, tokens, 4) float32: a box around each token, centre and size, larger on coarser levels."""
    coarsest = len(grid.shapes_list) - 1
    sizes = [
        grid.centres.new_full((height * width, 2), FINEST_SIZE * 2.0 ** (coarsest - level))
        for level, (height, width) in enumerate(grid.shapes_list)
    ]
    return torch.cat((grid.centres, torch.cat(sizes).expand_as(grid.centres)), dim=-1)
