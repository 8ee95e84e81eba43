"""What is asked of the layer-wise and the lightweight reranker, for the goldens and for the tests."""

# Cut-off layers by name; None for a model's last.
CUTS: dict[str, list[int] | None] = {
    "last": None,
    "4": [4],
    "6": [6],
    "2,4,6": [2, 4, 6],
    "3,5": [3, 5],
    "3,4,5": [3, 4, 5],
}
# Ratio and layers of a compression by name, of the cuts COMPRESSED.
COMPRESSIONS: dict[str, tuple[int, list[int]]] = {
    "1@2": (1, [2]),
    "2@2": (2, [2]),
    "4@2,3": (4, [2, 3]),
    "8@1,2": (8, [1, 2]),
    "2@0,5": (2, [0, 5]),
}
COMPRESSED = ("4", "3,4,5", "6")
