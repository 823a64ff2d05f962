"""Measurements, beside what we measure ourselves against."""
