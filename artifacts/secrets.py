"""What is a secret: by the name of its variable, by its value where this machine knows it, by the form of known tokens.

Asked before a text leaves: an expanded variable, a recipe, a publication, an error of a shared store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html import unescape
from itertools import chain
from pathlib import Path

#: In names as variables have them: HF_TOKEN, AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_CONNECTION_STRING, WANDB_API_KEY.
_SECRET_NAME = re.compile(
    r"SECRET(?!AR)|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(?:API|ACCESS|PRIVATE|ACCOUNT)_?KEY|CONN\w*_?STR"
    r"|TOKEN(?!IZ|IS|S|_(?:COUNT|SHARD|BUDGET|LENGTH|DIR|FILE|PATH))|(?:ACCESS|API|AUTH|REFRESH)_TOKENS$"
    r"|(?:^|_)(?:PAT|SAS|DSN|JWT|COOKIE|BEARER|SIGNATURE)(?:_|$)|(?:^|_)(?:AUTH|AUTH_STRING|KEYS?|PW|(?:SSH|DB)?PASS)$|_PWD$"
)
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# All patterns are linear, or bounded: the texts are untrusted, and a tokenizer has megabytes.
#: `name = value`, `"name": "value"` or `Name=value;` in a file or a variable that holds several.
_ASSIGNMENT = re.compile(r"""(?<![\w.-])([A-Za-z][\w.-]{0,99})["']?[ \t]*[:=][ \t]*["']?([^"'\r\n;,]+)""")
_ESCAPED = re.compile(r"\\([^A-Za-z0-9\s])")
_NETRC_PASSWORD = re.compile(r"\bpassword[ \t]+(\S+)")
_URL_PASSWORD = re.compile(r"://[^/\s:@\"'<>`]*:([^/\s@\"'<>`]+)@")
#: What it is, a part that every such text has (looked for first, for a tokenizer has megabytes), and its form.
_FORMS = [
    (what, part, re.compile(form))
    for what, part, form in (
        ("a token of the Hub", "hf_", r"\bhf_[A-Za-z0-9]{16,}"),
        ("a key of AWS", "AKIA", r"\bAKIA[A-Z0-9]{16}\b"),
        ("a key of AWS", "ASIA", r"\bASIA[A-Z0-9]{16}\b"),
        ("a token of GitHub", "gh", r"\bgh[oprsu]_[A-Za-z0-9]{36,}"),
        ("a token of GitHub", "github_pat_", r"\bgithub_pat_\w{22,}"),
        ("a token of GitLab", "glpat-", r"\bglpat-[\w-]{20,}"),
        ("a key of Google", "AIza", r"\bAIza[\w-]{35}"),
        ("a token of Google", "ya29.", r"\bya29\.[\w-]{20,}"),
        ("a key of Azure", "Key=", r"\b(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40,}"),
        ("a signature of Azure", "sig=", r"[?&;]sig=[A-Za-z0-9%+/]{30,}"),
        ("a key of Prefect", "pn", r"\bpn[ub]_[A-Za-z0-9]{30,}"),
        ("a key of Weights & Biases", "wandb_v", r"\bwandb_v\d_\w{20,}"),
        ("a token of Slack", "xox", r"\bxox[abeoprs]-[\w-]{10,}"),
        (
            "a key of a model's service",
            "sk-",
            r"\bsk-(?:[a-z]{2,12}\d{0,2}-){0,3}(?=[A-Za-z]{0,99}\d)[A-Za-z0-9]{20,}",
        ),
        ("a signed token (JWT)", "eyJ", r"\beyJ[\w-]{10,300}\.eyJ[\w-]{10,}"),
        ("a private key", "PRIVATE KEY", r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    )
]
_MIN_LENGTH = 8
#: A plain word or number below this length says nothing: it stands in every vocabulary.
_MIN_LENGTH_OF_WORDS = 12
_MAX_FILE_BYTES = 1 << 20


def is_secret_name(name: str) -> bool:
    """Whether what is called so is kept secret: HF_TOKEN, dbPassword, AWS_SECRET_ACCESS_KEY; not TOKENIZER or PWD."""
    return _SECRET_NAME.search(_CAMEL_CASE.sub("_", name).upper()) is not None


def known_secrets() -> dict[str, str]:
    """Secret -> where it is from: the environment, and the files in which the libraries that we use keep theirs."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        held = chain([value.strip()] if is_secret_name(name) else [], _held_in(value))
        found |= {secret: f"the value of {name}" for secret in held if _is_telling(secret)}
    for path, is_token in _files():
        try:
            if not path.is_file():  # reading a pipe would take it from the library
                continue
            with path.open(encoding="utf-8", errors="replace") as file:
                text = file.read(_MAX_FILE_BYTES)
        except OSError:
            continue
        held = chain([text.strip()] if is_token else [], _held_in(text))
        found |= {secret: f"a secret of {path.name}" for secret in held if _is_telling(secret) and secret not in found}
    return found


