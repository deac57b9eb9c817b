"""What is asked for: requests, prompt files, typed settings, sampling plans."""
