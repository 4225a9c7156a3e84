"""What `make test` runs; tests/conftest.py holds what they share."""

PATIENCE = 900.0
"""Seconds after which a test that hangs is ended: no test may depend on how busy the machine is, so
this is many times what the slowest takes on one core of a loaded one."""
