"""The table of settings: defaults, texts that are understood, texts that stop the start."""

from __future__ import annotations

import pytest

from backend.errors import SettingsError
from backend.settings import SETTINGS, Settings


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()


def test_empty_and_blank_variables_count_as_unset() -> None:
    assert Settings.from_env({setting.name: " " for setting in SETTINGS}) == Settings()


def test_variables_of_others_are_passed_over() -> None:
    assert Settings.from_env({"PATH": "/bin", "port": "1"}) == Settings()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_explains_itself_and_its_default_would_be_accepted(setting) -> None:
    assert setting.help.endswith(".")
    if setting.default is not None:
        assert setting.parse(str(setting.default)) == setting.default


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("CHECKPOINT", "sam2.1_hiera_tiny", "sam2.1_hiera_tiny"),
        ("DEVICE", "cuda:1", "cuda:1"),
        ("CACHE_MB", "0", 0),
        ("SCORE_THRESHOLD", "0.25", 0.25),
        ("SCORE_THRESHOLD", " 1 ", 1.0),
        ("PORT", "8080", 8080),
        ("DEADLINE_S", "2.5", 2.5),
        ("MAX_LABEL_CONFIG_CHARS", "1000000", 1_000_000),
        ("LABEL_STUDIO_URL", "https://labels.example.com/tool/", "https://labels.example.com/tool"),
        ("LABEL_STUDIO_URL", "http://[::1]:8080", "http://[::1]:8080"),
        ("ALLOW_PRIVATE_ADDRESSES", "No", False),
        ("ALLOW_PRIVATE_ADDRESSES", "1", True),
        ("LOG_LEVEL", "DEBUG", "debug"),
    ],
)
def test_texts_become_values(name: str, text: str, value: object) -> None:
    assert getattr(Settings.from_env({name: text}), name.lower()) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("DEVICE", "gpu", "DEVICE: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("PROPOSALS", "dense", "PROPOSALS: expected auto, learned or grid, got 'dense'"),
        ("CACHE_MB", "-1", "CACHE_MB: expected a whole number from 0 to 1048576, got '-1'"),
        ("CACHE_MB", "1e3", "CACHE_MB: expected a whole number from 0 to 1048576, got '1e3'"),
        ("SCORE_THRESHOLD", "1.1", "SCORE_THRESHOLD: expected a number from 0 to 1, got '1.1'"),
        ("SCORE_THRESHOLD", "nan", "SCORE_THRESHOLD: expected a number from 0 to 1, got 'nan'"),
        ("MAX_DETECTIONS", "0", "MAX_DETECTIONS: expected a whole number from 1 to 10000, got '0'"),
        ("PORT", "http", "PORT: expected a whole number from 1 to 65535, got 'http'"),
        ("PORT", "٣٣", "PORT: expected a whole number from 1 to 65535, got '٣٣'"),
        ("THREADS", "1", "THREADS: expected a whole number from 4 to 1000, got '1'"),
        ("DEADLINE_S", "0", "DEADLINE_S: expected a number from 1 to 3600, got '0'"),
        (
            "MAX_LABEL_CONFIG_CHARS",
            "0",
            "MAX_LABEL_CONFIG_CHARS: expected a whole number from 1000 to 67108864, got '0'",
        ),
        ("DEADLINE_S", "inf", "DEADLINE_S: expected a number from 1 to 3600, got 'inf'"),
        (
            "LABEL_STUDIO_URL",
            "labels.example.com",
            "LABEL_STUDIO_URL: expected an http or https address without a query, such as https://labels.example.com, "
            "got 'labels.example.com'",
        ),
        (
            "LABEL_STUDIO_URL",
            "http://host:port",
            "LABEL_STUDIO_URL: expected an http or https address without a query, such as https://labels.example.com, "
            "got 'http://host:port'",
        ),
        (
            "LABEL_STUDIO_URL",
            "http://me:secret@host",
            "LABEL_STUDIO_URL: expected an http or https address without a query, such as https://labels.example.com, "
            "got something else",
        ),
        (
            "LABEL_STUDIO_API_KEY",
            "two\nlines",
            "LABEL_STUDIO_API_KEY: expected printable ASCII characters, got something else",
        ),
        (
            "LABEL_STUDIO_API_KEY",
            "abc",
            "LABEL_STUDIO_URL: expected the address that LABEL_STUDIO_API_KEY belongs to, so that the key goes nowhere "
            "else, got none",
        ),
        ("BASIC_AUTH_USER", "me", "BASIC_AUTH_PASS: expected a value next to BASIC_AUTH_USER, got none"),
        ("BASIC_AUTH_PASS", "me", "BASIC_AUTH_USER: expected a value next to BASIC_AUTH_PASS, got none"),
        ("ALLOW_PRIVATE_ADDRESSES", "maybe", "ALLOW_PRIVATE_ADDRESSES: expected true or false, got 'maybe'"),
        ("LOCAL_FILES_ROOT", "/no/such", "LOCAL_FILES_ROOT: expected an existing folder, got '/no/such'"),
        (
            "DETECTOR",
            "README.md",
            "DETECTOR: expected an existing .safetensors or .pt file with weights of facings-nano, got 'README.md'",
        ),
        (
            "ENCODER",
            "/no/such.onnx",
            "ENCODER: expected an existing folder, .onnx or .engine file that facings export wrote, "
            "or triton://host:port/model, got '/no/such.onnx'",
        ),
        *(
            ("ENCODER", text, f"ENCODER: expected triton://host:port/model, or tritons:// with TLS, got {text!r}")
            for text in (
                "triton://",
                "triton://gpu:8001",
                "triton://gpu:8001/",
                "triton://gpu/model",
                "triton://gpu:0/model",
                "triton://gpu:65536/model",
                "triton://gpu:http/model",
                "triton://:8001/model",
                "triton://gpu:8001/model/1",
                "triton://gpu:8001/model?a=b",
                "http://gpu:8000/model",
            )
        ),
        (
            "ENCODER",
            "triton://me:secret@gpu:8001/model",
            "ENCODER: expected triton://host:port/model, or tritons:// with TLS, got something else",
        ),
        ("LOG_LEVEL", "loud", "LOG_LEVEL: expected debug, info, warning or error, got 'loud'"),
    ],
)
def test_wrong_texts_are_named_with_what_was_expected(name: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({name: text})
    assert str(caught.value) == message


def test_all_wrong_settings_are_named_in_one_line() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({"PORT": "x", "THREADS": "y"})
    assert "PORT: " in str(caught.value)
    assert "THREADS: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_colon_in_the_user_name_is_refused_because_basic_auth_cannot_carry_it() -> None:
    with pytest.raises(SettingsError, match="BASIC_AUTH_USER"):
        Settings(basic_auth_user="a:b", basic_auth_pass="c")


def test_secrets_do_not_show() -> None:
    settings = Settings(
        label_studio_url="http://ls", label_studio_api_key="key-1", basic_auth_user="me", basic_auth_pass="word-2"
    )
    assert "key-1" not in repr(settings)
    assert "word-2" not in repr(settings)


def test_the_engine_gets_its_part() -> None:
    options = Settings.from_env(
        {
            "CHECKPOINT": "facings-nano",
            "DEVICE": "cpu",
            "PROPOSALS": "Grid",
            "CACHE_MB": "2",
            "SCORE_THRESHOLD": "0.5",
            "MAX_DETECTIONS": "7",
        }
    ).engine_options()
    assert (options.checkpoint, options.checkpoint_config, options.device) == ("facings-nano", None, "cpu")
    assert options.proposals == "grid"
    assert (options.cache_bytes, options.score_threshold, options.max_detections) == (2 << 20, 0.5, 7)
