"""How images lie on disk: one file per layout, each offering `LAYOUT`."""
