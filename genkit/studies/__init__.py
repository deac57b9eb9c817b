"""What looks back at runs: study, compare, score, classify."""
