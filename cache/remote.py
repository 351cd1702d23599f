"""Sharing a sealed cache: `push` it to an address, `pull` it from one."""

from cache.pulling import PullReport, pull
from cache.pushing import PushReport, push

__all__ = ["PullReport", "PushReport", "pull", "push"]
