"""What annotators correct becomes a better detector for their project."""
