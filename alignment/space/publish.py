"""Create or update a Space: its variables, its hardware, its files.

Place in the flow: `the Space's folder -> the Hub (here)`. The token is that of `hf auth login` or HF_TOKEN; it is never
shown, stored or passed on. The owner's settings stay, except for the variables that this command sets.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, SpaceInfo
from huggingface_hub.errors import RepositoryNotFoundError

from alignment.hub import check_repo_id, translate_hub_errors
from alignment.space.folder import Space, contents

AGAIN = "publish again"
_OURS = ("ALIGNMENT_MODEL", "ALIGNMENT_REVISION", "ALIGNMENT_GALLERY")  # deleted if an earlier version has left them
_FRESH = {"README.md", ".gitattributes"}  # the Hub puts these into a new Space
_APP = {"app.py", "alignment/__init__.py"}  # a Space with both runs this app


@dataclass(frozen=True)
class PublishResult:
    """The page, whether the Space is new, the files deleted, and the variables set or deleted."""

    url: str
    created: bool
    deleted: tuple[str, ...]
    variables: tuple[str, ...]


def publish(
    space: Space, folder: Path, *, private: bool = False, replace: bool = False, api: HfApi | None = None
) -> PublishResult:
    """Upload the folder of a Space, see `stage`; files on the Hub that the folder lacks are deleted.

    Only a new Space becomes `private`; with `replace`, another app that runs under this name is overwritten. By default
    `api` is the public Hub with the token of the login. Raises ValueError when the Hub refuses, or another app runs
    under this name, and ConnectionError when the Hub cannot be reached or disconnects.
    """
    api = api or HfApi()
    with translate_hub_errors(space.repo_id, AGAIN, _refusals(space)):
        there = _existing(api, space.repo_id)
        files = {file.rfilename for file in there.siblings or ()} if there else set()
        if there and not replace:
            _check_ours(there, files)
        _create(api, space, there, private)
        message = "Publish the app, its gallery and its model"
        api.upload_folder(
            repo_id=space.repo_id, repo_type="space", folder_path=folder, delete_patterns="*", commit_message=message
        )
        variables = _set_variables(api, space, there)  # last: the running version needs the old ones
    deleted = tuple(sorted(files - contents(folder).keys() - {".gitattributes"}))
    return PublishResult(f"{api.endpoint}/spaces/{space.repo_id}", there is None, deleted, variables)


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


def _check_ours(there: SpaceInfo, files: set[str]) -> None:
    if there.sdk not in (None, "gradio") or not (files >= _APP or files <= _FRESH):
        raise ValueError(
            f"{there.id} on the Hub is another app ({len(files)} files, {there.sdk or 'no SDK'}), and its files would "
            "be deleted: choose another name, or say --replace."
        )


def _create(api: HfApi, space: Space, there: SpaceInfo | None, private: bool) -> None:
    """Create the Space if it does not exist, and request its hardware."""
    name, hardware = space.repo_id, cast(Any, space.hardware)  # the Hub may know more names than its library
    if there is None:
        options = {"space_sdk": "gradio", "space_hardware": hardware, "private": private or None}
        api.create_repo(name, repo_type="space", **options)
    elif hardware and hardware != api.get_space_runtime(name).requested_hardware:
        api.request_space_hardware(name, hardware)


def _set_variables(api: HfApi, space: Space, there: SpaceInfo | None) -> tuple[str, ...]:
    """Set variables that differ, as each change restarts the Space; returns the names set or deleted."""
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
