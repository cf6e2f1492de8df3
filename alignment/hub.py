"""Floor 1, the Hugging Face Hub: names, login and errors; `train` and `space` upload in `translate_hub_errors`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError on a malformed repository name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is no name for a repository on the Hub: write USER/NAME in letters, digits, '-', '_' and '.'."
        ) from error


def check_login(api: HfApi, again: str = "push again") -> None:
    """Raise ValueError without a token, neither the client's nor that of the login."""
    if api.token is False or not (api.token or get_token()):
        raise ValueError(f"Not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN, and {again}.")


@contextmanager
def translate_hub_errors(
    repo_id: str, again: str = "push again", refusals: Mapping[int, str] | None = None
) -> Iterator[None]:
    """Turn the Hub's errors into built-in exceptions whose message says what to do.

    That is a ValueError when the Hub refuses, else a ConnectionError. `again` says what to do once the cause is gone;
    `refusals` replace the general message for an HTTP status.
    """
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"The Hugging Face Hub is switched off (HF_HUB_OFFLINE): unset the variable, and {again}."
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(error, repo_id, again, refusals or {}) from error
    except (HTTPError, ConnectionError, PermissionError, TimeoutError, RuntimeError) as error:
        raise ConnectionError(
            f"The Hugging Face Hub cannot be reached, or broke off ({type(error).__name__}): check the network and "
            f"{again}; what has arrived is not sent twice."
        ) from error


def _refusal(error: HfHubHTTPError, repo_id: str, again: str, refusals: Mapping[int, str]) -> Exception:
    status = error.response.status_code
    foreign = f"This account may not write to {repo_id}: take a name of your own, or a token with the right to write."
    known = {
        400: f"The Hub refuses what was sent to {repo_id}: {error.server_message or error}.",
        401: f"The Hub does not accept the token: run `hf auth login` with a valid one, and {again}.",
        **dict.fromkeys((402, 403, 404), foreign),
        409: f"The name {repo_id} is taken on the Hub: choose another.",
        **refusals,
    }
    if status in known:
        return ValueError(known[status])
    return ConnectionError(f"The Hub answered with an error ({status}): {again} later.")
