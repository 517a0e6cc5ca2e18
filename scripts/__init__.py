"""The command `facings`: parses, calls, prints."""
