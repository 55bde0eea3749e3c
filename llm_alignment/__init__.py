"""What the four training scripts and the evaluation share; one noun a file."""
