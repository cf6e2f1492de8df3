"""Refuse to publish secrets, paths of this machine and what the Hub would refuse.

Place in the flow: `the Space's folder -> checks (here) -> the Hub`. A secret that was public for a minute has to be
replaced, so anything that looks like one stops the publication.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

MAX_IN_A_FOLDER = 10_000  # files that the Hub takes
LARGE = 10_000_000  # bytes from which the Hub stores a file as a large one
_PEEK = 1 << 13  # bytes from a file's beginning that tell text from weights and pictures
_BATCH = 4096  # texts that are searched together
_SQLITE = b"SQLite format 3\0"
_SECRET_NAME = re.compile(r"\.env.*|id_(rsa|dsa|ecdsa|ed25519)(\..*)?|.*\.(pem|key|p12|pfx|kdbx)|\.?netrc|\.pypirc")
_SECRET_TEXT = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}\b|AIza[\w-]{35}"
    r"|gh[opsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[A-Za-z0-9_-]{30,}|xox[abpr]-[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}|[a-z]{2,12}://[^\s/:@\"'`<>]+:[^\s/:@\"'`<>]+@)"
)
_PASSWORD = re.compile(
    r"\b(password|passwd|passphrase|api[ _-]?key)( is|\s*[:=])\s*\S{4,}|(密码|口令)\s*[:：=是]\s*\S{4,}", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASS|_KEY|CREDENTIAL|^KEY", re.IGNORECASE)


def check_folder(folder: Path, private: Sequence[str] = ()) -> None:
    """Raise ValueError on a file with secrets or `private_paths`, and on more files in a folder than the Hub takes."""
    spellings = [re.escape(spelling) for path in private for spelling in (path, path.replace("\\", "\\\\"))]  # JSON's
    private_path = re.compile(rf"({'|'.join(spellings) or '(?!)'})(?![\w-])")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if _SECRET_NAME.fullmatch(path.name):
            raise ValueError(f"{name} has the name of a file that holds a secret: take it away, and publish again.")
        texts = _texts(path)
        while batch := list(islice(texts, _BATCH)):
            _check_texts(name, batch, private_path)
    for parent, count in Counter(path.relative_to(folder).parent.as_posix() for path in paths).items():
        if count > MAX_IN_A_FOLDER:
            limit = f"the Hub takes {MAX_IN_A_FOLDER:,} in a folder"
            raise ValueError(f"{parent} holds {count:,} files, and {limit}: publish a smaller gallery.")


def _texts(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, or the texts in the tables of an SQLite database."""
    with path.open("rb") as file:
        start = file.read(_PEEK)
    if start.startswith(_SQLITE):
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
                for value in chain.from_iterable(database.execute(f'SELECT * FROM "{table}"')):
                    if isinstance(value, str):
                        yield value
                    elif isinstance(value, bytes) and b"\0" not in value:
                        yield value.decode("utf-8", "replace")
    elif b"\0" not in start:
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield from lines


def _check_texts(name: str, texts: Sequence[str], private_path: re.Pattern[str]) -> None:
    secrets = [_SECRET_TEXT] if name.endswith(".py") else [_SECRET_TEXT, _PASSWORD]  # code names variables "password"
    if found := next(filter(None, (_search(pattern, texts) for pattern in secrets)), None):
        raise ValueError(f"{name} holds what looks like a secret ({found[:6]}...): take it out, and publish again.")
    if found := _search(private_path, texts):
        raise ValueError(f"{name} names a folder of this machine ({found}): take it out, and publish again.")


def _search(pattern: re.Pattern[str], texts: Sequence[str]) -> str:
    """Return the first match in any of the texts, or "".

    They are searched joined, which takes a tenth of the time, and one by one only after a match, which may have been
    one across two texts.
    """
    if not pattern.search("\n".join(texts)):
        return ""
    return next((found.group() for text in texts if (found := pattern.search(text))), "")


def check_variables(variables: Mapping[str, str]) -> None:
    """Refuse a variable that looks like a secret, as variables are public; raises ValueError."""
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} is no name for a variable: use letters, digits and '_'.")
        if _SECRET_TEXT.search(value) or _SECRET_VARIABLE.search(name):
            advice = "set it under Secrets in the settings of the Space instead"
            raise ValueError(f"{name} looks like a secret, and everybody may read a Space's variables: {advice}.")


def private_paths(*folders: Path) -> list[str]:
    """List spellings of this machine's folders that must not be published; those too short to tell are left out."""
    whole = [folder.expanduser() for folder in folders]
    found = {str(path) for folder in whole for path in (folder.absolute(), folder.resolve())}
    return sorted(path for path in found if len(Path(path).parts) > 2)
