"""Many photos through one engine: pipeline, jobs, uploads and file formats."""
