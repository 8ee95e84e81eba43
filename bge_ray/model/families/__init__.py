"""The table of families. A new one is a module beside these, a line here, and its heads in `model.heads`."""

from bge_ray.model.families import (
    bm25,
    cross_encoder,
    dense,
    layerwise_reranker,
    lightweight_reranker,
    llm,
    llm_reranker,
    m3,
)
from bge_ray.model.family import Family

# In the order in which they are asked: the first of a role that recognises a folder has it.
FAMILIES: tuple[Family, ...] = (
    cross_encoder,
    layerwise_reranker,
    lightweight_reranker,
    llm_reranker,
    m3,
    llm,
    bm25,
    dense,
)
