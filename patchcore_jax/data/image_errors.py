"""Names what can be wrong with an image file."""


class ImageError(ValueError):
  """An image or mask file that cannot be used; the message names the file and the remedy."""


class UnknownFormatError(ImageError):
  """The content is of none of `image_contents.FORMATS`."""


class TooManyPixelsError(ImageError):
  """The header tells of more pixels than are allowed; none was decoded."""
