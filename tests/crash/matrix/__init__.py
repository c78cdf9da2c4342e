"""Kills and stops each side at each crash point: docs/crashes.md."""
