"""Which images show the same picture in other bytes: encoded again, resized, in another format.

An image's thumbnail is what is compared: 16 x 16 luma and 4 x 4 of each chroma. Two are twins if no field differs by
more than a tolerance: encoding moves all fields a little, while look-alikes differ much in few (a drawn face with
another mouth, a clock an hour later), which is what hashes of 64 bits cannot tell apart. Keys, so that only images
that share one need be compared, are 4 bands of 24 signs of the thumbnail's low frequencies.

`benchmarks/corpus_twins.json` has how many copies are found and how many look-alikes are taken for copies. Not found:
crops, mirrored or turned images, added borders or writing.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 16
THUMBNAIL_BYTES = SIDE * SIDE + 2 * 4 * 4
LUMA_TOLERANCE = 12  # of 255
CHROMA_TOLERANCE = 9
_BANDS, _BITS = 4, 24
_ONE = SIDE * SIDE / 4  # a coefficient of amplitude 1 in grey levels
# Signs of coefficients near 0 would be noise: a bit says whether a coefficient is above 1, and one that is nearer to 1
# than the margin gives a second key with that bit turned. Found on all of 5,600 pairs then (99.6 % with one key each).
_THRESHOLD, _MARGIN = 1.0, 0.15


def small(image: Image.Image, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """An image as [16, 16, 3] bytes of luma, blue and red chroma, on white where it is transparent.

    Args:
        box: the part of the image that is the picture, if not all of it.
    """
    if image.mode.startswith(("I", "F")):  # 16 bits, or more; a conversion by Pillow would cut at 255
        values = np.asarray(image)
        values = values / 257 if values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode not in ("RGB", "YCbCr", "L", "RGBA", "LA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
    if image.mode in ("RGBA", "LA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return np.asarray(image.convert("YCbCr"))


def thumbnails(smalls: np.ndarray) -> np.ndarray:
    """[N, 16, 16, 3] bytes -> [N, THUMBNAIL_BYTES] bytes."""
    number = len(smalls)
    chroma = smalls[..., 1:].reshape(number, 4, 4, 4, 4, 2).mean(axis=(2, 4), dtype=np.float64)
    chroma = np.rint(chroma).astype(np.uint8).reshape(number, THUMBNAIL_BYTES - SIDE * SIDE)
    return np.concatenate([smalls[..., 0].reshape(number, SIDE * SIDE), chroma], axis=1)


def are_twins(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether one thumbnail [THUMBNAIL_BYTES] shows the same as each of [N, THUMBNAIL_BYTES] -> [N] bool."""
    luma = one[: SIDE * SIDE].astype(np.int16)
    # A picture of little contrast is moved less by encoding, and its look-alikes differ less.
    tolerance = min(LUMA_TOLERANCE, 3 + (luma.max() - luma.min()) // 8)
    differences = np.abs(others - one.astype(np.int16))
    return (differences[:, : SIDE * SIDE].max(axis=1, initial=0) <= tolerance) & (
        differences[:, SIDE * SIDE :].max(axis=1, initial=0) <= CHROMA_TOLERANCE
    )


def _basis() -> np.ndarray:
    """[16, 16]: the cosines of a DCT as whole numbers, so that sums are exact and equal on every machine."""
    places, waves = np.arange(SIDE), np.arange(SIDE)[:, None]
    return np.rint(1024 * np.cos(np.pi * (2 * places + 1) * waves / (2 * SIDE)))


def _order() -> tuple[np.ndarray, np.ndarray]:
    """The lowest 96 frequencies but the mean, shuffled once, so that each band has of all."""
    found = sorted(((a, b) for a in range(SIDE) for b in range(SIDE) if a + b), key=lambda at: (at[0] + at[1], at))
    chosen = np.array(found[: _BANDS * _BITS])[np.random.RandomState(0).permutation(_BANDS * _BITS)]
    return chosen[:, 0], chosen[:, 1]


_COSINES, (_ROWS, _COLUMNS) = _basis(), _order()


def keys(thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys of [N, THUMBNAIL_BYTES] thumbnails: 4 to 8 of each.

    Returns:
        [K] the number of the thumbnail, [K] its key (unsigned 64 bits; twins share at least one).
    """
    luma = thumbs[:, : SIDE * SIDE].reshape(len(thumbs), SIDE, SIDE).astype(np.float64)
    waves = (_COSINES @ luma @ _COSINES.T)[:, _ROWS, _COLUMNS] / (1024**2 * _ONE) - _THRESHOLD
    waves = waves.reshape(len(thumbs), _BANDS, _BITS)
    weight = np.uint64(1) << np.arange(_BITS, dtype=np.uint64)
    bits = ((waves > 0) * weight).sum(axis=2, dtype=np.uint64)
    weakest = np.abs(waves).argmin(axis=2)
    is_weak = np.abs(waves).min(axis=2) < _MARGIN
    other = bits ^ weight[weakest]
    band = np.arange(_BANDS, dtype=np.uint64) << np.uint64(_BITS)
    numbers = np.broadcast_to(np.arange(len(thumbs))[:, None], bits.shape)
    return np.concatenate([numbers.ravel(), numbers[is_weak]]), np.concatenate(
        [(bits | band).ravel(), (other | band)[is_weak]]
    )
