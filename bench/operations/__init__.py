"""One file per measured operation, each with an `OPERATION`."""
