"""How evenly vectors fill the lists, and whether new vectors still fit the training."""

import math

import numpy as np
import numpy.typing as npt

from bge_ray.errors import IndexBuildError
from bge_ray.records.ids import IdArray


def imbalance(sizes: IdArray) -> float:
    """Return how many times longer a search scans than over lists of equal size.

    1 is perfect; nlist means that one list holds everything. k-means on embeddings gives 1.1 to 2.

    Args:
        sizes: (nlist,) vectors in each list.
    """
    total = float(sizes.sum())
    if total == 0:
        return 1.0
    return float(len(sizes) * np.square(sizes / total).sum())


def drift(before: IdArray, new: IdArray) -> float:
    """Measure how differently new vectors spread over the lists than those before.

    It is the share of new vectors that would have to move to another list to restore the old
    shares, less what chance alone moves with this few vectors. 0: no more than chance; 0.5: half of the new
    vectors lie where nothing was; 1: none lies where something was.

    Args:
        before: (nlist,) list sizes of the index, or of the parts since the training.
        new: (nlist,) list sizes of the new parts.

    Returns:
        A number in [0, 1]; 0 if either side is empty.

    Raises:
        IndexBuildError: the two have different numbers of lists.
    """
    if before.shape != new.shape:
        raise IndexBuildError(f"list sizes of {before.shape} and {new.shape} lists cannot be compared")
    n_before, n_new = float(before.sum()), float(new.sum())
    if not n_before or not n_new:
        return 0.0
    distance = 0.5 * np.abs(before / n_before - new / n_new).sum()
    # Two samples of one distribution differ like one sample of the harmonic size from the truth.
    n_effective = n_before * n_new / (n_before + n_new)
    shares = (before + new) / (n_before + n_new)
    chance = 0.5 * _mean_deviation(n_effective * shares).sum() / n_effective
    return float(np.clip((distance - chance) / (1 - min(chance, 0.999)), 0, 1))


def _mean_deviation(mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """E|X - mean| of Poisson counts: 2 exp(-m) m^(floor(m) + 1) / floor(m)! (De Moivre)."""
    mean = mean[mean > 0]
    whole = np.floor(mean)
    log_factorial = np.array([math.lgamma(count + 1) for count in whole.tolist()])
    deviation: npt.NDArray[np.float64] = 2 * np.exp(-mean + (whole + 1) * np.log(mean) - log_factorial)
    return deviation
