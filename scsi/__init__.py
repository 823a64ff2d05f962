"""SCSI: targets, logical units, and the commands that they carry out."""
