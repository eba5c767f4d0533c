"""Where the cache is, also for a user without a home."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from dragkit.data.cache import cache_root
from dragkit.errors import ConfigError


def test_a_user_without_a_home_must_name_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("DRAGKIT_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError, match="HOME is not set.* DRAGKIT_CACHE"):
        cache_root()
    assert cache_root(tmp_path) == tmp_path
    monkeypatch.setenv("DRAGKIT_CACHE", str(tmp_path / "other"))
    assert cache_root() == tmp_path / "other"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DRAGKIT_CACHE", "~/mine")
    assert cache_root() == tmp_path / "mine"
