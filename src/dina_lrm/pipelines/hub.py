"""The Hugging Face hub: files of a repository in, the folder of a checkpoint out; faults in one sentence."""

import re
from collections.abc import Sequence
from pathlib import Path

from dina_lrm.errors import HubError, InvalidInputError, MissingComponentError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: object) -> bool:
    """Has it the form owner/name?"""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def download(repo: str, wanted: list[str], unwanted: list[str] | None, revision: str | None) -> Path:
    """Files of a hub repository, from the local cache where they are there already.

    Raises:
        MissingComponentError: no such repository or revision, no access, or no network.
    """
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, allow_patterns=wanted, ignore_patterns=unwanted, revision=revision
            )
        )
    except Exception as error:  # the hub client raises its own, the HTTP library's and OS errors
        raise MissingComponentError(
            f"{repo!r} is not a local folder, and fetching {', '.join(wanted)} from the hub failed: "
            f"{_reason(error, repo, revision)}"
        ) from error


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool | None,
    token: str | None,
    message: str,
    replaced: Sequence[str],
) -> str:
    """One commit with the files of a folder, in a repository that is made if there is none; its address.

    Args:
        replaced: patterns of files that are deleted where the folder has no such file.

    Raises:
        InvalidInputError: `repo` is no owner/name.
        HubError: no token, one that may not write there, or no network.
    """
    import huggingface_hub

    if not is_hub_id(repo):
        raise InvalidInputError(f"repo_id = {repo!r}: it must be owner/name, such as someone/my-reward")
    if (token or huggingface_hub.get_token()) is None:
        raise HubError(
            "the hub needs a token with write access: log in with `hf auth login`, set HF_TOKEN, "
            "or pass token=..."
        )
    hub = huggingface_hub.HfApi(token=token)
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=list(replaced)
        )
    except Exception as error:  # as above
        raise HubError(f"uploading to {repo!r} failed: {_reason(error, repo, None)}") from error
    return str(commit.commit_url)


def _reason(error: Exception, repo: str, revision: str | None) -> str:
    """What went wrong, in one sentence of ours, or the first line of theirs."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    match error:
        case errors.GatedRepoError():
            return (
                f"access to it must be granted at {hub}/{repo}, and a token of that account be set (HF_TOKEN)"
            )
        case errors.RepositoryNotFoundError():
            return f"there is no repository {repo} at {hub}, or it is private and no token with access is set"
        case errors.RevisionNotFoundError():
            return f"{repo} has no branch, tag or commit {revision!r}"
        case errors.LocalEntryNotFoundError():
            cause = error.__cause__
            if isinstance(cause, errors.HfHubHTTPError):
                return _reason(cause, repo, revision)
            return f"{hub} cannot be reached, and the local cache lacks some of it ({_first(cause or error)})"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{hub} does not accept the token for this ({_first(error)})"
    cause = f": {_first(error.__cause__)}" if error.__cause__ is not None else ""
    return f"{_first(error)}{cause} ({hub})"


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
