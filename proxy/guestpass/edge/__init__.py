"""The public reverse proxy."""
