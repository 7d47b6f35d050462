"""Observers: hear what happened."""
