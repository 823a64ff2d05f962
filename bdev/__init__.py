"""Block devices: their interface, and one file for each kind."""
