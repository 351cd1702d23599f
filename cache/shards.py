"""The writing side: what stage one imports."""

from cache.extraction import ExtractionHeader
from cache.folder import ShardFolder
from cache.sealing import seal

__all__ = ["ExtractionHeader", "ShardFolder", "seal"]
