"""Which names announce a secret, and that none is left in data, commands and URLs."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from rpd_sb3.contract.secrets import MASK, is_secret, masked, redact, redact_command, redact_urls


@pytest.mark.parametrize(
    "name",
    [
        *("token", "hf_token", "authToken", "RPD_SB3_TOKEN", "token2", "--token", "a.token"),
        *("key", "api_key", "apikey", "apiKey", "API-KEY", "access_key", "openai_key", "private_keys"),
        *("secret", "client_secret", "secret_access_key", "password", "passwd", "db_password", "pwd"),
        *("Authorization", "authorization", "auth", "credential", "credentials", "bearer"),
    ],
)
def test_name_of_a_secret(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("tokens", "n_tokens", "token_bounds", "tokenizer", "pad_token_id", "TokenPolicy"),
        *("unnorm_key", "image_key", "keyframe", "monkey", "turkey", "key_dim", "keys", "query_key_value"),
        *("compass", "author", "timeout", ""),
    ],
)
def test_name_of_something_else(name: str) -> None:
    assert not is_secret(name)


def test_every_depth_of_mappings_and_lists() -> None:
    config: dict[str, Any] = {
        "teacher": "http://gpu:8000",
        "teacher_kwargs": {"token": "abc", "timeout": 5, "login": [{"user": "me", "password": 1234}], "api_key": {"a": 1}},
        "env_kwargs": {"tokens": {"low": [0.0], "high": [1.0]}, "unnorm_key": "bridge"},
    }  # fmt: skip
    kept = redact(config)
    assert kept["teacher_kwargs"] == {
        "token": MASK,
        "timeout": 5,
        "login": [{"user": "me", "password": MASK}],
        "api_key": MASK,
    }
    assert (kept["teacher"], kept["env_kwargs"]) == (config["teacher"], config["env_kwargs"])
    assert masked(kept) == ["teacher_kwargs.token", "teacher_kwargs.login.password", "teacher_kwargs.api_key"]
    assert redact(kept) == kept
    assert config["teacher_kwargs"]["token"] == "abc"


def test_what_is_no_text_and_no_number_is_no_secret() -> None:
    assert redact({"token": None, "auth": False}) == {"token": None, "auth": False}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["token:abc", "timeout:5"], [f"token:{MASK}", "timeout:5"]),
        (["token: abc def"], [f"token: {MASK}"]),
        (["token:", "abc", "--seed", "1"], ["token:", MASK, "--seed", "1"]),
        (["--token", "abc", "-n", "5"], ["--token", MASK, "-n", "5"]),
        (["--token=abc"], [f"--token={MASK}"]),
        (["--api-key", "abc"], ["--api-key", MASK]),
        (["teacher_kwargs.token:abc"], [f"teacher_kwargs.token:{MASK}"]),
        (["login:{user: me, 'password': \"abc\"}"], [f"login:{{user: me, 'password': {MASK}"]),
        (["headers.X:Bearer abc"], [f"headers.X:Bearer {MASK}"]),
        (["RPD_SB3_TOKEN=abc", "python"], [f"RPD_SB3_TOKEN={MASK}", "python"]),
        (["unnorm_key:bridge", "tokens:16"], ["unnorm_key:bridge", "tokens:16"]),
    ],
)
def test_words_of_a_command_line(words: list[str], expected: list[str]) -> None:
    assert redact(words) == expected
    assert redact_command(shlex.join(words)) == shlex.join(expected)
    assert redact_command(shlex.join(expected)) == shlex.join(expected)


def test_quote_that_is_not_closed_hides_nothing() -> None:
    assert redact_command("train --teacher-kwargs 'token:abc def") == f"train --teacher-kwargs 'token:{MASK}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://me:abc@gpu:8000", f"http://{MASK}@gpu:8000"),
        ("http://abc@gpu:8000,https://me:a@c@gpu2/v1", f"http://{MASK}@gpu:8000,https://{MASK}@gpu2/v1"),
        ("ws://gpu/?x=1&token=abc,http://gpu?api_key=abc#y", f"ws://gpu/?x=1&token={MASK},http://gpu?api_key={MASK}#y"),
        ("http://gpu/?access%5Ftoken=abc", f"http://gpu/?access%5Ftoken={MASK}"),
        ("http://api-key.example.com:8000/@me", "http://api-key.example.com:8000/@me"),
        ("https://gpu/v1?page=2", "https://gpu/v1?page=2"),
    ],
)
def test_urls(url: str, expected: str) -> None:
    assert redact(url) == redact({"teacher": url})["teacher"] == expected
    assert redact_urls(f"no service at {url}; give a token: ...") == f"no service at {expected}; give a token: ..."
    assert masked({"teacher": expected}) == (["teacher"] if MASK in expected else [])
