"""The error for input that the person at the keyboard can correct."""

from functools import partial


class InputError(ValueError):
    """Input that the person at the keyboard can correct; `str(error)` is shown verbatim.

    Args:
        message: English template; `values` are filled in with `str.format`.
        code: stable dotted key ("image.truncated") under which the page looks up the message in another language.
        **values: numbers and names in the message, for that translation.
    """

    def __init__(self, message: str, code: str = "input.invalid", **values: object) -> None:
        super().__init__(message.format(**values) if values else message)
        self.code = code
        self.values = values


damaged = partial(InputError, "The picture is damaged or cut off; copy or download it again.", "image.truncated")
empty = partial(InputError, "The file is empty; choose one with a picture in it.", "image.empty")
unsupported = partial(InputError, "{kind} cannot be read here; save the picture as JPEG or PNG.", "image.unsupported")

_OPTION_OF_CODE = {"image.too_large": "--max-megapixels N", "image.too_narrow": "--max-aspect-ratio N"}


def message_with_option(error: InputError) -> str:
    """Return the message, followed by the command-line option that would accept the picture, if there is one."""
    option = _OPTION_OF_CODE.get(error.code)
    return f"{error} Or say {option}." if option else str(error)
