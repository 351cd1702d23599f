"""Several caches: merge, diff, slice."""
