"""A batch through the model in pieces of rows of like length, so that few tokens of padding are computed."""

import torch

from bge_ray.model.train.cached import Features, Represent

MOST = 4
# Fewer rows to a piece, and its launches cost more than the padding.
LEAST_ROWS = {"cpu": 5, "cuda": 16}


def by_length(features: Features, represent: Represent) -> tuple[torch.Tensor, ...]:
    """Return what the model makes of n rows, in their order: tensors of n rows each.

    How many pieces there are follows from n and the device alone: workers that share gradients must all run
    the model as often.

    Args:
        features: (n, t) tensors, padded on the right, among them ``attention_mask``.
        represent: runs the model; what it makes of a row must not depend on the padding.
    """
    mask = features["attention_mask"]
    pieces = min(MOST, len(mask) // LEAST_ROWS.get(mask.device.type, LEAST_ROWS["cuda"]))
    if pieces < 2:
        return represent(dict(features))
    lengths = mask.sum(1)
    order = torch.argsort(lengths, stable=True)
    made = []
    for rows in torch.tensor_split(order, pieces):
        longest = int(lengths[rows[-1]])
        made.append(represent({name: tensor[rows, :longest] for name, tensor in features.items()}))
    back = torch.argsort(order)
    return tuple(torch.cat(parts)[back] for parts in zip(*made, strict=True))
