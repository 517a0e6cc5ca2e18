"""An address, a file or bytes to a decoded Photo."""
