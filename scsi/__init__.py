"""SCSI targets, logical units and commands. Nothing is here yet: the package reserves its place."""
