"""Revokers: may this session start, and when must it end?"""
