"""Detectors: `fit(...)` and `predict(...)`, composed of the modules above them in the data flow."""
