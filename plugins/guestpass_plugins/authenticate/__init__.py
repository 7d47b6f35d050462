"""Authenticators: who is this visitor?"""
