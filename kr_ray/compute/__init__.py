"""Devices, seeds, workers, captured graphs."""
