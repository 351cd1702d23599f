"""Giving caches away and getting them: push, pull, ranges, licences, privacy, signatures."""
