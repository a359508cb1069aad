"""What is asked of the Hub before rows or weights are read: the commit of a revision, the text of a small file.

Fast to import: huggingface_hub is imported where it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NUM_REQUESTS_AT_ONCE = 8


class SourceUnavailable(ValueError):
    """A Hub dataset that cannot be loaded now: no network, no access, or no such repository or revision."""


class HubUnreachable(SourceUnavailable):
    """The Hub did not answer at all, so a request for another repository would fail too."""


def resolve_commit(
    kind: Literal["dataset", "model"],
    repository: str,
    revision: str,
    endpoint: str | None = None,
    timeout_seconds: float = 30.0,
) -> str:
    """The commit (40 hex digits) that a revision of a Hub repository stands for; one given in full is not looked up.

    Args:
        kind: what the repository holds.
        repository: owner/name.
        revision: branch, tag or commit.
        endpoint: Hub address; None: huggingface_hub's default (HF_ENDPOINT).
        timeout_seconds: for an answer.

    Raises:
        HubUnreachable: no network, or no answer in time.
        SourceUnavailable: unknown repository or revision, no access, or an error of the Hub.
        ValueError: a malformed name.
    """
    if is_commit(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"Hub {kind} {repository!r}"
    try:
        info = HfApi(endpoint=endpoint).repo_info(
            repository, repo_type=kind, revision=revision, timeout=timeout_seconds
        )
    except GatedRepoError as error:
        raise SourceUnavailable(
            f"{name} is gated: accept its terms on its page and set HF_TOKEN (or run `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceUnavailable(
            f"{name} has no revision {revision!r}: give a branch, a tag or a commit that its page lists"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceUnavailable(
            f"{name} was not found: check the spelling (owner/name); a private one needs HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "unknown")
        raise SourceUnavailable(
            f"{name}: the Hub answered with status {status} for revision {revision!r}; try again later"
        ) from error
    except ValueError as error:  # huggingface_hub refuses malformed names itself
        raise ValueError(f"{name} is not a valid name: write owner/name ({error})") from error
    except Exception as error:  # connection errors differ by HTTP library
        raise HubUnreachable(
            f"{name}: the Hub cannot be reached to resolve revision {revision!r} ({type(error).__name__}); "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or pin a full 40-digit commit"
        ) from error
    if not info.sha:
        raise SourceUnavailable(f"{name}: the Hub named no commit for revision {revision!r}; pin one in full")
    return str(info.sha)


class Reference(NamedTuple):
    """A revision of a Hub repository, as a recipe names it."""

    kind: Literal["dataset", "model"]
    repository: str
    revision: str


def resolve_commits(
    references: Iterable[Reference], resolve: Callable[[Reference], str]
) -> dict[Reference, str | ValueError]:
    """Commit of every reference, or the error that `resolve` raised for it. Several requests run at a time.

    After the first request without an answer no other is sent: 25 timeouts would take minutes.
    """
    wanted = list(dict.fromkeys(references))
    unanswered: list[HubUnreachable] = []

    def one(reference: Reference) -> str | ValueError:
        if unanswered and not is_commit(reference.revision):
            name = f"Hub {reference.kind} {reference.repository!r}, revision {reference.revision!r}"
            return HubUnreachable(f"{name}: not asked for after: {unanswered[0]}")
        try:
            return resolve(reference)
        except ValueError as error:
            if isinstance(error, HubUnreachable):
                unanswered.append(error)
            return error

    if not wanted:
        return {}
    # Alone first: it imports the client once, and tells whether the Hub can be reached at all.
    first = one(wanted[0])
    with ThreadPoolExecutor(_NUM_REQUESTS_AT_ONCE) as pool:
        return dict(zip(wanted, [first, *pool.map(one, wanted[1:])], strict=True))


def hub_text(reference: Reference, name: str) -> str | None:
    """Text of a small file of a Hub repository at a commit; None where it has no such file.

    SourceUnavailable where the Hub cannot be reached and the file was never fetched, or where there is no access.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    kind, repository, revision = reference
    if try_to_load_from_cache(repository, name, revision=revision, repo_type=kind) is _CACHED_NO_EXIST:
        return None  # a commit does not change
    try:
        file = hf_hub_download(repository, name, repo_type=kind, revision=revision)
    except LocalEntryNotFoundError as error:  # derives from the next one
        raise HubUnreachable(
            f"Hub {kind} {repository!r}: {name} cannot be fetched; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise SourceUnavailable(
            f"Hub {kind} {repository!r}: {name} cannot be fetched ({type(error).__name__}); accept the repository's "
            "terms on its page and set HF_TOKEN, or try again later"
        ) from error
    return Path(file).read_text(encoding="utf-8")


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit in full, which needs no look-up."""
    return _COMMIT.fullmatch(revision) is not None
