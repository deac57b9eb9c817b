"""The durable run folder: records, writers, stored embeddings, resume."""
