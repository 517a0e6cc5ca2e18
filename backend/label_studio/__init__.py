"""Values to and from Label Studio's JSON, and its API client."""
