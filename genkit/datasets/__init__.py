"""Pictures and captions as data: reading, exporting, finding duplicates."""
