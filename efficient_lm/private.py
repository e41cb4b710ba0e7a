"""Secrets do not get into what a run leaves: no password of a URL, no token of the environment."""

import os
import re
from collections.abc import Mapping
from typing import Any

from efficient_lm.errors import ConfigError

NAMED = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
"""Names of environment variables that hold secrets: ``WANDB_API_KEY``, ``HF_TOKEN``, ``AWS_SECRET_ACCESS_KEY``."""
SHORTEST = 8
"""Characters; what is shorter would be found in ordinary values."""
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


def refuse_secrets(values: Any, key: str = "") -> None:
    """Raises `ConfigError`, which names the key and not the secret, for a config with a secret in it."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            refuse_secrets(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            refuse_secrets(value, f"{key}.{index}")
    elif isinstance(values, str):
        if _PASSWORD.search(values):
            raise ConfigError(f"{key}: a URL with a password, which config.yaml and trackers would keep; leave it out")
        for name, secret in os.environ.items():
            # A variable such as SSH_KEY names a file, whose folder is in many a path.
            told = len(secret) >= SHORTEST and not secret.startswith(("/", ".", "~")) and secret in values
            if told and NAMED.search(name):
                raise ConfigError(
                    f"{key}: holds the value of {name}, which config.yaml and trackers would keep; leave it out"
                )
