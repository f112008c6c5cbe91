"""Numbers that encode positions: frequencies, slopes and buckets of distances."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fletcher.models.onnx.architecture import NUM_BUCKETS
from fletcher.models.onnx.encoder import Array

_MAX_DISTANCE = 128  # smallest distance that falls into the last bucket


def yarn_frequencies(
    frequencies: Array, theta: float, yarn: tuple[float, ...]
) -> tuple[Array, np.float32]:
    """Frequencies scaled by YaRN, [width / 2], and the factor of sines and cosines.

    Slow rotations are slowed down by the factor, fast ones stay as they are, and those between are
    mixed (https://arxiv.org/abs/2309.00071, section 3.2).
    """
    factor, positions, fast, slow, scale, truncate = yarn
    width = 2 * len(frequencies)

    def bound(rotations: float) -> float:
        return width * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = bound(fast), bound(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (np.arange(width // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    slowed = np.clip(ramp, 0, 1).astype(np.float32)
    mixed = frequencies / np.float32(factor) * slowed + frequencies * (1 - slowed)
    return np.asarray(mixed, np.float32), np.float32(scale)


def alibi_slopes(num_heads: int) -> Array:
    """ALiBi's slopes, float32 [heads, 1, 1]: the negative bias for a distance of 1.

    If the number of heads is not a power of 2, the slopes for the next lower power come first.
    Every second slope for the next higher power is appended
    (https://github.com/ofirpress/attention_with_linear_biases, `get_slopes`).
    """

    def slopes(number: int) -> list[float]:
        return [2.0 ** (-8 * (index + 1) / number) for index in range(number)]

    power = 2 ** int(math.log2(num_heads))
    found = slopes(power) + slopes(2 * power)[0::2][: num_heads - power]
    return -np.array(found, np.float32)[:, None, None]


def distance_buckets(distances: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bucket index of each distance, as in T5.

    See https://arxiv.org/abs/1910.10683, section 2.1. Half of the buckets are for earlier tokens,
    and half are for later tokens. Each short distance has its own bucket. Long distances share
    buckets, whose ranges grow logarithmically.
    """
    half, exact = NUM_BUCKETS // 2, NUM_BUCKETS // 4
    away = np.abs(distances)
    # Computed in float32 and truncated, as in PyTorch: distances at a bucket's edge must get the
    # same bucket.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(_MAX_DISTANCE / exact)
    )
    far = exact + (ratio * np.float32(half - exact)).astype(np.int64)
    bucket = np.where(away < exact, away, np.minimum(far, half - 1))
    buckets: npt.NDArray[np.int64] = bucket + half * (distances > 0)
    return buckets
