"""A decoded image cut to its bucket, as training cuts it."""

from library.data.pixels import to_pixels
from library.data.transforms import apply_crop, crop_info
from library.sizes import Size


def load_sample(image, placement, *, flip=False, crop_rng=None, interpolation=None):
    """Pixels (3, H, W) in [-1, 1] and the record of the crop; `crop_rng` draws its place, else it is the centre."""
    original = Size(image.shape[1], image.shape[0])
    crop = crop_info(original, placement, flipped=flip, rng=crop_rng)
    return to_pixels(apply_crop(image, crop, interpolation=interpolation)), crop
