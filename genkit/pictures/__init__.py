"""Picture files in and out: reading, encoding, metadata."""
