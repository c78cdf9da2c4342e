"""One named attack a file; tests/hostile/attack.py says what a file has."""
