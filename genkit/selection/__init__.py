"""Which pictures are kept: gates, ranks, diversity, reference sets, votes, calibration."""
