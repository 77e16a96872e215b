"""Whether near-copies are more than chance explains. The interval of `near_copy_share` takes the threshold as
given; this does not."""

from __future__ import annotations

import math

from scipy import stats


def near_copy_p_value(near: int, generated: int, quantile: float, test: int) -> float:
    """Chance of at least `near` near-copies if generated images were as near to the training images as test
    images are.

    The threshold is a quantile of `test` distances, so it is as noisy as they are few. If the distances of
    both sets come from one distribution, the number of generated ones below the j-th smallest of the test
    set's is beta-binomial with parameters (j, test - j + 1), whatever the distribution (Wilks, Ann. Math.
    Statist. 13, 1942). numpy's quantile lies between the j-th and its successor, which is taken: the larger
    of the two, and so the cautious choice.

    Args:
        near: generated images at or below the threshold.
        generated, test: images in the two sets, each at least 1.
        quantile: of the test distances, in (0, 1).

    Raises:
        ValueError: a count is impossible.
    """
    if not 0 <= near <= generated or min(generated, test) < 1:
        raise ValueError(
            f"`0 <= near <= generated` and `test >= 1` must hold, but got near={near}, "
            f"generated={generated}, test={test}; "
            "count the images again"
        )
    rank = min(math.floor(quantile * (test - 1)) + 2, test)
    return float(stats.betabinom.sf(near - 1, generated, rank, test - rank + 1))


def nearer_p_value(z: float) -> float:
    """Chance of a Mann-Whitney statistic as low as `z` if generated images lie as near as test images do: the
    normal's lower tail."""
    return float(stats.norm.cdf(z))
