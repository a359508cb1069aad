"""What counts as a secret: names of variables, values that this machine knows, forms of tokens."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from smoltulu.artifacts.secrets import find_secret, is_secret_name, known_secrets, without_secrets

SECRET_NAMES = [
    "MYSQL_PWD",
    "SSHPASS",
    "ACCESS_TOKENS",
    "ENCRYPTION_KEYS",
    "LDAP_PW",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "hf_token",
    "HFTOKEN",
    "GITHUB_TOKEN",
    "GH_PAT",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_SAS_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_API_KEY",
    "WANDB_API_KEY",
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING",
    "OPENAI_API_KEY",
    "PGPASSWORD",
    "DB_PASS",
    "dbPassword",
    "MY_PASSPHRASE",
    "SSH_PRIVATE_KEY",
    "ENCRYPTION_KEY",
    "KEY",
    "apiKey",
    "SENTRY_DSN",
    "SESSION_COOKIE",
]
PLAIN_NAMES = [
    "TOKENISED_DATA",
    "TOKEN_COUNTS",
    "SECOND_PASS_DATA",
    "SECRETARY_DATA",
    "PASS_AT_K",
    "AUTH_ROOT",
    "HOME",
    "PWD",
    "OLDPWD",
    "USER",
    "PATH",
    "TMPDIR",
    "SMOLTULU_STORE",
    "SMOLTULU_REAL_DATA",
    "HF_HOME",
    "TOKENIZERS_PARALLELISM",
    "TOKENIZER_PATH",
    "NUM_TOKENS",
    "MAX_TOKENS",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "WANDB_PROJECT",
    "AUTHOR",
    "KEYBOARD",
    "MONKEY",
    "KEYS_FOLDER",
    "PATTERN",
    "COMPASS",
    "DATA_PATH",
    "SASHA",
    "PASSAGES",
]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine that the tests run on."""
    for name in list(os.environ):
        if is_secret_name(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "HF_TOKEN_PATH", "NETRC", "AWS_SHARED_CREDENTIALS_FILE", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize("name", [name for name in SECRET_NAMES if name.isupper()])
def test_a_value_of_the_environment_is_found_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "s3cr3t/va+lue=")
    assert find_secret("before s3cr3t/va+lue= after") == f"the value of {name}"
    assert without_secrets("before s3cr3t/va+lue= after") == "before *** after"
    assert find_secret("before s3cr3t after") is None


@pytest.mark.parametrize(
    "text",
    [
        "hf_abcdefghijklmnopqrst",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1" * 20,
        "github_pat_" + "a1" * 20,
        "glpat-abcdefghij1234567890",
        "AIza" + "a1-_b" * 7,
        "AccountKey=" + "ab+/" * 12,
        "https://account.blob.core.windows.net/x?sv=1&sig=" + "ab%2F" * 10,
        "pnu_" + "a1" * 18,
        "wandb_v1_" + "a1" * 15,
        "xoxb-123456789012-abcdef",
        "sk-proj-abcdefghij1234567890",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln",
        "-----BEGIN RSA PRIVATE KEY-----",
        "postgresql://user:pa55w@host/db",
    ],
)
def test_forms_of_tokens_are_found_without_being_known(text: str) -> None:
    assert find_secret(f"a text with {text} in it") is not None
    assert text not in without_secrets(f"a text with {text} in it")


@pytest.mark.parametrize(
    "text",
    [
        "no secret here",
        "https://huggingface.co/owner/name?download=true",
        "the tokens hf_ and sk- and sk-learn-style-estimators",
        "abfs://container@account.dfs.core.windows.net/folder",
        "me@example.org: a:b@c",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4",  # a commit
        "risk-averse-and-other-long-words-with-1-digit",
        "data/sk-translations-2024-of-the-news-crawl.jsonl",
    ],
)
def test_what_is_no_secret(text: str) -> None:
    assert find_secret(text) is None and without_secrets(text).endswith(text.partition("//")[2][-10:])


def test_secrets_inside_of_other_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=me;AccountKey=c2VjcmV0LWtleQ==;Suffix=x")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:pa55word@host/db")
    monkeypatch.setenv("EXTRA", '{"client_secret": "in-json-1"}')
    for secret in ("c2VjcmV0LWtleQ==", "pa55word", "in-json-1"):
        assert secret in known_secrets()
    assert not {"me", "AccountName=me"} & known_secrets().keys()


def test_secrets_that_libraries_keep_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        ".cache/huggingface/token": "0ld-style-token\n",
        ".cache/huggingface/stored_tokens": "[mine]\nhf_token = other-token-1\n",
        ".aws/credentials": "[default]\naws_access_key_id = ID12345678\naws_secret_access_key = sec/ret+1\n",
        ".netrc": "machine api.wandb.ai\n  login user\n  password f00df00df00d\n",
        ".prefect/profiles.toml": '[profiles.a]\nPREFECT_API_KEY = "prefect-key-1"\nPREFECT_API_URL = "http://host/api"\n',
        "service.json": '{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\\nMII1\\n"}',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "service.json"))
    known = known_secrets()
    for secret in ("0ld-style-token", "other-token-1", "ID12345678", "sec/ret+1", "f00df00df00d", "prefect-key-1"):
        assert known[secret].startswith("a secret of "), secret
    assert any("MII1" in secret for secret in known)
    # The path is no secret, and messages need it.
    assert str(tmp_path / "service.json") not in known and "http://host/api" not in known
    (tmp_path / ".netrc").unlink()
    (tmp_path / ".netrc").mkdir()
    assert "f00df00df00d" not in known_secrets()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "pipe"))
    known_secrets()


def test_a_word_is_no_secret_for_it_stands_in_every_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "smoltulu")
    assert find_secret("smoltulu-1130") is None
    monkeypatch.setenv("POSTGRES_PASSWORD", "smoltulu1")
    assert find_secret("smoltulu1130") is not None


PIECES = "eyJ- eyJ sk- sk-a a a- :// ://a: : a= -----BEGIN A \\* &amp ?sig=a hf_ ghp_ pnu_".split()  # noqa: SIM905


@pytest.mark.parametrize("piece", PIECES)
def test_a_hostile_text_takes_no_time(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = piece * (1_000_000 // len(piece))
    begin = time.perf_counter()
    find_secret(text)
    monkeypatch.setenv("HARMLESS", text[:120_000])
    known_secrets()
    assert time.perf_counter() - begin < 10


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=12, max_size=40), st.text())
def test_what_is_known_is_never_left(secret: str, around: str) -> None:
    assume(not (secret.startswith("/") and os.path.exists(secret)))  # a file that holds a secret may be named
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv("SOME_TOKEN", secret)
        except (ValueError, UnicodeEncodeError):
            return
        assert secret not in without_secrets(f"{around}{secret}{around}").replace("***", "\0")
        escaped = "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+-.!|~$&" else letter for letter in secret)
        assert find_secret(f"{around} {escaped}") is not None
