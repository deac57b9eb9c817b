"""Requests to pictures: the slot engine, guidance, text and image codecs, the generators."""
