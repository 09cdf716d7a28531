"""Metrics -> tables."""
