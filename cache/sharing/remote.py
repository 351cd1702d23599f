"""Sharing a sealed cache: `push` it to an address, `pull` it from one."""

from cache.sharing.pulling import PullReport, pull
from cache.sharing.pushing import PushReport, push

__all__ = ["PullReport", "PushReport", "pull", "push"]
