"""Notifiers: bring a message to its recipient."""
