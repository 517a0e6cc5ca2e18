"""A Label Studio with pre-annotated photos, for `make run`."""
