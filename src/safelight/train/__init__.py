"""Training: one loop, small objectives, TOML recipes."""
