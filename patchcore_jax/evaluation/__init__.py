"""Labelled data -> a row of metrics for each category, scores of all images, and a report."""
