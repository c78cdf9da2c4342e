"""The version of this moeshm, which pyproject.toml takes from here."""

# Not asked of importlib.metadata, whose import takes longer than that of all moeshm.
VERSION = "0.1.0"
