"""Floor 1: say what mends an error of the file system."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)


def describe_error(error: Exception, again: str = "run the same command again") -> str:
    """Say for the user of a command what went wrong and, for a file error, what mends it."""
    if not isinstance(error, OSError):
        return str(error)
    code, place = error.errno, error.filename2 or error.filename
    if code in FULL:
        where = f" where {place} lies" if place else ""
        text = f"There is no room left{where}: free some, or choose another folder, and {again}."
        return f"{text} What was there before is as it was."
    if code in FORBIDDEN and place:
        return f"{place} may not be read or written ({error.strerror}): change its permissions, or choose another one."
    if code in _IN_THE_WAY and place:
        return f"{place} is in the way ({error.strerror}): move it, or choose another folder, and {again}."
    return str(error)
