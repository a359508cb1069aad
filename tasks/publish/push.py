"""Push a published folder to the Hub. The same content makes one commit only. No error shows the token."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.artifacts.keys import folder_digest
from smoltulu.schemas.publish import PublishSettings, PushResult

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Deleted on the Hub where the new publication lacks them: a loader would read them beside the new weights.
_STALE = ["*.safetensors", "*.safetensors.index.json"]
#: Status -> what the user must fix.
_REFUSALS = {
    401: "the Hub does not accept HF_TOKEN (401): it is mistyped, expired or revoked; make a new one with write "
    "permission and set HF_TOKEN",
    403: "HF_TOKEN has no permission to write there (403); use a token with write permission for its owner",
    404: "the Hub does not find it, or HF_TOKEN may not see it (404)",
}


def check_repository_name(repository: str) -> None:
    """ValueError unless `repository` is owner/name as the Hub allows it."""
    odd = "--" in repository or ".." in repository or repository.endswith((".git", "."))
    if odd or not _REPOSITORY.fullmatch(repository):
        raise ValueError(
            f"publish.repository {repository!r} is not a Hub repository: write owner/name with letters, digits, "
            "'-', '_' and '.', e.g. my-name/smoltulu"
        )


def check_push_access(settings: PublishSettings, token: str | None) -> None:
    """Called when a flow starts, so that days of training do not end at a wrong token.

    Raises:
        ValueError: bad repository name or token, no write permission, or an owner that the token may not create under.
        ConnectionError: the Hub cannot be reached.
    """
    if settings.repository is None:
        return
    check_repository_name(settings.repository)
    if not token:
        return
    owner = settings.repository.partition("/")[0]
    with _clear_errors(settings.repository):
        me = _api(token).whoami()
    access = me.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise ValueError(
            f"HF_TOKEN may only read; pushing to {settings.repository} needs a token with write permission "
            "(huggingface.co/settings/tokens)"
        )
    owners = {me["name"], *(organisation["name"] for organisation in me.get("orgs", []))}
    if owner not in owners:
        raise ValueError(
            f"HF_TOKEN belongs to {me['name']}, which cannot create repositories under {owner!r}; "
            f"publish.repository may start with: {', '.join(sorted(owners))}"
        )


def push_model(folder: Path, settings: PublishSettings, token: str | None) -> PushResult:
    """Make the branch's content that of `folder`. The same content again makes no commit.

    Raises:
        ValueError: bad repository name or token, no permission.
        ConnectionError: the Hub cannot be reached or failed; running again goes on.
    """
    if settings.repository is None:
        return PushResult(pushed=False, reason="stayed local: the recipe sets no publish.repository")
    check_repository_name(settings.repository)
    repository, branch = settings.repository, settings.branch
    if not token:
        return PushResult(
            pushed=False,
            repository=repository,
            branch=branch,
            reason=f"stayed local: no HF_TOKEN in the environment to push to {repository} with",
        )
    with _clear_errors(repository):
        api = _api(token)
        api.create_repo(repository, private=settings.private, exist_ok=True)
        if branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        before = api.model_info(repository, revision=branch).sha
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            revision=branch,
            delete_patterns=_STALE,
            commit_message=f"smoltulu publication {folder_digest(folder)[:16]}",
        ).oid
    if commit == before:
        reason = f"{repository}@{branch} has this content already ({commit[:8]}); no commit was made"
    else:
        reason = f"pushed to {repository}@{branch} ({commit[:8]})"
    return PushResult(pushed=commit != before, repository=repository, branch=branch, commit=commit, reason=reason)


def _api(token: str) -> HfApi:
    from huggingface_hub import HfApi, constants

    # Through Xet an upload may become several commits; a publication is one. The variable HF_HUB_DISABLE_XET is read at
    # import, which may have been long ago.
    constants.HF_HUB_DISABLE_XET = True
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


@contextmanager
def _clear_errors(repository: str) -> Iterator[None]:
    """Turn what the client raises into ValueError (the user's to fix) and ConnectionError (try again).

    `from None`: the client's own errors hold the request, and with it the token's header.
    """
    import httpx2  # what huggingface_hub 2.x speaks HTTP with
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise ConnectionError(f"cannot push to {repository}: HF_HUB_OFFLINE is set; unset it and run again") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 412:
            raise ConnectionError(
                f"cannot push to {repository}: someone else pushed at the same moment (412); run again"
            ) from None
        if status >= 500 or status == 429:
            raise ConnectionError(f"the Hub answered {status} while pushing to {repository}; run again later") from None
        reason = _REFUSALS.get(status, f"the Hub refused it with status {status}")
        raise ValueError(f"cannot push to {repository}: {reason}") from None
    except httpx2.HTTPError as error:
        raise ConnectionError(
            f"cannot reach the Hub to push to {repository} ({type(error).__name__}); check the network and run again"
        ) from None
