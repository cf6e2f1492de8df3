"""The one error for what the person at the keyboard can mend, and the one that every part of the door may raise."""


class InputError(ValueError):
    """What the person at the keyboard can mend; `str(error)` is a sentence fit to be shown.

    Args:
        message: English template; `values` are filled in with `str.format`.
        code: stable dotted key ("image.truncated"), so that a page can say it in another language.
        **values: what the message names, for that other language.
    """

    def __init__(self, message: str, code: str = "input.invalid", **values: object) -> None:
        super().__init__(message.format(**values) if values else message)
        self.code = code
        self.values = values


def damaged() -> InputError:
    """Say that a picture cannot be decoded."""
    return InputError("The picture is damaged or cut off; copy or download it again.", "image.truncated")


_LIFTED_BY = {"image.too_large": "--max-megapixels N", "image.too_narrow": "--max-aspect-ratio N"}


def message_with_option(error: InputError) -> str:
    """Say why a picture is refused, and which option of the commands lets it in, if there is one."""
    option = _LIFTED_BY.get(error.code)
    return f"{error} Or say {option}." if option else str(error)
