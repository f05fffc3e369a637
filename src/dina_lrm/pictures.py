"""One way from a decoded picture to plain RGB, so that a picture is trained on as it is scored."""

import numpy as np
from PIL import Image, ImageOps

from dina_lrm.errors import InvalidInputError

__all__ = ["upright_rgb"]


def upright_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """The picture as a viewer shows it, in 8-bit RGB.

    EXIF rotation is applied, transparency becomes white, grey gets three channels, 16- and 32-bit grey is
    scaled (PIL's own conversion clips it).

    Raises:
        InvalidInputError: floating pixels outside [0, 1]; `name` says which picture.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" and not (np.isfinite(values).all() and 0 <= values.min() and values.max() <= 1):
            raise InvalidInputError(f"{name} has floating pixels outside [0, 1]")
        top = 1.0 if image.mode == "F" else 65535.0
        return Image.fromarray(np.rint(255 * (values / top).clip(0, 1)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
