"""The message of a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lmcode.config import ConfigError


def message_of(action: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)
