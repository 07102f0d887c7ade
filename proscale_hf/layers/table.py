"""A learned vector for each of a few things, such as queries or levels, all of which are used in every call."""

import torch
from torch import nn


class Table(nn.Embedding):
    """`nn.Embedding` whose call gives the whole table, so that hooks on it, such as accelerate's for offloaded weights,
    work as with any module."""

    def forward(self) -> torch.Tensor:
        """(num_embeddings, embedding_dim)."""
        return self.weight
