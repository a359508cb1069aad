"""Push a published folder to the Hub. The same content makes one commit only. No error shows the token."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.keys import folder_records, records_digest
from smoltulu.schemas.artifact import FileRecord
from smoltulu.schemas.publish import PublishSettings, PushResult

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: Deleted on the Hub where the new publication lacks them: a loader would take them for a part of it.
_LOADED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5"),
    *("*.msgpack", "*.gguf", "*.onnx", "*.model", "*.py", "adapter_config.json", "config.json"),
    *("generation_config.json", "quantize_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", "additional_chat_templates/*"),
    *("preprocessor_config.json", "processor_config.json"),
)
#: Status -> what the user must fix.
_REFUSALS = {
    401: "the Hub does not accept HF_TOKEN (401): it is mistyped, expired or revoked; make a new one with write "
    "permission and set HF_TOKEN",
    403: "HF_TOKEN has no permission to write there (403); use a token with write permission for its owner",
    404: "the Hub does not find it, or HF_TOKEN may not see it (404)",
}
_TOKENS_PAGE = "huggingface.co/settings/tokens"


def check_push_access(settings: PublishSettings, token: str | None, base_model: str | None = None) -> str | None:
    """Called when a flow starts, so that days of training do not end at a push that is refused.

    base_model  Hub repository of the base, for the card's metadata

    Returns: what the user should know at the start; None where there is nothing.

    Raises:
        ValueError: a bad token, no permission to write to the repository or to create it, a public repository where the
            recipe asks for a private one, or a card that the Hub refuses (a license that it does not know).
        ConnectionError: the Hub cannot be reached.
    """
    repository = settings.repository
    if repository is None:
        return None
    if not token:
        return (
            f"publish.repository is {repository} and HF_TOKEN is not set: the model will stay local. To have it "
            "pushed, set HF_TOKEN before the worker starts"
        )
    with _clear_errors(repository):
        api = _api(token)
        me = api.whoami()
        _check_permission(me, repository, exists=_check_visibility(api, settings))
        api._validate_yaml(_metadata(settings, base_model))
    return None


def push_model(
    folder: Path, records: Mapping[str, FileRecord], settings: PublishSettings, token: str | None
) -> PushResult:
    """Make the branch's content that of `folder`. The same content again makes no commit.

    records  what the folder must hold, by name: nothing else is sent

    Raises:
        ValueError: a file that is not what its record says, a link, a public repository where a private one is asked
            for, a bad token, no permission.
        ConnectionError: the Hub cannot be reached or failed; running again goes on.
    """
    if settings.repository is None:
        return PushResult(pushed=False, reason="stayed local: the recipe sets no publish.repository")
    repository, branch = settings.repository, settings.branch
    if not token:
        return PushResult(
            pushed=False,
            repository=repository,
            branch=branch,
            reason=f"stayed local: no HF_TOKEN in the environment to push to {repository} with",
        )
    _check_files(folder, records)
    with _clear_errors(repository):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api = _api(token)
        api.create_repo(repository, private=settings.private, exist_ok=True)
        _check_visibility(api, settings)
        if branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        info = api.model_info(repository, revision=branch)
        there = [sibling.rfilename for sibling in info.siblings or ()]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in records),
                *(CommitOperationDelete(path_in_repo=name) for name in there if _is_stale(name, records)),
            ],
            revision=branch,
            commit_message=f"smoltulu publication {records_digest(dict(records))[:16]}",
        ).oid
    if commit == info.sha:
        reason = f"{repository}@{branch} has this content already ({commit[:8]}); no commit was made"
    else:
        reason = f"pushed to {repository}@{branch} ({commit[:8]})"
    return PushResult(pushed=commit != info.sha, repository=repository, branch=branch, commit=commit, reason=reason)


def _is_stale(name: str, records: Mapping[str, FileRecord]) -> bool:
    # A loader reads the top folder and these two; other folders are the user's.
    is_read = "/" not in name or name.startswith(("additional_chat_templates/", "custom_generate/"))
    return name not in records and is_read and any(fnmatch(name, pattern) for pattern in _LOADED)


def _check_files(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """ValueError unless the folder holds the recorded files byte by byte, and nothing else."""
    found = folder_records(folder)
    differing = sorted(name for name in {*found, *records} if found.get(name) != records.get(name))
    if differing or not records:
        raise ValueError(
            f"nothing is pushed: {folder} is not what its manifest says ({', '.join(differing[:5]) or 'no files'}); "
            "run smoltulu verify, which has it made again"
        )


def _check_visibility(api: HfApi, settings: PublishSettings) -> bool:
    """Whether the repository exists. ValueError where it is public and the recipe asks for a private one."""
    from huggingface_hub.errors import RepositoryNotFoundError

    assert settings.repository is not None
    try:
        info = api.model_info(settings.repository)
    except RepositoryNotFoundError:
        return False
    if settings.private and not info.private:
        raise ValueError(
            f"publish.private is true, and {settings.repository} exists and is public: everybody would see the model. "
            "Make it private in its settings on the Hub, name another publish.repository, or set publish.private: false"
        )
    return True


def _check_permission(me: Mapping[str, Any], repository: str, exists: bool) -> None:
    """ValueError where what the Hub says of the token does not allow to write there, or to create it."""
    owner = repository.partition("/")[0]
    access = me.get("auth", {}).get("accessToken", {})
    role = access.get("role")
    if role == "read":
        raise ValueError(
            f"HF_TOKEN may only read; pushing to {repository} needs a token with write permission ({_TOKENS_PAGE})"
        )
    # Readers of an organisation cannot create; what the Hub does not say is not held against the token.
    roles = {organisation["name"]: organisation.get("roleInOrg") for organisation in me.get("orgs", [])}
    owners = {me["name"], *(name for name, in_organisation in roles.items() if in_organisation != "read")}
    if owner not in owners:
        why = f"is only a reader of {owner!r}" if owner in roles else f"cannot create repositories under {owner!r}"
        raise ValueError(
            f"HF_TOKEN belongs to {me['name']}, which {why}; publish.repository may start with: "
            f"{', '.join(sorted(owners))}"
        )
    if role != "fineGrained":
        return
    scopes = access.get("fineGrained", {}).get("scoped", [])
    writable = {scope["entity"].get("name") for scope in scopes if "repo.write" in scope.get("permissions", ())}
    if owner not in writable and not (exists and repository in writable):
        to_create = "" if exists else ", which it must be allowed to create"
        raise ValueError(
            f"HF_TOKEN is fine-grained and may write to {', '.join(sorted(map(str, writable))) or 'no repository'}, "
            f"not to {repository}{to_create}; give it write access to the repositories of {owner} ({_TOKENS_PAGE})"
        )


def _metadata(settings: PublishSettings, base_model: str | None) -> str:
    """A card with the metadata that the Hub may refuse."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(language=settings.language, license=settings.license, base_model=base_model)
    return f"---\n{data.to_yaml()}\n---\n"


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
    except ValueError as error:  # ours, or of the card's metadata, whose cause is the request
        raise ValueError(str(error)) from None
    except httpx2.HTTPError as error:
        raise ConnectionError(
            f"cannot reach the Hub to push to {repository} ({type(error).__name__}); check the network and run again"
        ) from None
