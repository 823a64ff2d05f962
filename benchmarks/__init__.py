"""Measurements, beside what the machine allows and what others reach."""