def find_secret(text: str) -> str | None:
    """What secret is in a text, in words; None where there is none."""
    return next((what for _, what in secrets_in(text, known_secrets())), None)


def without_secrets(text: str) -> str:
    """A text with its secrets, and all that stands before an @ in a URL, blotted out."""
    text = re.sub(r"//[^/@\s]*@", "//***@", text)
    text = re.sub(r"([?&][\w.-]*(?:sig|signature|token|key|credential)[\w.-]*=)[^&\s'\"]+", r"\1***", text, flags=re.I)
    for secret, _ in secrets_in(text, known_secrets()):
        text = text.replace(secret, "***")
    return text


def secrets_in(text: str, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Every secret of a text, with what it is in words. `known`: as from `known_secrets`."""
    # As it stands, and without what Markdown and HTML write for a character of their own.
    unmarked = _ESCAPED.sub(r"\1", text)
    for form in dict.fromkeys((text, unescape(unmarked) if "&" in unmarked else unmarked)):
        # The longest first: a connection string before the key in it.
        for secret in sorted(known, key=len, reverse=True):
            if secret in form:
                yield secret, known[secret]
        for match in _URL_PASSWORD.finditer(form):
            yield match.group(1), "the password of a URL"
        for what, part, pattern in _FORMS:
            if part in form:
                yield from ((found, what) for found in pattern.findall(form))


def _is_telling(secret: str) -> bool:
    """Whether a secret can be looked for in a text; the path of a file with secrets is none itself."""
    is_word = secret.isalpha() or secret.isdigit()
    is_path = secret.startswith("/") and os.path.exists(secret)
    return len(secret) >= (_MIN_LENGTH_OF_WORDS if is_word else _MIN_LENGTH) and not is_path


def _held_in(text: str) -> Iterator[str]:
    """The secrets that a file or a variable holds under a name: `AccountKey=...;`, `"private_key": "..."`."""
    for name, value in _ASSIGNMENT.findall(text):
        if is_secret_name(name):
            yield value.strip()
    yield from _URL_PASSWORD.findall(text)
    yield from _NETRC_PASSWORD.findall(text)


def _files() -> Iterator[tuple[Path, bool]]:
    """Where the clients of the Hub, AWS, Google, Weights & Biases and Prefect keep secrets; whether it is one alone."""

    def named(variable: str, default: str) -> Path:
        return Path(os.path.expanduser(os.environ.get(variable) or default))

    token = named("HF_TOKEN_PATH", str(named("HF_HOME", "~/.cache/huggingface") / "token"))
    yield token, True
    yield token.with_name("stored_tokens"), False
    yield named("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), False
    yield named("GOOGLE_APPLICATION_CREDENTIALS", "~/.config/gcloud/application_default_credentials.json"), False
    yield named("NETRC", "~/.netrc"), False
    yield named("PREFECT_PROFILES_PATH", str(named("PREFECT_HOME", "~/.prefect") / "profiles.toml")), False
