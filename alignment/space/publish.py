"""Create or update a Space: its variables, its hardware, its files.

Place in the flow: `the Space's folder -> the Hub (here)`. The token is that of `hf auth login` or HF_TOKEN; it is never
shown, stored or passed on. Whatever the owner has set in the Space's settings stays, but for the variables that this
command sets itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, SpaceInfo
from huggingface_hub.errors import RepositoryNotFoundError

from alignment.hub import check_login, check_repo_id
from alignment.hub import translate_hub_errors as plain_errors
from alignment.space.folder import Space, contents

AGAIN = "publish again"
_OURS = ("ALIGNMENT_MODEL", "ALIGNMENT_REVISION", "ALIGNMENT_GALLERY")
"""Variables that mean another Space if they are left over from before."""

_FRESH = {"README.md", ".gitattributes"}  # what the Hub itself puts into a new Space
_APP = {"app.py", "alignment/__init__.py"}  # what shows that a Space is one of ours


@dataclass(frozen=True)
class PublishResult:
    """What was done.

    Attributes:
        url: of the Space's page.
        created: whether it is new.
        deleted: files that an earlier version had and this one has not.
        variables: those that were set or taken away.
    """

    url: str
    created: bool
    deleted: tuple[str, ...]
    variables: tuple[str, ...]


def publish(
    space: Space, folder: Path, *, private: bool = False, replace: bool = False, api: HfApi | None = None
) -> PublishResult:
    """Send a Space that was laid out in a folder; files that it no longer has are deleted there.

    Args:
        space: what is published.
        folder: its files, see `stage`.
        private: of a Space that is created now; an existing one stays as it is.
        replace: whether another app that runs under this name may be overwritten.
        api: the Hub to send to, with its token; the public one and the token of the login when None.

    Raises:
        ValueError: when the Hub refuses, or another app runs under this name.
        ConnectionError: when it cannot be reached or breaks off.
    """
    api = api or HfApi()
    check_login(api, AGAIN)
    with plain_errors(space.repo_id, AGAIN, _refusals(space)):
        there = _existing(api, space.repo_id)
    if there is not None and not replace:
        _check_ours(there)
    with plain_errors(space.repo_id, AGAIN, _refusals(space)):
        _settle(api, space, there, private)
        api.upload_folder(
            repo_id=space.repo_id,
            repo_type="space",
            folder_path=folder,
            delete_patterns="*",
            commit_message="Publish the app, its gallery and its model",
        )
        variables = _set_variables(api, space, there)  # last: until then, what runs there finds what it needs
    gone = _files(there) - contents(folder).keys() - {".gitattributes"} if there else set()
    url = f"{api.endpoint}/spaces/{space.repo_id}"
    return PublishResult(url, there is None, tuple(sorted(gone)), variables)


def check_name(repo_id: str) -> None:
    """Refuse a name without its owner, or a malformed one; raises ValueError."""
    check_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} lacks its owner: write USER/NAME.")


def _existing(api: HfApi, repo_id: str) -> SpaceInfo | None:
    try:
        return api.space_info(repo_id)
    except RepositoryNotFoundError:
        return None


def _files(there: SpaceInfo) -> set[str]:
    return {file.rfilename for file in there.siblings or ()}


def _check_ours(there: SpaceInfo) -> None:
    files = _files(there)
    if there.sdk not in (None, "gradio") or not (files >= _APP or files <= _FRESH):
        raise ValueError(
            f"{there.id} on the Hub is another app ({len(files)} files, {there.sdk or 'no SDK'}), and its files would "
            "be deleted: choose another name, or say --replace."
        )


def _settle(api: HfApi, space: Space, there: SpaceInfo | None, private: bool) -> None:
    """Create the Space if need be, on the hardware that was asked for."""
    if there is None:
        api.create_repo(
            space.repo_id,
            repo_type="space",
            space_sdk="gradio",
            space_hardware=space.hardware,  # type: ignore[arg-type]  # a name that the library need not know yet
            private=private or None,
        )
    elif space.hardware and space.hardware != api.get_space_runtime(space.repo_id).requested_hardware:
        api.request_space_hardware(space.repo_id, space.hardware)  # type: ignore[arg-type]


def _set_variables(api: HfApi, space: Space, there: SpaceInfo | None) -> tuple[str, ...]:
    """Set what differs, since each change restarts the Space; returns the names of what was changed."""
    wanted = space.variables
    old = {} if there is None else {key: found.value for key, found in api.get_space_variables(space.repo_id).items()}
    left_over = [key for key in _OURS if key in old and key not in wanted]
    changed = [key for key, value in wanted.items() if old.get(key) != value]
    for key in left_over:
        api.delete_space_variable(space.repo_id, key)
    for key in changed:
        api.add_space_variable(space.repo_id, key, wanted[key])
    return (*changed, *left_over)


def _refusals(space: Space) -> dict[int, str]:
    name, hardware = space.repo_id, space.hardware or "its basic hardware"
    return {
        402: f"The Hub asks for a paid plan or for credits to run {name} on {hardware}: see "
        "https://huggingface.co/pricing, or try --hardware zero-a10g, which some free accounts may use.",
        403: f"This token may not write to {name}: take a name of your own, or a token with the right to write, and "
        "see that the account may use the hardware.",
        404: f"There is no Space {name} that this token may write to: check the name and the token's rights.",
        409: f"The name {name} is taken on the Hub by something that is no Space: choose another.",
    }
